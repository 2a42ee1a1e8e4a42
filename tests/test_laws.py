"""The laws, over every family and every axis: what is removed is what was zeroed, and nothing else changed."""

import copy
from pathlib import Path

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM

from billhook import checkpoint
from billhook.axes import Axis
from billhook.budget import check_kinds, decoder_parameters, total_parameters
from billhook.errors import BillhookError
from billhook.families import axes, layers
from billhook.surgery import remove, update_config, zero

FAMILIES = list(tiny.CONFIGS)
KINDS = ("ffn", "heads", "groups")
IDS = tiny.tokens()


def some_units(axis: Axis) -> torch.Tensor:
    """About half of the units, the same number from each block, never all."""
    per_block = axis.units // axis.blocks
    each = max(1, per_block // 2)
    generator = torch.Generator().manual_seed(axis.layer)
    picks = [torch.randperm(per_block, generator=generator)[:each] + b * per_block for b in range(axis.blocks)]
    return torch.cat(picks).sort().values


def cuttable(model: torch.nn.Module, kind: str) -> list[Axis]:
    return [axis for axis in axes(model, (kind,)) if axis.units > axis.blocks]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_removing_equals_zeroing_what_reads(family: str, kind: str) -> None:
    dense = tiny.model(family)
    if not cuttable(dense, kind):
        assert family.startswith("opt") and kind == "heads"  # multi-head attention: groups are its heads
        return
    cut, masked = copy.deepcopy(dense), copy.deepcopy(dense)
    saved = 0
    for axis in cuttable(dense, kind):
        drop = some_units(axis)
        saved += axis.price(dense) * len(drop)
        zero(masked, axis, drop)
        remove(cut, axis, drop)
    assert total_parameters(dense) - total_parameters(cut) == saved > 0
    torch.testing.assert_close(cut(IDS).logits, masked(IDS).logits, rtol=1e-4, atol=1e-4)
    assert (cut(IDS).logits - dense(IDS).logits).abs().max() > 0.1  # the cut was one that shows


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_uniform_cut_is_a_stock_checkpoint(family: str, kind: str, tmp_path: Path) -> None:
    model = tiny.model(family)
    try:
        check_kinds(model.config.model_type, (kind,))
    except BillhookError:
        assert family.startswith("opt") and kind in ("heads", "groups")
        return
    found = cuttable(model, kind)
    for axis in found:
        remove(model, axis, some_units(found[0]))
    update_config(model)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert type(again) is type(model)
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    assert checkpoint.stored_parameters(tmp_path) == total_parameters(model)
    tied = again.get_output_embeddings().weight is again.get_input_embeddings().weight
    assert tied == again.config.tie_word_embeddings
    greedy = [again.generate(IDS, max_new_tokens=12, do_sample=False, use_cache=cache) for cache in (True, False)]
    assert torch.equal(*greedy)
    assert checkpoint.verify(tmp_path, model)["cache_drift"] < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_axes_of_a_cut_model_are_found_again(family: str) -> None:
    model = tiny.model(family)
    before = {(axis.layer, axis.kind): axis.units for axis in axes(model, KINDS)}
    for axis in axes(model, ("groups", "ffn")):
        remove(model, axis, torch.tensor([0]))
    after = {(axis.layer, axis.kind): axis.units for axis in axes(model, KINDS)}
    for (layer, kind), units in before.items():
        group = 1 if family.startswith("opt") else 2
        assert after[layer, kind] == units - (group if kind == "heads" else 1)
    assert model(IDS).logits.isfinite().all()


def test_the_whole_decoder_is_counted() -> None:
    model = tiny.model("llama")
    rest = sum(p.numel() for name, p in model.named_parameters() if ".layers." not in name)
    assert decoder_parameters(model) + rest == total_parameters(model)
    assert len(layers(model)) == 3


def test_uneven_layers_are_refused_by_the_uniform_layout() -> None:
    model = tiny.model("llama")
    remove(model, axes(model, ("ffn",))[1], torch.tensor([3]))
    with pytest.raises(BillhookError, match=r"layer 1 has .*47.*equal layers"):
        update_config(model)


def test_a_stale_layer_index_shows_in_the_cache(tmp_path: Path) -> None:
    model = tiny.model("llama")
    model.save_pretrained(tmp_path)
    for layer in layers(model):
        layer.self_attn.layer_idx = 0
    assert checkpoint._cache_drift(model, IDS) > 100 * checkpoint._cache_tolerance(torch.float32)
