"""A KV cache holds of a narrower value head what is there, and gives the model's own logits."""

import pytest
import tiny
import torch
from transformers import DynamicCache, PreTrainedModel, StaticCache

from billhook.models import cached, sizes
from billhook.models.axes import axes
from billhook.models.plan import Plan
from billhook.models.surgery import remove

LENGTH = 24
ATTENTIONS = ("eager", "sdpa")


def narrowed(family: str, attention: str) -> PreTrainedModel:
    """A model whose second layer has narrower values."""
    model = tiny.model(family)
    if attention == "sdpa" and not model._supports_sdpa:
        pytest.skip(f"{family} has no sdpa attention")
    model.set_attn_implementation(attention)
    axis = next(axis for axis in axes(model, ("value",)) if axis.layer == 1)
    remove(model, axis, torch.arange(axis.units).view(axis.blocks, -1)[:, 1:4].flatten())
    return model


@pytest.mark.covering
@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("family", [name for name in tiny.CONFIGS if tiny.has(name, "value")])
def test_a_cache_holds_narrow_values_and_gives_the_same_logits(family: str, attention: str) -> None:
    model, ids = narrowed(family, attention), tiny.tokens(2, LENGTH)
    whole, cache = model(ids, use_cache=False).logits, DynamicCache(config=model.config)
    parts = [model(part, **{cached.NAME: cache}, use_cache=True).logits for part in ids.split([10, 5, 1, 8], 1)]
    assert torch.allclose(torch.cat(parts, 1), whole, atol=2e-5)
    held = sum(t.numel() for layer in cache.layers for t in (layer.keys, layer.values))
    assert (
        held
        == sizes.kv_cache_entries(model, Plan(), LENGTH, 2)
        < sizes.kv_cache_entries(tiny.model(family), Plan(), LENGTH, 2)
    )


def test_so_does_a_static_cache() -> None:
    model, ids = narrowed("llama", "sdpa"), tiny.tokens(2, LENGTH)
    whole = model(ids, use_cache=False).logits
    cache = StaticCache(config=model.config, max_cache_len=LENGTH)
    parts = [model(part, past_key_values=cache, use_cache=True).logits for part in ids.split([10, 14], 1)]
    assert torch.allclose(torch.cat(parts, 1), whole, atol=2e-5)
    assert [layer.values.shape[-1] < layer.keys.shape[-1] for layer in cache.layers] == [False, True, False]
