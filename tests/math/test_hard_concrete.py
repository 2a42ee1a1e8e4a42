"""Hard-concrete gates: closed and open as often as they should be, and what is expected of them."""

import pytest
import torch

from billhook.math import hard_concrete
from billhook.math.gates import Goal


@pytest.mark.parametrize("log_alpha", [-4.0, -1.5, 0.0, 2.0])
def test_a_gate_is_open_as_often_as_is_expected(log_alpha: float) -> None:
    a = torch.full((40_000,), log_alpha, dtype=torch.float64)
    z = hard_concrete.drawn(a, torch.Generator().manual_seed(0))
    assert 0 <= z.min() <= z.max() <= 1
    assert float((z > 0).double().mean()) == pytest.approx(float(hard_concrete.stays(a)[0]), abs=0.01)


def test_what_is_drawn_has_a_gradient_where_it_is_neither_0_nor_1() -> None:
    a = torch.linspace(-3, 3, 200, dtype=torch.float64).requires_grad_()
    z = hard_concrete.drawn(a, torch.Generator().manual_seed(1))
    (grad,) = torch.autograd.grad(z.sum(), a)
    between = (z > 0) & (z < 1)
    assert (grad[between] > 0).all() and (grad[~between] == 0).all() and 0 < between.sum() < 200
    assert torch.autograd.gradcheck(lambda one: hard_concrete.drawn(one, torch.Generator().manual_seed(1)), (a,))


def test_the_excess_is_of_parameters_and_of_each_group() -> None:
    a = torch.tensor([9.0, -9.0, 9.0, 9.0], dtype=torch.float64) * 9
    goal = Goal(
        torch.tensor([3.0, 1.0, 2.0, 2.0]).double(), torch.tensor([0, 0, 1, 1]), torch.tensor([2.0, 2.0]).double()
    )
    assert torch.allclose(hard_concrete.excess(a, goal, 1.0), torch.tensor([0.25 - 0.5, 0.0 - 0.5]).double())
    assert torch.allclose(hard_concrete.excess(a, goal, 0.5), torch.tensor([0.25 - 0.25, -0.25]).double())


def test_a_gate_that_stays_settles_near_one() -> None:
    settled = hard_concrete.settled(torch.tensor([hard_concrete.MOST, 0.0, hard_concrete.LEAST], dtype=torch.float64))
    assert settled[0] > 0.99 and settled[1] == 0.5 and settled[2] < 0.01
