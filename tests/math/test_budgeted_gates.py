"""Gates that keep a budget: exactly, with the gradient that says so, and 0 or 1 in the end."""

import pytest
import torch

from billhook.math import gates
from billhook.math.gates import Goal


def goal(groups: int = 1, share: float = 0.7, units: int = 24) -> Goal:
    draw = torch.Generator().manual_seed(groups)
    prices = torch.randint(1, 9, (units,), generator=draw).double()
    group = torch.arange(units) % groups
    whole = Goal(prices, group, torch.zeros(groups, dtype=torch.float64)).kept(torch.ones(units, dtype=torch.float64))
    return Goal(prices, group, share * whole)


def numbers(units: int = 24) -> torch.Tensor:
    return torch.randn(units, generator=torch.Generator().manual_seed(7), dtype=torch.float64)


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("heat", [2.0, 0.05])
def test_soft_gates_keep_the_budget_and_so_does_their_gradient(groups: int, heat: float) -> None:
    asked, z = goal(groups), numbers().requires_grad_()
    found = gates.soft(z, asked, heat)
    assert torch.allclose(asked.kept(found), asked.budget, rtol=1e-9)
    assert torch.autograd.gradcheck(lambda one: gates.soft(one, asked, heat), (z,), atol=1e-5)
    towards = torch.randn(24, dtype=torch.float64)
    (grad,) = torch.autograd.grad((found * asked.prices).sum(), z)  # what is kept does not change, wherever z goes
    assert grad.abs().max() < 1e-9 < torch.autograd.grad((gates.soft(z, asked, heat) * towards).sum(), z)[0].abs().max()


def test_cold_gates_are_the_largest_within_the_budget() -> None:
    asked, z = goal(2), numbers()
    chosen = gates.hard(z, asked)
    assert set(chosen.tolist()) == {0.0, 1.0} and (asked.kept(chosen) <= asked.budget).all()
    for number in range(2):
        own = asked.group == number
        gone = own & (chosen == 0)
        assert z[own & (chosen == 1)].min() > z[gone].max()
        assert asked.kept(chosen)[number] + asked.prices[gone][z[gone].argmax()] > asked.budget[number]
    cold = gates.soft(z, asked, 1e-4)
    assert ((cold - chosen).abs() > 0.01).sum() <= 2  # one unit of each group is split


@pytest.mark.parametrize("k", [1, 7, 23])
def test_soft_top_k_sums_to_k_and_is_the_top_k_when_cold(k: int) -> None:
    even = Goal(torch.ones(24).double(), torch.zeros(24).long(), torch.tensor([float(k)], dtype=torch.float64))
    z = numbers().requires_grad_()
    assert gates.soft(z, even, 1.0).sum().item() == pytest.approx(k, rel=1e-9)
    found, wanted = (
        gates.top(z, even, 1.0, reopen=False),
        torch.zeros(24).double().index_fill(0, z.topk(k).indices, 1.0),
    )
    assert torch.equal((found > 0).double(), wanted)
    assert torch.equal(found[wanted == 1], gates.soft(z, even, 1.0)[wanted == 1])
    assert torch.autograd.gradcheck(lambda one: gates.top(one, even, 0.7, reopen=False), (z,), atol=1e-5)
    assert (gates.top(z, even, 1e-4, reopen=True) - wanted).abs().max() < 1e-9
    again, towards = gates.top(z, even, 1.0, reopen=True), torch.arange(24, dtype=torch.float64)
    grads = [torch.autograd.grad((one * towards).sum(), z)[0] for one in (again, gates.soft(z, even, 1.0))]
    assert torch.equal(again, found) and torch.allclose(grads[0], grads[1])


def test_straight_through_is_hard_with_the_soft_gradient() -> None:
    asked, z = goal(), numbers().requires_grad_()
    towards = torch.arange(24, dtype=torch.float64)
    found = gates.straight_through(z, asked, 0.5)
    assert torch.allclose(found, gates.hard(z, asked), atol=1e-15)
    grads = [torch.autograd.grad((one * towards).sum(), z)[0] for one in (found, gates.soft(z, asked, 0.5))]
    assert torch.equal(*grads)


def test_axes_start_alike_whatever_their_scores() -> None:
    scores = torch.tensor([1e9, 0.0, 3.0, 2.0, 1e-30])
    first, second = gates.by_rank(scores), gates.by_rank(scores.float().log1p() * 1e-6)
    assert torch.equal(first.argsort(), scores.argsort()) and torch.equal(first, second)
    assert abs(float(first.sum())) < 1e-12
