"""Sums of weight times gradient against autograd on whole gradients, and the identities that tie slots to one
another."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from billhook.calibration import gradients
from billhook.calibration.gradients import gradient_sums
from billhook.errors import BillhookError
from billhook.math.scores import fluctuation_columns, standardised
from billhook.math.taylor import (
    FROM_GRADIENTS,
    NEED_MEAN_GRADIENT,
    GradientSums,
    UnitSums,
    gate_fisher,
    taylor1_element,
)
from billhook.models.axes import Axis, Slot, axes
from billhook.models.experts import unfuse
from billhook.models.families import layers, row_of

IDS = tiny.tokens(windows=3, length=12)  # longer than the sliding windows of 8
FAMILIES = tiny.DENSE
ALL = ("ffn", "heads", "groups", "value")


def close(found: Tensor, expected: Tensor, relative: float = 1e-5) -> bool:
    return bool((found.double() - expected.double()).norm() <= relative * expected.double().norm() + 1e-12)


def loss_of(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Mean of -log p(next token), written out."""
    logits = model(ids[None]).logits[0].float().log_softmax(-1)
    return -logits[:-1].gather(1, ids[1:, None]).mean()


def whole_gradients(model: PreTrainedModel, names: set[str], ids: Tensor = IDS) -> list[dict[str, Tensor]]:
    """The gradient of each window's loss with respect to each named parameter, in full."""
    params = {name: model.get_parameter(name).requires_grad_() for name in sorted(names)}
    found = [torch.autograd.grad(loss_of(model, window), list(params.values())) for window in ids]
    model.requires_grad_(False)
    return [dict(zip(params, each, strict=True)) for each in found]


def of_unit(products: Tensor, slot: Slot, unit: int) -> Tensor:
    return products.index_select(slot.dim, slot.index[unit])


def brute(model: PreTrainedModel, slot: Slot, grads: list[dict[str, Tensor]]) -> UnitSums:
    """Every sum of one slot, unit by unit, from whole gradients."""
    weight, each = model.get_parameter(slot.param).double(), [grad[slot.param].double() for grad in grads]
    rows = []
    for unit in range(len(slot.index)):
        entries = torch.stack([of_unit(weight * g, slot, unit).flatten() for g in each])
        mean = of_unit(weight * torch.stack(each).sum(0), slot, unit)
        by_window = entries.sum(1)
        sums = by_window.sum(), by_window.abs().sum(), by_window.square().sum()
        rows.append(torch.stack([*sums, entries.abs().sum(), entries.square().sum(), mean.abs().sum()]))
    return UnitSums(*torch.stack(rows, 1))


def by_axis(model: PreTrainedModel, found: dict[tuple[int, str], GradientSums]) -> Iterator[tuple[Axis, GradientSums]]:
    for axis in axes(model, ALL):
        yield axis, found.pop((axis.layer, axis.kind))
    assert found == {}


def left_behind(model: PreTrainedModel) -> list[str]:
    return [name for name, p in model.named_parameters() if p.requires_grad or p.grad is not None or hooks_of(p)] + [
        name for name, m in model.named_modules() if m._forward_hooks or m._forward_pre_hooks or m._backward_hooks
    ]


def hooks_of(param: nn.Parameter) -> bool:
    return bool(getattr(param, "_post_accumulate_grad_hooks", None) or param._backward_hooks)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.covering(some={"family": 6})
def test_sums_are_those_of_whole_gradients(family: str) -> None:
    model = tiny.model(family)
    grads = whole_gradients(model, {slot.param for axis in axes(model, ALL) for slot in axis.slots})
    found = gradient_sums(model, IDS, ALL, mean_gradient=True)
    assert left_behind(model) == []
    for axis, sums in by_axis(model, found):
        assert sums.windows == len(IDS) and list(sums.writers) == [slot.param for slot in axis.writers]
        for slot, of_slot in zip(axis.slots, sums.slots, strict=True):
            for name, expected in vars(brute(model, slot, grads)).items():
                here = getattr(of_slot, name)
                assert here.shape == (axis.units,) and here.dtype == torch.float64
                # signed sums cancel: what they are short of is measured by what was added up
                scale = of_slot.element_absolute if name in ("signed", "absolute") else expected
                assert float((here - expected).norm()) <= 1e-5 * float(scale.norm()) + 1e-12, (slot.param, name)


@pytest.mark.parametrize("chunk", [1, 100, 1 << 15])
def test_the_chunk_does_not_show(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(gradients.CHUNK, "cpu", chunk)
    model = tiny.model("llama_bias")
    axis = axes(model, ("ffn",))[1]
    sums = gradient_sums(model, IDS, ("ffn",))[1, "ffn"]
    grads = whole_gradients(model, {axis.reader.param})
    assert close(sums.reader.element_squared, brute(model, axis.reader, grads).element_squared)


def together(sums: GradientSums, *, leaf: str) -> Tensor:
    """Signed sums of the weight and the bias of one writer."""
    return torch.stack([s.signed for name, s in sums.writers.items() if name.split(".")[-2] == leaf]).sum(0)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.covering(some={"family": 6})
def test_what_is_linear_in_the_reader_says_the_same_as_the_reader(family: str) -> None:
    model = tiny.model(family)
    for axis, sums in by_axis(model, gradient_sums(model, IDS, ALL)):
        scale = float(sums.reader.element_absolute.norm())
        if axis.kind == "ffn":  # up is linear, and ReLU homogeneous: both agree with what reads them
            leaf = list(sums.writers)[-1].split(".")[-2]  # gate comes before up
            linear = row_of(model).up[1:] or family.startswith("opt")
            assert float((together(sums, leaf=leaf) - sums.reader.signed).norm()) <= 1e-5 * scale or not linear
        if row_of(model).qkv:
            continue  # one matrix, whose sums are of all three
        if axis.kind in ("groups", "value"):
            assert float((together(sums, leaf="v_proj") - sums.reader.signed).norm()) <= 1e-5 * scale
        if axis.kind == "groups":
            q, k = together(sums, leaf="q_proj"), together(sums, leaf="k_proj")
            assert (
                float((q - k).norm()) <= 1e-5 * scale
            )  # the scores are bilinear in them; where a norm follows, both are 0
            assert float(q.norm()) <= 1e-3 * scale or family not in ("qwen3", "gemma3_text")


@contextmanager
def entering(model: PreTrainedModel, path: str, see: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """While open, `see` stands between what enters a module and the module."""
    hook = model.get_submodule(path).register_forward_pre_hook(lambda _, args: (see(args[0]), *args[1:]))
    yield
    hook.remove()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.covering(some={"family": 6})
def test_the_reader_s_sums_are_those_of_activations(family: str) -> None:
    model = tiny.model(family)
    for axis, sums in by_axis(model, gradient_sums(model, IDS[:1], ALL)):
        seen: list[Tensor] = []

        def see(x: Tensor, seen: list[Tensor] = seen) -> Tensor:
            seen.append(x.detach().requires_grad_())
            return seen[0]

        with entering(model, axis.reader_module, see):
            (grad,) = torch.autograd.grad(loss_of(model, IDS[0]), seen)
        expected = axis.pool((seen[0] * grad).double().flatten(0, -2).sum(0))
        assert close(sums.reader.signed, expected, 1e-4)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.covering(some={"family": 6})
def test_gate_fisher_is_that_of_an_explicit_gate(family: str) -> None:
    model = tiny.model(family)
    for axis, sums in by_axis(model, gradient_sums(model, IDS, ALL)):
        gate = torch.ones(axis.units, requires_grad=True)
        weight = model.get_parameter(axis.reader.param)
        spread = torch.zeros(weight.shape[axis.reader.dim], dtype=torch.long)
        spread[axis.reader.index] = torch.arange(axis.units)[:, None]
        with entering(model, axis.reader_module, lambda x, gate=gate, spread=spread: x * gate[spread]):
            slopes = torch.stack([torch.autograd.grad(loss_of(model, window), gate)[0] for window in IDS]).double()
        assert close(gate_fisher(sums), slopes.square().sum(0), 1e-4)
        assert close(FROM_GRADIENTS["gate_sensitivity"](sums), slopes.abs().sum(0), 1e-4)
        assert close(FROM_GRADIENTS["taylor1_vector"](sums.reader_only()), slopes.sum(0).abs(), 1e-3)


def test_scores_are_their_sums() -> None:
    model = tiny.model("llama_bias")
    axis = axes(model, ("groups",))[1]
    sums = gradient_sums(model, IDS, ("groups",), mean_gradient=True)[1, "groups"]
    slots = [brute(model, s, whole_gradients(model, {s.param})) for s in axis.slots]
    expected = {
        "taylor1_vector": sum(s.signed.abs() for s in slots),
        "taylor1_element": sum(s.mean_absolute for s in slots if s.mean_absolute is not None),
        "taylor1_window": sum(s.element_absolute for s in slots),
        "taylor2_element": sum(s.element_squared for s in slots),
        "taylor2_vector": sum(s.squared for s in slots),
        "gate_fisher": slots[-1].squared,
        "gate_sensitivity": slots[-1].absolute,
    }
    assert expected.keys() == FROM_GRADIENTS.keys() and FROM_GRADIENTS.keys() > NEED_MEAN_GRADIENT
    for name, score in FROM_GRADIENTS.items():
        found, wanted = score(sums), expected[name]
        assert isinstance(wanted, Tensor) and close(found, wanted, 1e-4) and bool((found >= 0).all()), name
        assert bool((score(sums.reader_only()) <= found).all())
    found = {name: score(sums) for name, score in FROM_GRADIENTS.items()}
    assert bool((found["taylor1_vector"] <= found["taylor1_element"] * (1 + 1e-6)).all())
    assert bool((found["taylor1_element"] <= found["taylor1_window"] * (1 + 1e-6)).all())


def test_windows_add_up() -> None:
    model = tiny.model("qwen2")
    apart = [gradient_sums(model, IDS[n : n + 1], ("ffn",)) for n in range(len(IDS))]
    for key, sums in gradient_sums(model, IDS, ("ffn",)).items():
        for whole, *parts in zip(sums.slots, *(each[key].slots for each in apart), strict=True):
            for name in ("signed", "absolute", "squared", "element_absolute", "element_squared"):
                assert close(getattr(whole, name), torch.stack([getattr(part, name) for part in parts]).sum(0))


def test_bfloat16_products_are_summed_exactly() -> None:
    model = tiny.model("llama").bfloat16()
    axis = axes(model, ("ffn",))[2]
    sums = gradient_sums(model, IDS, ("ffn",))[2, "ffn"]
    grads = whole_gradients(model, {axis.reader.param})
    assert close(sums.reader.squared, brute(model, axis.reader, grads).squared, 1e-6)
    assert model.get_parameter(axis.reader.param).dtype == torch.bfloat16


def test_no_two_gradients_are_held_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, held, real = tiny.model("llama"), [], gradients._reducer

    def watching(*args: Any) -> Callable[[Tensor], None]:
        reduce = real(*args)

        def watch(param: Tensor) -> None:
            held.append(sum(p.grad is not None for p in model.parameters()))
            reduce(param)

        return watch

    monkeypatch.setattr(gradients, "_reducer", watching)
    gradient_sums(model, IDS, ALL)
    params = {slot.param for axis in axes(model, ALL) for slot in axis.slots}
    assert held == [1] * len(params) * len(IDS)


@pytest.mark.parametrize("outside", [torch.no_grad, torch.enable_grad])
def test_the_model_is_left_as_it_came(outside: type) -> None:
    model = tiny.model("opt")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trained = model.get_parameter("model.decoder.layers.1.fc1.weight")
    embedding = model.get_input_embeddings().weight
    trained.requires_grad_(), embedding.requires_grad_()
    trained.grad, embedding.grad = torch.ones_like(trained), torch.ones_like(embedding)
    plain = gradient_sums(tiny.model("opt"), IDS, ("ffn",))
    with outside():
        sums = gradient_sums(model, IDS, ("ffn",))
    assert torch.equal(
        gate_fisher(sums[1, "ffn"]), gate_fisher(plain[1, "ffn"])
    )  # the gradient that was there adds nothing
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        n for n, p in model.named_parameters() if p is trained or p is embedding
    }
    assert torch.equal(trained.grad, torch.ones_like(trained)) and torch.equal(
        embedding.grad, torch.ones_like(embedding)
    )
    assert not any(map(hooks_of, model.parameters()))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(
        value.requires_grad
        for each in sums.values()
        for slot in each.slots
        for value in vars(slot).values()
        if value is not None
    )


def poison(_: nn.Module, __: object, out: Tensor) -> None:
    out.register_hook(lambda grad: grad * torch.inf)


def test_a_gradient_that_overflows_is_refused_by_name() -> None:
    model = tiny.model("llama")
    module = layers(model)[1].mlp.down_proj
    hook = module.register_forward_hook(poison)
    with pytest.raises(BillhookError, match=r"gradient of model\.layers\.1\.mlp\.down_proj\.weight is not finite"):
        gradient_sums(model, IDS, ("ffn",))
    hook.remove()
    assert left_behind(model) == []


def test_a_loss_that_overflows_is_refused_by_window() -> None:
    model = tiny.model("mistral")  # not tied: one embedding spoils no other window
    ids = IDS.clone()
    ids[ids == 7], ids[-1, 0] = 8, 7
    model.get_input_embeddings().weight.data[7] = torch.nan
    with pytest.raises(BillhookError, match="window 2 is not finite"):
        gradient_sums(model, ids, ALL)
    assert left_behind(model) == []


def test_nothing_is_left_behind_when_the_model_breaks() -> None:
    model = tiny.model("llama")
    with pytest.raises(IndexError):
        gradient_sums(model, torch.full((1, 4), 9999), ALL)
    assert left_behind(model) == []

    def stop(stage: str, done: int, total: int) -> None:
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        gradient_sums(model, IDS, ALL, tick=stop)
    assert left_behind(model) == []


@pytest.mark.parametrize("shape", [(0, 8), (3, 1), (2, 0)])
def test_windows_without_a_next_token_are_refused(shape: tuple[int, int]) -> None:
    with pytest.raises(BillhookError, match="windows of two tokens or more"):
        gradient_sums(tiny.model("llama"), torch.zeros(shape, dtype=torch.long), ("ffn",))


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(BillhookError, match="did you mean 'heads'"):
        gradient_sums(tiny.model("llama"), IDS, ("head",))


def test_the_mean_gradient_must_have_been_asked_for() -> None:
    sums = gradient_sums(tiny.model("llama"), IDS[:1], ("ffn",))[0, "ffn"]
    with pytest.raises(BillhookError, match="mean_gradient=True"):
        taylor1_element(sums)


def test_progress_is_told() -> None:
    told: list[tuple[str, int, int]] = []
    gradient_sums(tiny.model("llama"), IDS, ("ffn",), tick=lambda *step: told.append(step))
    assert told == [("gradients", n, 3) for n in range(4)]


def test_fluctuation_is_the_error_of_holding_an_input_at_its_mean() -> None:
    generator = torch.Generator().manual_seed(0)
    X, W = (torch.randn(shape, generator=generator, dtype=torch.float64) + 0.5 for shape in ((50, 6), (4, 6)))
    found = fluctuation_columns(W, X.var(0))
    for j in range(6):
        held = X.clone()
        held[:, j] = X[:, j].mean()
        assert float(found[j]) == pytest.approx(float(((X - held) @ W.T).square().sum()) / 49, rel=1e-12)


def test_standardised_scores_have_mean_zero_and_deviation_one() -> None:
    draw = torch.randn(40, generator=torch.Generator().manual_seed(0)).abs()
    found = standardised({0: draw, 1: 1e6 * draw[:20] + 7, 2: torch.ones(5), 3: torch.ones(1)})
    for n in (0, 1):
        assert float(found[n].mean()) == pytest.approx(0, abs=1e-12) and float(found[n].std()) == pytest.approx(1)
    assert torch.equal(found[0].argsort(), draw.argsort())
    assert not found[2].any() and not found[3].any()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.covering(some={"family": 6})
def test_layers_that_run_again_on_the_way_back_give_the_same(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.model(family)
    plain = gradient_sums(model, IDS, ("ffn",))
    calls = 0

    def counted(*args: Any) -> None:
        nonlocal calls
        calls += 1

    handle = layers(model)[0].register_forward_pre_hook(counted)
    monkeypatch.setattr(gradients, "_short_of_memory", lambda *_: True)
    again = gradient_sums(model, IDS, ("ffn",))
    handle.remove()
    assert calls >= len(IDS) and left_behind(model) == [] and "forward" not in layers(model)[0].__dict__
    for place, sums in plain.items():
        assert all(
            torch.equal(vars(a)["signed"], vars(b)["signed"])
            for a, b in zip(sums.slots, again[place].slots, strict=True)
        )


@pytest.mark.parametrize("family", tiny.STRUCTURES)
def test_gradients_that_do_not_fit_are_refused_before_the_work(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.model(family)
    unfuse(model)
    assert not gradients._short_of_memory(model, 12, 0)
    most = next(free for free in range(0, 10**8, 10**4) if _fits(model, free, monkeypatch))
    monkeypatch.setattr(gradients, "free_bytes", lambda device: most)
    assert gradients._short_of_memory(model, 12, 0)  # just enough for one layer at a time
    monkeypatch.setattr(gradients, "free_bytes", lambda device: 1000)
    with pytest.raises(BillhookError, match=r"gradients need about 0.0 GiB beside the model, and 0.0 GiB are free"):
        gradient_sums(model, IDS, ("ffn",))


def _fits(model: PreTrainedModel, free: int, monkeypatch: pytest.MonkeyPatch) -> bool:
    monkeypatch.setattr(gradients, "free_bytes", lambda device: free)
    try:
        gradients._short_of_memory(model, 12, 0)
    except BillhookError:
        return False
    return True
