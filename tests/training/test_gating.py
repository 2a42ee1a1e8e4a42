"""Gates on a model: what they do to it, how they are learned, and that a killed run ends in the same bits."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from cut_off import cut_off
from transformers import PreTrainedModel

from billhook.errors import BillhookError
from billhook.math import gates
from billhook.models.axes import axes
from billhook.models.surgery import remove
from billhook.runtime.run import Run
from billhook.training import gating
from billhook.training.frozen_gates import Chosen, Scales
from billhook.training.gating import Course, Learner, Units, fold, gated, lessons

COURSE = Course(steps=20, rows=1, seed=0)


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(tiny.tokens()).logits


def scattered(units: Units, seed: int = 0) -> torch.Tensor:
    return torch.rand(len(units.prices), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.covering(some={"family": 3})
@pytest.mark.parametrize("family", tiny.STRUCTURES)
@pytest.mark.parametrize("kinds", [("ffn",), ("groups", "ffn")])
def test_gates_of_one_change_no_bit_and_of_zero_cut(family: str, kinds: tuple[str, ...]) -> None:
    model = tiny.model(family)
    kinds = tuple(kind for kind in kinds if tiny.has(family, kind))
    units, dense = Units.of(model, kinds), logits(model)
    with gated(model, units, torch.ones_like(units.prices)):
        assert torch.equal(logits(model), dense)
    mask = (scattered(units) < 0.7).double()
    mask[[0, -1]] = 1.0
    with gated(model, units, mask):
        silenced = logits(model)
    assert torch.equal(logits(model), dense) and not torch.equal(silenced, dense)
    for kind in kinds:
        for axis in axes(model, (kind,)):
            remove(model, axis, (units.split(mask)[axis.layer, kind] == 0).nonzero().flatten())
    assert torch.allclose(logits(model), silenced, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_scales_are_folded_into_readers(family: str) -> None:
    model = tiny.model(family)
    units = Units.of(model, ("groups", "ffn"))
    with gated(model, units, scattered(units)):
        scaled = logits(model)
    fold(model, units.split(scattered(units)))
    assert torch.allclose(logits(model), scaled, atol=1e-5)


def test_a_goal_is_what_a_plan_keeps() -> None:
    model = tiny.model("llama")
    units = Units.of(model, ("groups", "ffn"))
    drops = {(0, "ffn"): 8, (1, "groups"): 1}
    together, apart = units.goal(drops, apart=False), units.goal(drops, apart=True)
    price = {axis.kind: axis.price(model) for axis in units.axes}
    assert float(together.budget) == units.prices.sum() - 8 * price["ffn"] - price["groups"] == apart.budget.sum()
    assert len(apart.budget) == len(units.axes) and float(apart.budget[1]) == 40 * price["ffn"]


def uneven() -> PreTrainedModel:
    """A model of whose layers one matters far more than the others, which ranks within layers do not show."""
    model = tiny.model("llama").eval().requires_grad_(False)
    for n, factor in enumerate((0.01, 8, 0.01)):
        model.model.layers[n].mlp.down_proj.weight.data *= factor
    return model


def learned(folder: Path, course: Course = COURSE, **other: Any) -> tuple[Learner, list[float]]:
    model, run = uneven(), other.pop("run", Run())
    units = Units.of(model, ("ffn",))
    goal = units.goal({(n, "ffn"): 16 for n in range(3)}, apart=False)
    learner = other.pop("learner", None) or Chosen(
        gates.by_rank(units.prices), goal, "annealed", rate=0.1, steps=course.steps
    )
    before = {name: value.clone() for name, value in model.state_dict().items()}
    tokens = tiny.tokens(6, 16)
    read = tokens, lessons(model, tokens, folder / "lessons", Run())
    losses = gating.learn(model, units, learner, read, course, run, {})
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(weight.requires_grad for weight in model.parameters())
    return learner, losses


@pytest.mark.parametrize("way", ["annealed", "straight-through"])
def test_what_matters_is_kept(way: str, tmp_path: Path) -> None:
    units = Units.of(uneven(), ("ffn",))
    goal = units.goal({(n, "ffn"): 16 for n in range(3)}, apart=False)
    start = torch.cat([gates.by_rank(torch.arange(48.0))] * 3)
    learner, losses = learned(tmp_path, learner=Chosen(start, goal, way, rate=0.2, steps=COURSE.steps))
    assert isinstance(learner, Chosen)
    kept = units.split(gates.hard(learner.z, goal))
    assert kept[1, "ffn"].sum() > 40 > 32 > max(kept[0, "ffn"].sum(), kept[2, "ffn"].sum())
    assert sum(losses[-6:]) < 0.6 * sum(losses[:6])


def test_a_killed_run_ends_in_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, losses = learned(tmp_path)
    run = Run(folder=tmp_path / "run")

    done = cut_off(monkeypatch, 19)
    with pytest.raises(KeyboardInterrupt):
        learned(tmp_path, run=run)
    again, told = learned(tmp_path, run=run)
    assert done[0] == 19 + 4  # of 20 steps 16 were kept
    assert told == losses
    pairs = zip(again.state_dict().values(), whole.state_dict().values(), strict=True)
    assert all(torch.equal(*pair) for pair in pairs)
    assert learned(tmp_path, run=run)[1] == losses and done[0] == 23  # what is done is not done again


def test_what_is_no_number_is_refused(tmp_path: Path) -> None:
    class Broken(Scales):
        def gates(self, step: int) -> torch.Tensor:
            return super().gates(step) * float("nan")

    with pytest.raises(BillhookError, match="the loss of step 0 is not finite: try --dtype float32, or a lower --rate"):
        learned(tmp_path, learner=Broken(torch.ones(144, dtype=torch.float64)))


def test_scales_of_what_is_gone_stay_out_and_others_lower_the_loss(tmp_path: Path) -> None:
    mask = torch.ones(144, dtype=torch.float64)
    mask[48:96:2] = 0.0
    learner, losses = learned(tmp_path, replace(COURSE, steps=60), learner=Scales(mask))
    assert torch.equal(learner.gates(0)[mask == 0], torch.zeros(24, dtype=torch.float64))
    assert sum(losses[-6:]) < sum(losses[:6])
