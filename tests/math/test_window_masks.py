"""Masks of training windows: what holds for any losses."""

import pytest
import torch

from billhook.math import window_masks
from billhook.math.window_masks import Learning, State

LEARNING = Learning(keep=0.7, steps=60, last=20)


def losses(count: int = 40, seed: int = 0, noise: float = 0.0, again: int = 0) -> torch.Tensor:
    """Losses of windows that differ in kind, and from one reading to the next."""
    kind = torch.randn(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    drawn = torch.randn(count, generator=torch.Generator().manual_seed(1000 + again), dtype=torch.float64)
    return (0.4 * kind + noise * drawn).exp()


def learned(found: torch.Tensor, learning: Learning = LEARNING) -> State:
    state = State.first(len(found))
    for _ in range(learning.steps):
        state = window_masks.moved(state, window_masks.pull(found), learning)
    return state


def test_a_step_is_the_gradient_of_the_objective() -> None:
    found, state = losses(), State.first(40)
    m = state.masks.clone().requires_grad_(True)
    w = torch.sigmoid(state.heat * m)
    relative = found / found.median()
    urge = 1 + 50 * abs(1.0 - LEARNING.keep)  # all are kept at first
    objective = ((relative - (relative + 1e-5).log()) * w).sum() + urge * 40 * (w.mean() - LEARNING.keep) ** 2
    objective.backward()
    torch.testing.assert_close(window_masks.moved(state, window_masks.pull(found), LEARNING).speed, m.grad)


def test_ordinary_windows_stay_whatever_losses_are_measured_in() -> None:
    found = losses()
    kept = window_masks.largest(learned(found), 28)
    assert torch.isin(kept, window_masks.pull(found).argsort()[:28]).sum() >= 27  # a near tie may go either way
    assert torch.equal(kept, window_masks.largest(learned(7 * found), 28))
    extreme = found.argsort()[[0, -1]]
    assert not torch.isin(extreme, kept).any()


@pytest.mark.parametrize("keep", [0.3, 0.7, 0.9])
def test_those_pushed_least_are_kept_as_many_as_the_budget_says(keep: float) -> None:
    found, count = losses(400), round(keep * 400)
    kept = window_masks.largest(learned(found, Learning(keep, 60, 20)), count)
    assert torch.isin(kept, window_masks.pull(found).argsort()[:count]).sum() >= 0.95 * count


def test_masks_become_zeros_and_ones_near_the_budget() -> None:
    state = learned(losses(400))
    assert window_masks.kept_share(state) == pytest.approx(LEARNING.keep, abs=0.12)
    assert ((state.weights < 0.2) | (state.weights > 0.8)).double().mean() > 0.8
