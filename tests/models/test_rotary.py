"""Heads that lose rotary pairs: the logits of a model in which these are zero, in the family's own stock class."""

import copy
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers as T
from transformers import DynamicCache

import billhook
from billhook.checkpoints.gguf import read
from billhook.checkpoints.gguf.write import write_gguf
from billhook.checkpoints.save import save
from billhook.errors import BillhookError
from billhook.models import layout, rotary, sizes
from billhook.models.axes import axes
from billhook.models.families import attention, row_of
from billhook.models.plan import Plan
from billhook.models.stock_shapes import merge
from billhook.models.surgery import remove, zero

TOKENS = tiny.tokens(2, 96)
POSSIBLE = [name for name in tiny.DENSE if not rotary.why_not(tiny.model(name))]
ROPES: dict[str, Any] = {
    "llama3": tiny.LLAMA3_ROPE,
    "yarn": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32},
}


def narrow_values(model: T.PreTrainedModel, size: int, cut: Any) -> None:
    for axis in axes(model, ("value",)):
        cut(model, axis, torch.arange(axis.units).view(axis.blocks, -1)[:, size:].flatten())


@torch.no_grad()
def shrunk(model: T.PreTrainedModel, pairs: tuple[int, ...]) -> torch.Tensor:
    """Make its heads shorter; the logits with what goes at zero."""
    silent = copy.deepcopy(model)
    narrow_values(silent, 2 * len(pairs), zero)
    rotary.silence(silent, {n: (pairs,) * attention(model, n).kv_heads for n in range(3)})
    narrow_values(model, 2 * len(pairs), remove)
    rotary.shrink_heads(model, pairs)
    return silent(TOKENS).logits


def turned_by(rope: dict[str, Any]) -> T.PreTrainedModel:
    """A tiny llama of such rotary positions."""
    torch.manual_seed(0)
    return T.LlamaForCausalLM(tiny.CONFIGS["llama"](rope_parameters=rope)).eval().requires_grad_(False)


@pytest.mark.covering(some={"family": 4})
@pytest.mark.parametrize("family", POSSIBLE)
@torch.no_grad()
def test_shorter_heads_are_a_stock_model_in_which_the_rest_is_zero(family: str) -> None:
    model = tiny.model(family)
    half, before = attention(model, 0).head_dim // 2, model.num_parameters()
    pairs = tuple(n for n in range(half) if n != 1)
    plan = Plan(pairs={n: (pairs,) * attention(model, n).kv_heads for n in range(3)})
    plan = Plan({(n, "value"): 2 * attention(model, n).kv_heads for n in range(3)}, pairs=plan.pairs)
    saved, cached = sizes.saved_by(model, plan), sizes.kv_cache_entries(model, plan, 7, 2)
    expected = shrunk(model, pairs)
    assert layout.layout_of(model) == "uniform" and model.num_parameters() == before - saved
    stock = getattr(T, row_of(model).classes[-1])(type(model.config)(**model.config.to_dict())).eval()
    stock.load_state_dict(model.state_dict())
    assert torch.allclose(stock(TOKENS).logits, expected, atol=2e-4)
    cache: Any = DynamicCache(config=stock.config)
    parts = [stock(part, past_key_values=cache, use_cache=True).logits for part in TOKENS[:, :7].split([4, 3], 1)]
    assert torch.allclose(torch.cat(parts, 1), expected[:, :7], atol=2e-4)
    assert sum(t.numel() for layer in cache.layers for t in (layer.keys, layer.values)) == cached


@pytest.mark.parametrize("rope", ROPES)
@torch.no_grad()
def test_scaled_frequencies_stay_what_they_are(rope: str) -> None:
    model = turned_by(ROPES[rope])
    expected = shrunk(model, (0, 2))
    assert torch.allclose(model(TOKENS).logits, expected, atol=2e-4)
    again = shrunk(model, (1,))  # and those that longrope holds now
    assert torch.allclose(model(TOKENS).logits, again, atol=2e-4)


@torch.no_grad()
def test_a_gguf_holds_the_frequencies_that_are_left(tmp_path: Path) -> None:
    model = tiny.model("llama")
    expected = shrunk(model, (0, 3))
    write_gguf(model, tiny.tokenizer(), tmp_path / "model.gguf", "F32")
    again, _ = read.open_gguf(tmp_path / "model.gguf")
    assert attention(again, 0).head_dim == 4
    assert torch.allclose(again(TOKENS).logits, expected, atol=2e-4)


def test_who_cannot_lose_pairs_is_refused_by_name() -> None:
    for family, why in {
        "qwen3": "normalises queries and keys",
        "gemma3_text": "normalises queries and keys",
        "olmo2": "normalises queries and keys",
        "phi3": "q, k and v are one matrix",
        "gpt2": "q, k and v are one matrix",
        "opt": "its head size is no key of its config",
    }.items():
        assert why in rotary.why_not(tiny.model(family)), family
    lengthy = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    assert "change with the length" in rotary.why_not(turned_by(lengthy))


@pytest.mark.covering(some={"family": 4})
@pytest.mark.parametrize("attention_by", ["eager", "sdpa"])
@pytest.mark.parametrize("family", POSSIBLE)
@torch.no_grad()
def test_each_kv_head_may_keep_pairs_of_its_own(family: str, attention_by: str, tmp_path: Path) -> None:
    model = tiny.model(family)
    model.set_attn_implementation(attention_by)
    half = attention(model, 0).head_dim // 2
    kept = {1: tuple((n, half - 1) for n in range(attention(model, 1).kv_heads))}
    silent, plan, before = copy.deepcopy(model), Plan(pairs=kept), model.num_parameters()
    saved, cached = sizes.saved_by(model, plan), sizes.kv_cache_entries(model, plan, 24, 2)
    rotary.silence(silent, kept)
    rotary.narrow_keys(model, kept)
    assert layout.layout_of(model) == "per_layer" and model.num_parameters() == before - saved
    ids, expected = TOKENS[:, :24], silent(TOKENS[:, :24]).logits
    assert torch.allclose(model(ids).logits, expected, atol=2e-5)
    save(model, tiny.tokenizer(), tmp_path, None)
    again = billhook.load(tmp_path)
    again.set_attn_implementation(attention_by)
    cache: Any = DynamicCache(config=again.config)
    parts = [again(part, past_key_values=cache, use_cache=True).logits for part in ids.split([10, 5, 1, 8], 1)]
    assert torch.allclose(torch.cat(parts, 1), expected, atol=5e-5)
    assert sum(t.numel() for layer in cache.layers for t in (layer.keys, layer.values)) == cached
    merge(again)
    assert layout.layout_of(again) == "uniform" and again.num_parameters() == before
    assert torch.allclose(again(ids).logits, expected, atol=2e-5)


def test_a_prune_writes_a_stock_checkpoint_with_the_cache_asked_for(tmp_path: Path, text_file: Path) -> None:
    chosen: dict[str, Any] = dict(method="lorc", keys="pairs", samples=10, seq_len=32, look=False)
    chosen |= {"calibration": str(text_file), "tokenizer": tiny.tokenizer()}
    whole = tiny.model("llama")
    result = billhook.prune(copy.deepcopy(whole), kv=0.75, **chosen)
    save(result.model, tiny.tokenizer(), tmp_path, None)
    again = T.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again(TOKENS).logits, result.model(TOKENS).logits)
    assert (
        type(again) is T.LlamaForCausalLM
        and again.config.head_dim == 6
        and len(result.record["rotary_pairs"]["0"][0]) == 3
    )
    held = [sizes.kv_cache_entries(model, Plan(), 64, 1) for model in (again, whole)]
    assert held[0] == 0.75 * held[1]
    uneven = billhook.prune(copy.deepcopy(whole), kv=0.5, layout="per_layer", **chosen)
    assert sizes.kv_cache_entries(uneven.model, Plan(), 64, 1) == pytest.approx(0.5 * held[1], rel=0.1)
    assert len({len(pairs[0]) for pairs in uneven.record["rotary_pairs"].values()}) > 1
    uneven.save(tmp_path / "uneven")
    with pytest.raises(BillhookError, match="use layout per_layer, or keys pairs"):
        billhook.prune(whole, kv=0.75, **{**chosen, "keys": "whole"})
    with pytest.raises(BillhookError, match="qwen3 cannot lose rotary pairs: it normalises queries and keys"):
        billhook.prune(tiny.model("qwen3"), kv=0.75, **chosen)
