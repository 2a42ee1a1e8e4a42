"""Adapters beside gates: they leave no trace, merge to what they were, and close the units that matter least."""

from itertools import pairwise
from typing import Any

import pytest
import tiny
import torch

from billhook.models.axes import axes
from billhook.runtime.run import Run
from billhook.training import gating
from billhook.training.adapting import adapted, merge, updates
from billhook.training.gating import Course, Units
from billhook.training.lora_gates import Closing

COURSE = Course(steps=20, rows=2, seed=0, objective="nll")


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(tiny.tokens()).logits


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3"])
def test_adapters_add_nothing_at_first_and_leave_no_trace(family: str) -> None:
    model = tiny.model(family).eval()
    before, dense = {name: value.clone() for name, value in model.state_dict().items()}, logits(model)
    with adapted(model, 2, 0) as adapters:
        assert torch.equal(logits(model), dense)
        for adapter in adapters.values():
            adapter.module.b.data.normal_(std=0.1)
        learned, trained = updates(adapters), logits(model)
    assert torch.equal(logits(model), dense) and not torch.equal(trained, dense)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    merge(model, learned)
    assert torch.allclose(logits(model), trained, atol=1e-5)


def closing(drops: int = 20, steps: int = COURSE.steps, **other: Any) -> tuple[Any, Closing, Any]:
    model = tiny.model("llama").eval()
    units = Units.of(model, ("groups", "ffn"))
    opened = adapted(model, 4, 0)
    adapters = opened.__enter__()
    each = {(axis.layer, axis.kind): drops if axis.kind == "ffn" else 1 for axis in units.axes}
    return model, Closing(units, adapters, each, steps, 0.01, **other), opened


def test_the_importance_of_a_group_is_of_all_its_rows_and_columns() -> None:
    """Of its query heads' rows, its key's and its value's, and the columns of its query heads in the output."""
    model, learner, opened = closing()
    draw = torch.Generator().manual_seed(0)
    for path in learner.weights:
        form: Any = model.get_submodule(f"{path}.parametrizations.weight.0")
        for one in (form.a, form.b):
            one.data, one.grad = torch.randn(2, *one.shape, generator=draw)
    learner.follow(0)
    found = learner.units.split(learner.worth)[0, "groups"]
    attention, wanted = model.model.layers[0].self_attn, torch.zeros(2, dtype=torch.float64)
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        linear = getattr(attention, name)
        form = linear.parametrizations.weight[0]
        S = ((form.b.grad @ form.a + form.b @ form.a.grad - form.b.grad @ form.a.grad) * linear.weight).abs().double()
        S = S.T if name == "o_proj" else S
        each = S.reshape(2, -1).sum(1)  # two groups, contiguous
        wanted += (each / each.norm()).detach()
    opened.__exit__(None, None, None)
    assert torch.allclose(found, wanted)


@pytest.mark.parametrize("shuffled", [None, 0])
def test_units_close_one_after_another_and_stay_closed(shuffled: int | None) -> None:
    model, learner, opened = closing(shuffled=shuffled)
    masks, real = [], learner.gates

    def seen(step: int) -> torch.Tensor:
        masks.append(real(step))
        return masks[-1]

    learner.gates = seen  # type: ignore[method-assign]
    losses = gating.learn(model, learner.units, learner, (tiny.tokens(6, 16), None), COURSE, Run(), {})
    opened.__exit__(None, None, None)
    gone = [int((mask == 0).sum()) for mask in masks]
    assert gone[0] == 0 < gone[10] < gone[-1] == sum(learner.drops.values())
    assert all((after <= before).all() for before, after in pairwise(masks))
    counts = {place: int((part == 0).sum()) for place, part in learner.units.split(masks[-1]).items()}
    assert counts == learner.drops
    assert sum(losses[:4]) > sum(losses[6:10])  # it trains, as long as little is gone
    assert len(axes(model, ("ffn",))) == 3
