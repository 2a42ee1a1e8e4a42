"""The laws, over every family and every axis: what is removed is what was zeroed, and nothing else changed."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers as T
from processes import stock
from transformers import AutoModelForCausalLM, PreTrainedModel

from billhook.checkpoints import load, save, verify
from billhook.errors import BillhookError
from billhook.models import layout
from billhook.models.axes import Axis, axes, refusal
from billhook.models.experts import unfuse
from billhook.models.families import Attention, as_output, attention, check_known, layers, row_of
from billhook.models.limits import check_kinds
from billhook.models.sizes import decoder_parameters, total_parameters
from billhook.models.surgery import cast, drop_layers, remove, without, zero

FAMILIES = list(tiny.CONFIGS)
NARROW = ("llama", "gemma2", "qwen3_moe", "gpt2", "bloom", "opt")  # in which what is slow elsewhere is seen
KINDS = ("ffn", "heads", "groups", "value", "expert_ffn", "shared")
IDS = tiny.tokens()
STOCK = """
import json, sys, torch
from transformers import AutoModelForCausalLM
for folder in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
    ids = torch.load(folder + "/ids.pt", weights_only=True)
    greedy = [model.generate(ids, max_new_tokens=8, do_sample=False, use_cache=cache) for cache in (True, False)]
    assert torch.equal(*greedy), folder
    torch.save(model(ids).logits, folder + "/logits.pt")
assert "billhook" not in sys.modules
"""


def opened(family: str) -> PreTrainedModel:
    """A tiny model as `checkpoint.open_model` hands it out."""
    model = tiny.model(family)
    unfuse(model)
    return model


def some_units(axis: Axis) -> torch.Tensor:
    """About half of the units, the same number from each block, never all."""
    per_block = axis.units // axis.blocks
    each = max(1, per_block // 2)
    generator = torch.Generator().manual_seed(sum(map(ord, axis.reader.param)))
    picks = [torch.randperm(per_block, generator=generator)[:each] + b * per_block for b in range(axis.blocks)]
    return torch.cat(picks).sort().values


def cuttable(model: torch.nn.Module, kind: str) -> list[Axis]:
    return [axis for axis in axes(model, (kind,)) if axis.units > axis.blocks]


def expected_whole(model: PreTrainedModel, kind: str) -> bool:
    """Whether a model rightly has nothing of a kind to give: refused, or one query head a group, or one group."""
    if refusal(model, kind, "per_layer"):
        return True
    now = attention(model, 0)
    return {"heads": now.group == 1, "groups": now.kv_heads == 1}.get(kind, False)


@pytest.mark.covering(first=tiny.has)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_removing_equals_zeroing_what_reads(family: str, kind: str) -> None:
    dense = opened(family)
    if not cuttable(dense, kind):
        assert expected_whole(dense, kind)
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
    before = dense(IDS).logits
    assert (cut(IDS).logits - before).abs().max() > 0.02 * before.abs().max()  # the cut was one that shows


def uneven(family: str, kind: str) -> PreTrainedModel:
    """A model whose layers differ: the first is whole, the second has lost half of the axis, the third one unit a
    block."""
    model = opened(family)
    for axis in cuttable(model, kind):
        one_a_block = torch.arange(axis.blocks) * (axis.units // axis.blocks)
        if axis.layer:
            remove(model, axis, some_units(axis) if axis.layer == 1 else one_a_block)
    return model


@pytest.mark.covering(first=tiny.has)
@pytest.mark.parametrize("kind", ("ffn", "heads", "groups", "experts"))
@pytest.mark.parametrize("family", FAMILIES)
def test_a_cut_that_is_tried_leaves_no_trace(family: str, kind: str) -> None:
    model, cut = opened(family), opened(family)
    before = {name: (id(param), param._version) for name, param in model.named_parameters()}
    dropped = [(axis, some_units(axis)) for axis in cuttable(model, kind)]
    for axis, units in dropped:
        remove(cut, axis, units)
    dense = model(IDS).logits
    with without(model, dropped):
        assert torch.equal(model(IDS).logits, cut(IDS).logits)
    assert torch.equal(model(IDS).logits, dense)
    assert before == {name: (id(param), param._version) for name, param in model.named_parameters()}


def even(family: str, kind: str) -> bool:
    """Whether a stock config can say that every layer has lost some."""
    said = kind == "ffn" and family != "bloom" if family in tiny.LAYER_NORM else kind != "value"
    return said and tiny.has(family, kind)


@pytest.mark.covering(first=even, some={"family": 6})
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_uniform_cut_is_a_stock_checkpoint(family: str, kind: str, tmp_path: Path) -> None:
    model = opened(family)
    try:
        check_kinds(model, (kind,))
    except BillhookError:
        assert kind == "value" or refusal(model, kind, "uniform")
        return
    found = cuttable(model, kind)
    if not found:
        assert expected_whole(model, kind)
        return
    for axis in found:
        remove(model, axis, some_units(found[0]))
    layout.update_config(model)
    save.save(model, tiny.tokenizer(), tmp_path, None)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert type(again) is type(model)
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    assert save.stored_parameters(tmp_path) == save.elements(model)
    tied = again.get_output_embeddings().weight is again.get_input_embeddings().weight
    assert tied == again.config.tie_word_embeddings
    greedy = [again.generate(IDS, max_new_tokens=6, do_sample=False, use_cache=cache) for cache in (True, False)]
    assert torch.equal(*greedy)
    assert verify.verify(tmp_path, model)["cache_drift"] < 1e-5


DENSE_KINDS = ("ffn", "heads", "groups", "value")  # a mixture's layers are cut alike


def saved_uneven(family: str, kind: str, folder: Path) -> PreTrainedModel:
    model = uneven(family, kind)
    assert layout.layout_of(model) == "per_layer"
    folder.mkdir()
    save.save(model, tiny.tokenizer(), folder, None)
    return model


@pytest.mark.covering(some={"family": 6})
@pytest.mark.parametrize(
    ("family", "kind"), [(family, kind) for family in tiny.DENSE for kind in DENSE_KINDS if tiny.has(family, kind)]
)
def test_a_per_layer_cut_loads_as_it_was(family: str, kind: str, tmp_path: Path) -> None:
    model = saved_uneven(family, kind, tmp_path / "out")
    assert verify.verify(tmp_path / "out", model)["cache_drift"] < 1e-5
    assert layout.layer_sizes(load.load(tmp_path / "out")) == layout.layer_sizes(model)


@pytest.mark.parametrize(
    "families",
    [
        pytest.param(("llama", "phi3", "gpt2", "bloom", "opt"), id="some"),
        pytest.param(tuple(tiny.DENSE), id="all", marks=pytest.mark.whole),
    ],
)
def test_a_per_layer_cut_loads_without_billhook(families: tuple[str, ...], tmp_path: Path) -> None:
    """In stock transformers, a process of its own: one kind of each family, and all of LLaMA."""
    saved = {}
    for number, family in enumerate(families):
        kinds = [kind for kind in DENSE_KINDS if tiny.has(family, kind)]
        for kind in kinds if family == "llama" else kinds[number % len(kinds) :][:1]:
            folder = tmp_path / f"{family}_{kind}"
            saved[folder] = saved_uneven(family, kind, folder)(IDS).logits
            torch.save(IDS, folder / "ids.pt")
    assert {folder.name.rpartition("_")[2] for folder in saved} == {*DENSE_KINDS}
    done = stock(STOCK, [*map(str, saved)])
    assert done.returncode == 0, done.stderr
    for folder, logits in saved.items():
        assert torch.equal(torch.load(folder / "logits.pt", weights_only=True), logits), folder


@pytest.mark.parametrize("family", ["llama", "qwen3", "opt"])
def test_a_per_layer_checkpoint_can_be_cut_again(family: str, tmp_path: Path) -> None:
    save.save(uneven(family, "ffn"), tiny.tokenizer(), tmp_path, None)
    opened = load.open_model(str(tmp_path))
    for axis in axes(opened.model, ("value", "ffn")):
        remove(opened.model, axis, torch.arange(axis.blocks) * (axis.units // axis.blocks))
    second = tmp_path / "again"
    second.mkdir()
    save.save(opened.model, opened.tokenizer, second, tmp_path)
    verify.verify(second, opened.model)
    whole = {a.layer: a.units for a in axes(opened.model, ("ffn",))}
    for axis in axes(opened.model, ("ffn",)):  # as wide as the narrowest, and with whole value heads: stock again
        remove(opened.model, axis, torch.arange(axis.units - min(whole.values())))
    narrow = [a for a in axes(opened.model, ("value",)) if a.units]
    assert layout.layout_of(opened.model) == "per_layer" and narrow


def test_a_model_that_has_become_even_is_stock_again(tmp_path: Path) -> None:
    save.save(uneven("llama", "ffn"), tiny.tokenizer(), tmp_path, None)
    model = load.load(tmp_path)
    least = min(axis.units for axis in axes(model, ("ffn",)))
    for axis in axes(model, ("ffn",)):
        remove(model, axis, torch.arange(axis.units - least))
    even = tmp_path / "even"
    even.mkdir()
    save.save(model, tiny.tokenizer(), even, None)
    config = json.loads((even / "config.json").read_text())
    assert config["model_type"] == "llama" and "auto_map" not in config and "per_layer_config" not in config
    stock = AutoModelForCausalLM.from_pretrained(even, dtype=torch.float32)
    assert type(stock).__name__ == "LlamaForCausalLM" and torch.equal(stock(IDS).logits, model(IDS).logits)


def test_heads_that_its_own_config_refuses_are_held_by_the_stand_in(tmp_path: Path) -> None:
    """hidden_size 32 with 3 heads of 8: LlamaConfig says no since transformers 5.4, Mistral computes the same."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny.CONFIGS["llama"](num_key_value_heads=4)).eval().requires_grad_(False)
    for axis in axes(model, ("groups",)):
        remove(model, axis, torch.tensor([1]))
    layout.update_config(model)
    save.save(model, tiny.tokenizer(), tmp_path, None)
    assert verify.verify(tmp_path, model)["logits"] == "equal"
    assert type(load.load(tmp_path)).__name__ == "MistralForCausalLM"


@pytest.mark.covering(some={"family": 6})
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("gone", [(1,), (0, 2)])
def test_dropping_layers_equals_skipping_them(family: str, gone: tuple[int, ...], tmp_path: Path) -> None:
    model, skipping = tiny.model(family), tiny.model(family)
    if family in tiny.HYBRIDS and 0 in gone:
        with pytest.raises(
            BillhookError, match=r"all layers of type (linear_attention|conv|sliding_attention|full_attention) would go"
        ):
            drop_layers(model, gone)
        return
    for n in gone:
        layers(skipping)[n].forward = lambda hidden_states, *_, **__: as_output(skipping, hidden_states)
    drop_layers(model, gone)
    rounding = 1e-5 if row_of(model).by_layer else 0.0  # a product of another size is summed in another order
    torch.testing.assert_close(model(IDS).logits, skipping(IDS).logits, rtol=rounding, atol=rounding)
    assert len(layers(model)) == 3 - len(gone)
    save.save(model, tiny.tokenizer(), tmp_path, None)
    assert verify.verify(tmp_path, model)["cache_drift"] < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.covering(some={"family": 6})
def test_axes_of_a_cut_model_are_found_again(family: str) -> None:
    model = opened(family)
    before = {(axis.layer, axis.kind): axis.units for axis in axes(model, ("ffn", "heads", "groups", "value"))}
    now = Attention(1, 1, 1, 1, 1) if family in tiny.ONLY_FFNS else attention(model, 0)
    for axis in cuttable(model, "groups") + cuttable(model, "ffn"):
        remove(model, axis, torch.tensor([0]))
    after = {(axis.layer, axis.kind): axis.units for axis in axes(model)}
    gone = {"ffn": 1, "groups": 1, "heads": now.group, "value": now.head_dim}
    for (layer, kind), units in before.items():
        assert after[layer, kind] == units - (gone[kind] if kind == "ffn" or cuttable(opened(family), "groups") else 0)
    assert model(IDS).logits.isfinite().all()


def test_what_no_row_speaks_of_is_refused() -> None:
    """A setting of GPT-2's config gives its layers a second attention, which no axis would cut."""
    for family in FAMILIES:
        check_known(opened(family))
    strange = AutoModelForCausalLM.from_config(T.GPT2Config(n_embd=32, n_head=4, n_layer=1, add_cross_attention=True))
    with pytest.raises(
        BillhookError, match=r"transformer.h.0.crossattention.c_attn.weight is nothing that billhook knows"
    ):
        check_known(strange)


def test_the_whole_decoder_is_counted() -> None:
    model = tiny.model("llama")
    rest = sum(p.numel() for name, p in model.named_parameters() if ".layers." not in name)
    assert decoder_parameters(model) + rest == total_parameters(model)
    assert len(layers(model)) == 3


def test_uneven_layers_are_refused_by_the_uniform_layout() -> None:
    model = tiny.model("llama")
    remove(model, axes(model, ("ffn",))[1], torch.tensor([3]))
    with pytest.raises(BillhookError, match=r"layer 1 has .*47.*equal layers.*--layout per_layer"):
        layout.update_config(model)


def stale(model: T.PreTrainedModel, last: bool) -> None:
    """The last layer, or each, takes the first one's place in the cache."""
    for layer in list(layers(model))[-1 if last else 0 :]:
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = 0


@pytest.mark.parametrize(
    ("family", "dtype"),
    [
        pytest.param(family, dtype, marks=[] if dtype == "bfloat16" and family in NARROW else pytest.mark.slow)
        for family in tiny.CONFIGS
        for dtype in ("float32", "bfloat16", "float16")
    ],
)
def test_a_stale_layer_index_is_refused_and_a_right_model_is_not(
    family: str, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rounding in half precision is as large as the fault is in some models: it must not count."""
    model = tiny.model(family)
    cast(model, getattr(torch, dtype))
    save.save(model, tiny.tokenizer(), tmp_path, None)
    assert verify.verify(tmp_path, model)["cache_drift"] < verify.CACHE_TOLERANCE / 10
    honest = verify.load
    for last in (True, False):

        def spoiled(*given: Any, last: bool = last, **how: Any) -> Any:
            found = honest(*given, **how)
            stale(found, last)
            return found

        monkeypatch.setattr(verify, "load", spoiled)
        with pytest.raises(
            BillhookError, match=r"did not survive reloading: (logits with and without|with a cache it)"
        ):
            verify.verify(tmp_path, model)
