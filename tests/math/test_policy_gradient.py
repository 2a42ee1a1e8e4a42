"""Policy gradients: the score by enumeration, the projection on its budget, what is learned."""

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from billhook.math import policy
from billhook.math.policy import Goal, Learning, Prices, State, advantages, gradient, learned, project

S = torch.tensor([0.3, 0.6, 0.85], dtype=torch.float64)
MASKS = torch.tensor(list(itertools.product([0.0, 1.0], repeat=3)), dtype=torch.float64)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def loss(mask: Tensor) -> float:
    """Of any three units, not a sum of their parts."""
    a, b, c = mask.tolist()
    return 1.7 - 0.9 * a + 0.4 * b * c - 0.6 * a * c + 0.2 * b


def chance(mask: Tensor, s: Tensor = S) -> float:
    return float((s * mask + (1 - s) * (1 - mask)).prod())


def expected(s: Tensor) -> Tensor:
    return torch.stack([(s * mask + (1 - s) * (1 - mask)).prod() * loss(mask) for mask in MASKS]).sum()


def true_gradient() -> Tensor:
    s = S.clone().requires_grad_(True)
    expected(s).backward()
    assert s.grad is not None
    return s.grad


def mean_estimate(count: int, exact: bool, **other: Any) -> Tensor:
    """The mean of what `count` masks estimate, by enumeration of all that may be drawn."""
    total = torch.zeros(3, dtype=torch.float64)
    for drawn in itertools.product(range(8), repeat=count):
        masks = MASKS[list(drawn)]
        losses = torch.tensor([loss(mask) for mask in masks], dtype=torch.float64)
        weight = torch.tensor([chance(mask) for mask in masks], dtype=torch.float64).prod()
        total += weight * gradient(S, masks, losses, exact=exact, **other)
    return total


@pytest.mark.parametrize("count", [2, 3])
def test_by_enumeration_the_exact_score_has_no_bias(count: int) -> None:
    assert torch.allclose(mean_estimate(count, exact=True), true_gradient(), atol=1e-12)


def test_the_published_score_is_the_exact_one_times_a_root() -> None:
    assert torch.allclose(mean_estimate(2, exact=False), true_gradient() * (S * (1 - S)).sqrt(), atol=1e-6)


def test_a_moving_average_that_is_known_beforehand_has_no_bias_but_its_factor() -> None:
    # as published the sum of K masks is divided by K - 1
    assert torch.allclose(mean_estimate(3, exact=True, average=1.1), true_gradient() * 3 / 2, atol=1e-12)


def test_the_mean_of_the_others_is_the_baseline() -> None:
    losses = torch.tensor([1.0, 4.0, 2.5], dtype=torch.float64)
    others = [losses[[1, 2]].mean(), losses[[0, 2]].mean(), losses[[0, 1]].mean()]
    assert torch.allclose(advantages(losses, None), losses - torch.stack(others))
    assert policy.averaged(None, losses) == 2.5 and policy.averaged(5.0, losses) == pytest.approx(4.5)


def test_by_enumeration_the_control_learns_nothing() -> None:
    total = torch.zeros(3, dtype=torch.float64)
    for drawn in itertools.product(range(8), repeat=3):
        masks = MASKS[list(drawn)]
        losses = torch.tensor([loss(mask) for mask in masks], dtype=torch.float64)
        weight = torch.tensor([chance(mask) for mask in masks], dtype=torch.float64).prod()
        for order in itertools.permutations(range(3)):
            total += weight / 6 * gradient(S, masks, losses[list(order)], exact=True)
    assert torch.allclose(total, torch.zeros(3, dtype=torch.float64), atol=1e-12)


def prices(whole: bool, groups: int = 1, seed: int = 0) -> Prices:
    draw = torch.Generator().manual_seed(seed)
    each = torch.randint(1, 40, (24,), generator=draw).double()
    layer, group = torch.arange(24) // 6, torch.arange(24) % groups
    flags = tuple(whole and n % 6 == 5 for n in range(24))
    return Prices(each, layer, flags, group)


@pytest.mark.parametrize("margin", [0.0, 0.02])
@pytest.mark.parametrize(("whole", "groups"), [(False, 1), (False, 2), (True, 1)])
def test_a_projection_meets_its_budget(whole: bool, groups: int, margin: float) -> None:
    cost = prices(whole, groups)
    most = cost.kept(torch.ones(24, dtype=torch.float64))
    for seed, share in itertools.product(range(5), (0.2, 0.5, 0.9)):
        s = torch.rand(24, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        found = project(s, cost, share * most, margin)
        assert torch.allclose(cost.kept(found), share * most, rtol=1e-3)
        assert found.min() >= margin and found.max() <= 1 - margin
        again = project(found, cost, share * most, margin)
        assert torch.allclose(again, found, atol=1e-6)


def test_a_projection_of_equal_prices_is_the_papers() -> None:
    cost = Prices(
        torch.ones(9, dtype=torch.float64), torch.arange(9) // 3, (False,) * 9, torch.zeros(9, dtype=torch.long)
    )
    s = torch.linspace(-0.2, 1.1, 9, dtype=torch.float64)
    found = project(s, cost, torch.tensor([4.0], dtype=torch.float64))
    inside = (found > 0) & (found < 1)
    moved = (s - found)[inside]
    assert float(found.sum()) == pytest.approx(4.0, abs=1e-6) and torch.allclose(moved, moved[0].expand_as(moved))


def test_the_nearest_point_of_the_budget_is_where_a_projection_leads() -> None:
    cost, s = prices(False), torch.rand(24, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    budget = 0.6 * cost.kept(torch.ones(24, dtype=torch.float64))
    found = project(s, cost, budget)
    draw = torch.Generator().manual_seed(4)
    for _ in range(50):
        other = project(found + 0.1 * torch.randn(24, generator=draw, dtype=torch.float64), cost, budget)
        assert (other - s).norm() >= (found - s).norm() - 1e-9


def test_whole_layers_count_with_all_that_is_in_them() -> None:
    cost = prices(True)
    ones = torch.ones(24, dtype=torch.float64)
    gone = ones.clone()
    gone[5] = 0
    assert float(cost.kept(ones) - cost.kept(gone)) == float(cost.each[:6].sum())


def learn(seed: int, steps: int = 100) -> float:
    """The share of the best half of twelve units that is kept in the end; the budget is half of them."""
    cost = Prices(
        torch.ones(12, dtype=torch.float64),
        torch.zeros(12, dtype=torch.long),
        (False,) * 12,
        torch.zeros(12, dtype=torch.long),
    )
    budget, worth = torch.tensor([6.0], dtype=torch.float64), torch.arange(12) % 2 * 0.1
    how = Learning(steps, 4, 0.3, "loo", False, 0.02)
    state = State(torch.full((12,), 0.5, dtype=torch.float64))
    for step in range(steps):
        generator = torch.Generator().manual_seed(1000 * seed + step)
        masks = policy.drawn(state.chances, 4, generator)
        state = learned(state, step, masks, 2 - masks @ worth.double(), how, Goal(cost, budget), generator)
    assert float(state.chances.sum()) == pytest.approx(6, rel=1e-3)
    return float((state.chances.argsort()[6:] % 2).double().mean())


def test_units_that_matter_are_learned() -> None:
    assert [learn(seed) for seed in range(3)] == [1.0] * 3


def test_the_control_is_told_losses_of_other_masks() -> None:
    cost, budget = prices(False), torch.tensor([100.0], dtype=torch.float64)
    state = State(torch.full((24,), 0.5, dtype=torch.float64))
    masks = policy.drawn(state.chances, 3, torch.Generator().manual_seed(0))
    losses, order = torch.tensor([1.0, 3.0, 2.0], dtype=torch.float64), torch.randperm(3, generator=seeded(1))
    assert order.tolist() != [0, 1, 2]
    how = Learning(10, 3, 0.1, "loo", False, 0.0)
    plain = learned(state, 0, masks, losses[order], how, Goal(cost, budget), seeded(1))
    control = learned(state, 0, masks, losses, replace(how, shuffled=True), Goal(cost, budget), seeded(1))
    assert torch.equal(control.chances, plain.chances)


def test_masks_without_a_finite_loss_are_left_out() -> None:
    cost, budget = prices(False), torch.tensor([100.0], dtype=torch.float64)
    how, state = Learning(10, 3, 0.1, "loo", False, 0.0), State(torch.full((24,), 0.5, dtype=torch.float64))
    masks = policy.drawn(state.chances, 3, torch.Generator().manual_seed(0))
    losses = torch.tensor([1.0, float("nan"), 2.0], dtype=torch.float64)
    generator = torch.Generator()
    some = learned(state, 0, masks, losses, how, Goal(cost, budget), generator)
    fewer = learned(state, 0, masks[[0, 2]], losses[[0, 2]], how, Goal(cost, budget), generator)
    assert torch.equal(some.chances, fewer.chances)
    nothing = learned(state, 0, masks, losses.fill_(float("inf")), how, Goal(cost, budget), generator)
    assert nothing is state
    assert State.read(some.plain()).plain() == some.plain()


def test_the_rate_falls_to_nothing() -> None:
    rates = [policy.rate_at(step, 100, 0.2) for step in range(101)]
    assert rates[0] == 0.2 and rates[100] == pytest.approx(0) and rates == sorted(rates, reverse=True)
