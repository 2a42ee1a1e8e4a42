"""What one pass over a pool leaves, against whole gradients; every metric of every mixture from it, against the
formulas."""

from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import tiny
import torch
from test_gradients import close, left_behind, of_unit, whole_gradients
from torch import Tensor

from billhook.calibration.gradients import gradient_sums
from billhook.errors import BillhookError
from billhook.math.taylor import FROM_GRADIENTS, GradientSums
from billhook.models.axes import Slot, axes
from billhook.search.evidence import evidence
from billhook.search.metrics import (
    LLM_PRUNER,
    REDUCTIONS,
    TERMS,
    PoolEvidence,
    Solution,
    known_metrics,
    mixtures,
    scores,
    shares,
)

IDS = tiny.tokens(windows=5, length=12)
CLUSTERS = torch.tensor([0, 1, 0, 1, 1])
KINDS = ("ffn", "groups")
ROUNDED = 5e-3  # of what was summed from bfloat16


@cache
def found(name: str = "llama") -> PoolEvidence:
    return evidence(tiny.model(name), IDS, CLUSTERS, KINDS)


@pytest.mark.parametrize("name", tiny.DENSE)
@pytest.mark.covering(some={"name": 3})
def test_every_sum_is_that_of_whole_gradients(name: str) -> None:
    model, seen = tiny.model(name), found(name)
    every = {slot.param for axis in axes(model, KINDS) for slot in axis.slots}
    grads = whole_gradients(model, every, IDS)
    for axis in axes(model, KINDS):
        own = seen.units[axis.layer, axis.kind]
        for s, slot in enumerate(axis.slots):
            weight = model.get_parameter(slot.param).double()
            for unit in (0, axis.units - 1):
                products = torch.stack([of_unit(weight * g[slot.param].double(), slot, unit).flatten() for g in grads])
                apart = own.signed[s, :, unit] - products.sum(1)  # a norm after the writer makes the sum 0
                assert apart.norm() <= 1e-6 * products.abs().sum(1).norm()
                assert close(own.absolute[s, :, unit], products.abs().sum(1))
                assert close(own.squared[s, :, unit], products.square().sum(1))
                assert close(own.magnitude[s, unit], of_unit(weight, slot, unit).square().sum())
    assert left_behind(model) == []


@pytest.mark.parametrize("name", ["llama", "qwen3", "opt"])
def test_what_writes_and_what_reads_a_unit_say_the_same(name: str) -> None:
    """sum_i w g of a unit is what dL/d(gate) says, wherever the gate sits: A_up = A_down, A_v = A_o."""
    model, seen = tiny.model(name), found(name)
    for axis in axes(model, KINDS):
        own = seen.units[axis.layer, axis.kind].signed
        linear = [s for s, slot in enumerate(axis.slots) if any(part in slot.param for part in ("up_proj", "v_proj"))]
        if linear:  # weights and biases of one projection together: both are scaled by the gate
            assert close(own[linear].sum(0), own[-1], 1e-4)


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_queries_and_keys_say_the_same(name: str) -> None:
    """A score is linear in both, so scaling a group's queries is scaling its keys: A_q = A_k, where neither has a bias
    or a norm."""
    model, seen = tiny.model(name), found(name)
    for axis in axes(model, ("groups",)):
        own = seen.units[axis.layer, "groups"].signed
        q, k = (next(s for s, slot in enumerate(axis.slots) if part in slot.param) for part in ("q_proj", "k_proj"))
        assert own[q].abs().max() > 0 and close(own[q], own[k], 1e-3)


@pytest.mark.parametrize("levels", mixtures(2))
def test_a_mixture_of_clusters_is_the_gradient_of_their_batch(levels: tuple[int, ...]) -> None:
    """Windows weigh what their cluster does: first order after summing, and both orders, as LLM-Pruner has them."""
    model, seen = tiny.model("llama"), found()
    pi = shares(CLUSTERS, Solution(levels)).double()
    grads = whole_gradients(model, {slot.param for axis in axes(model, KINDS) for slot in axis.slots}, IDS)
    number = mixtures(2).index(levels)
    for axis in axes(model, KINDS):
        own = seen.units[axis.layer, axis.kind]
        for s, slot in enumerate(axis.slots):
            weight = model.get_parameter(slot.param).double()
            linear = weight * sum(p * g[slot.param].double() for p, g in zip(pi, grads, strict=True))
            square = weight.square() * sum(p * g[slot.param].double().square() for p, g in zip(pi, grads, strict=True))
            assert close(own.first[number, s], per_unit(linear.abs(), slot), ROUNDED)
            assert close(own.mixed[number, s], per_unit((linear - square / 2).abs(), slot), ROUNDED)


def per_unit(entries: Tensor, slot: Slot) -> Tensor:
    return torch.stack([of_unit(entries, slot, unit).sum() for unit in range(len(slot.index))])


@pytest.mark.parametrize(
    ("term", "known"),
    [
        ("vectorize", "taylor1_vector"),
        ("param_first", "taylor1_element"),
        ("param_second", "taylor2_element"),
        ("window_first", "taylor1_window"),
        ("gate_fisher", "gate_fisher"),
    ],
)
def test_terms_are_the_scores_they_are_named_after(term: str, known: str) -> None:
    sums = gradient_sums(tiny.model("llama"), IDS, KINDS, mean_gradient=True)
    said = scores(found(), known_metrics(2)[term])
    for place, each in sums.items():
        want = FROM_GRADIENTS[known](each)
        assert close(said[place], want / want.mean(), ROUNDED if term == "param_first" else 1e-4)


def test_a_subset_of_windows_is_as_if_the_others_were_not_there() -> None:
    model, some = tiny.model("llama"), Solution((1, 1), count=3, draw=7, coefficients={"param_second": 1.0})
    drawn = shares(CLUSTERS, some).nonzero().flatten()
    assert len(drawn) == 3
    sums: dict[tuple[int, str], GradientSums] = gradient_sums(model, IDS[drawn], KINDS)
    for place, found_there in scores(found(), some).items():
        want = FROM_GRADIENTS["taylor2_element"](sums[place])
        assert close(found_there, want / want.mean(), 1e-4)


def test_a_draw_takes_from_clusters_that_are_on() -> None:
    pi = shares(CLUSTERS, Solution((0, 1), count=2, draw=1))
    assert pi.sum() == 1 and (pi > 0).sum() == 2 and not pi[CLUSTERS == 0].any()
    assert torch.equal(shares(CLUSTERS, Solution((0, 1), count=9)), shares(CLUSTERS, Solution((0, 1))))


def test_mixtures_are_in_lowest_terms() -> None:
    every = [shares(torch.arange(4), Solution(each)) for each in mixtures(4)]
    assert len({tuple(pi.tolist()) for pi in every}) == len(every)
    assert mixtures(5) == [each for each in mixtures(5) if max(each) == 1] and len(mixtures(8)) == 255


@pytest.mark.parametrize("reduction", list(REDUCTIONS))
@pytest.mark.parametrize("term", list(TERMS))
def test_a_metric_alone_orders_units_as_its_formula_does_whatever_the_power(term: str, reduction: str) -> None:
    seen = found()
    plain = Solution((1, 2), coefficients={term: 0.3}, reduction=reduction)
    pi = shares(CLUSTERS, plain)
    for place, values in scores(seen, plain).items():
        raw = REDUCTIONS[reduction](TERMS[term][0](seen.units[place], pi, mixtures(2).index((1, 2))))
        assert close(values, 0.3 * raw.double() / raw.double().mean())
        for other in (replace(plain, power=0.5), replace(plain, within=False)):
            assert torch.equal(scores(seen, other)[place].argsort(stable=True), values.argsort(stable=True))


def test_llm_pruners_metrics_are_points() -> None:
    known = known_metrics(3)
    assert set(LLM_PRUNER) <= set(known) and all(sum(one.coefficients.values()) == 1 for one in known.values())


def test_evidence_is_kept_and_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.model("llama")
    first = evidence(model, IDS, CLUSTERS, KINDS, folder=tmp_path)
    (file,) = tmp_path.iterdir()
    monkeypatch.setattr("billhook.search.evidence._measured", None)
    again = evidence(model, IDS, CLUSTERS, KINDS, folder=tmp_path)
    for place, own in first.units.items():
        assert all(torch.equal(value, vars(again.units[place])[name]) for name, value in vars(own).items())
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(BillhookError, match="delete it"):
        evidence(model, IDS, CLUSTERS, KINDS, folder=tmp_path)
