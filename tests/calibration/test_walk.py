"""The walk against hooks of the tests' own on full forward passes: every layer's sums are those of the model it
names."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest
import tiny
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from billhook.calibration.passage import Route
from billhook.calibration.walk import Layer, ReaderSums, walk
from billhook.choices import AXIS_STREAMS
from billhook.errors import BillhookError
from billhook.models.axes import Axis, axes
from billhook.models.families import layers
from billhook.models.surgery import remove
from billhook.runtime.run import Run

FAMILIES = ["llama", "llama_bias", "mistral_sliding", "qwen2_sliding", "qwen3", "opt", "opt_350m"]
KINDS = ("groups", "ffn")
IDS = tiny.tokens(windows=5, length=24)  # longer than the sliding windows of 8


def close(found: Tensor, expected: Tensor) -> bool:
    return bool((found - expected).norm() <= 1e-5 * expected.norm())


@torch.no_grad()
def activations(model: PreTrainedModel, ids: Tensor = IDS) -> tuple[dict[str, Tensor], list[Tensor]]:
    """What enters each reader, (tokens, in), and what leaves each layer, of a full forward of all windows at once."""
    entered, left = {}, []

    def enter(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _, args: entered.update({name: args[0].flatten(0, -2).double()})

    with ExitStack() as hooks:
        for axis in axes(model, KINDS):
            reader = model.get_submodule(axis.reader_module)
            hooks.callback(reader.register_forward_pre_hook(enter(axis.reader_module)).remove)
        for layer in layers(model):
            take = layer.register_forward_hook(lambda _, args, out: left.append(out.flatten(0, -2).double()))
            hooks.callback(take.remove)
        model(ids)
    return entered, left


def grams(model: PreTrainedModel, ids: Tensor = IDS) -> dict[str, Tensor]:
    return {name: x.T @ x for name, x in activations(model, ids)[0].items()}


def spoil(model: PreTrainedModel, found: list[Axis]) -> None:
    """What a method may do to a layer: cut every axis, and change what is left."""
    for axis in found:
        remove(model, axis, torch.tensor([0]))
    for param in layers(model)[found[0].layer].parameters():
        param.data.mul_(1.5)


def whole(layer: Layer) -> dict[str, ReaderSums]:
    return {name: fit + layer.held_out[name] if layer.held_out else fit for name, fit in layer.fit.items()}


def tapped(model: nn.Module) -> list[str]:
    """Modules that something still hangs on: a hook, or a forward that is not their class's."""
    return [
        name
        for name, module in model.named_modules()
        if "forward" in vars(module) or module._forward_hooks or module._forward_pre_hooks
    ]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_dense_stream_sees_the_untouched_model(family: str) -> None:
    model = tiny.model(family)
    expected = grams(model)
    for layer in walk(model, IDS, KINDS, Run(), Route(held_out=0.4)):
        names = {axis.reader_module for axis in layer.axes}
        assert names == layer.fit.keys() == layer.held_out.keys()
        for name, sums in whole(layer).items():
            assert sums.gram.dtype == torch.float64 and torch.equal(sums.gram, sums.gram.T)
            assert close(sums.gram, expected.pop(name)), name
        spoil(model, layer.axes)
    assert expected == {} and tapped(model) == []


@pytest.mark.parametrize("stream", ["sequential", "dense_target"])
@pytest.mark.parametrize("family", FAMILIES)
def test_other_streams_see_the_model_pruned_so_far(family: str, stream: str) -> None:
    model, reference = tiny.model(family), tiny.model(family)
    untouched, seen = grams(model), 0
    for layer in walk(model, IDS, KINDS, Run(), Route(stream=stream)):
        expected = grams(reference)
        for name, sums in whole(layer).items():
            assert close(sums.gram, expected[name]), name
            assert layer.number == 0 or not torch.allclose(sums.gram, untouched[name], rtol=1e-2)
            seen += 1
        spoil(model, layer.axes)
        spoil(reference, [axis for axis in axes(reference, KINDS) if axis.layer == layer.number])
    assert seen == 2 * len(layers(model)) and tapped(model) == []


@pytest.mark.parametrize("family", FAMILIES)
def test_the_dense_target_is_what_the_layer_lacks(family: str) -> None:
    model = tiny.model(family)
    dense = activations(model)[1]
    for layer in walk(model, IDS, KINDS, Run(), Route(stream="dense_target", held_out=0.4)):
        entered, left = activations(model)
        lack = dense[layer.number] - left[layer.number]
        for axis in layer.axes:
            sums = whole(layer)[axis.reader_module]
            if axis.kind == "groups" or family == "opt_350m":  # a norm or an FFN comes between it and the output
                assert sums.cross is None and sums.energy == 0
                continue
            assert sums.cross is not None
            expected = lack.T @ entered[axis.reader_module]
            assert (sums.cross - expected).norm() <= 1e-4 * expected.norm() + 1e-6
            assert sums.energy == pytest.approx(float(lack.square().sum()), rel=1e-4, abs=1e-6)
            assert layer.number == 0 or sums.energy > 1
        spoil(model, layer.axes)


def test_two_streams_are_one_until_a_cut() -> None:
    """What stands before the first cut runs once, and so do the layers that go; the sums are those of the layer."""
    model, counted = tiny.model("llama", num_hidden_layers=4), [0] * 4
    entered, left = activations(model)
    route = Route("dense_target", only={1}, dropped={2}, held_out=0.0)
    with ExitStack() as hooks:
        for n, module in enumerate(layers(model)):

            def count(*_: object, n: int = n) -> None:
                counted[n] += 1

            hooks.callback(module.register_forward_hook(count).remove)
        ((reader, sums),) = (pair for layer in walk(model, IDS, ("ffn",), Run(), route) for pair in layer.fit.items())
    assert counted == [2, 2, 2, 1]  # each is entered once before
    assert sums.cross is not None and close(sums.cross, (left[2] - left[1]).T @ entered[reader])


@pytest.mark.parametrize("family", ["mistral_sliding", "qwen2_sliding"])
def test_the_sliding_window_shows(family: str) -> None:
    model, wide = tiny.model(family), tiny.model(family)
    wide.config.sliding_window = 1000
    *_, narrow = walk(model, IDS, ("groups",), Run())
    *_, full = walk(wide, IDS, ("groups",), Run())
    assert not any(torch.allclose(narrow.fit[n].gram, full.fit[n].gram, rtol=1e-2) for n in narrow.fit)


@pytest.mark.parametrize("stream", AXIS_STREAMS)
@pytest.mark.parametrize("family", ["llama", "qwen2_sliding", "opt_350m"])
def test_the_batch_size_does_not_show(family: str, stream: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def sums(batch_tokens: int) -> Iterator[Tensor]:
        for module in ("passage", "gram"):
            monkeypatch.setattr(f"billhook.calibration.{module}.BATCH_TOKENS", batch_tokens)
        model = tiny.model(family)
        for layer in walk(model, IDS, KINDS, Run(), Route(stream=stream, held_out=0.4)):
            for _, evidence in (*sorted(layer.fit.items()), *sorted(layer.held_out.items())):
                yield evidence.gram
                if evidence.cross is not None and layer.number:  # the first layer lacks nothing
                    yield from (evidence.cross, torch.tensor(evidence.energy))
            spoil(model, layer.axes)

    for one, two, all_at_once in zip(sums(1), sums(48), sums(10_000), strict=True):
        assert close(one, all_at_once) and close(two, all_at_once)


@pytest.mark.parametrize("stream", AXIS_STREAMS)
def test_the_walk_builds_no_graph_and_leaves_gradients_on_outside(stream: str) -> None:
    for layer in walk(tiny.model("llama").requires_grad_(True), IDS, KINDS, Run(), Route(stream=stream)):
        assert torch.is_grad_enabled()
        assert not any(evidence.gram.requires_grad for evidence in whole(layer).values())


@pytest.mark.parametrize("stream", ["dense", "sequential"])
def test_held_out_windows_are_kept_apart(stream: str) -> None:
    model = tiny.model("llama")
    first, last = grams(model, IDS[:3]), grams(model, IDS[3:])
    for layer in walk(model, IDS, KINDS, Run(), Route(stream=stream, held_out=0.4)):
        assert all(close(sums.gram, first[name]) for name, sums in layer.fit.items())
        assert all(close(sums.gram, last[name]) for name, sums in layer.held_out.items())
    for layer in walk(model, IDS, KINDS, Run(), Route(stream=stream, held_out=0.0)):
        assert layer.held_out == {}
        assert all(close(sums.gram, first[name] + last[name]) for name, sums in layer.fit.items())


@pytest.mark.parametrize("stream", AXIS_STREAMS)
def test_nothing_hangs_on_a_model_that_was_left_early(stream: str) -> None:
    model = tiny.model("opt")
    before = model(IDS).logits
    walking = walk(model, IDS, KINDS, Run(), Route(stream=stream))
    next(walking)
    walking.close()
    assert tapped(model) == []
    with pytest.raises(KeyError):
        for layer in walk(model, IDS, KINDS, Run(), Route(stream=stream)):
            raise KeyError(layer.number)
    assert tapped(model) == []
    layers(model)[2].register_forward_pre_hook(_interrupt)
    with pytest.raises(KeyboardInterrupt):
        list(walk(model, IDS, KINDS, Run(), Route(stream=stream)))
    layers(model)[2]._forward_pre_hooks.clear()
    assert tapped(model) == [] and torch.equal(model(IDS).logits, before)


def _interrupt(_: nn.Module, args: tuple[Tensor, ...]) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("weight", [torch.inf, 1e38, 1e22])  # 1e22 overflows in the product, not in the activation
@pytest.mark.parametrize(("family", "path"), [("llama", "mlp.up_proj"), ("qwen3", "mlp.up_proj"), ("opt", "fc1")])
def test_what_overflows_is_refused_by_name(family: str, path: str, weight: float) -> None:
    model = tiny.model(family)
    layers(model)[1].get_submodule(path).weight.data[3] = weight
    reader = axes(model, ("ffn",))[1].reader_module
    with pytest.raises(BillhookError, match=rf"the input of {reader} is not finite"):
        list(walk(model, IDS, ("ffn",), Run()))
    assert tapped(model) == []


@pytest.mark.parametrize("share", [0.0, 0.4])
def test_a_lack_that_overflows_is_refused(share: float) -> None:
    model = tiny.model("llama")
    layers(model)[2].mlp.up_proj.weight.data.mul_(100)
    layers(model)[2].mlp.down_proj.weight.data[3] = 1e38  # of the last layer: no later Gram would show it
    with pytest.raises(BillhookError, match=r"layers\.2\.mlp\.down_proj"):
        list(walk(model, IDS, ("ffn",), Run(), Route(stream="dense_target", held_out=share)))


def test_a_held_out_overflow_is_refused_too() -> None:
    model = tiny.model("llama")
    ids = IDS.clone()
    ids[ids == 7], ids[-1, -1] = 8, 7
    model.get_input_embeddings().weight.data[7] = torch.nan
    with pytest.raises(BillhookError, match=r"layers\.0\.mlp\.down_proj is not finite"):
        list(walk(model, ids, ("ffn",), Run(), Route(held_out=0.4)))
