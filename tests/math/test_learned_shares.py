"""MLPruning's masks: the best units of each level, as many as its share says, and shares within the budget."""

import math

import pytest
import torch

from billhook.math import mlpruning
from billhook.math.mlpruning import Levels

SIZES = (8, 6, 10)  # the second level has two blocks


def levels() -> Levels:
    level = torch.arange(3).repeat_interleave(torch.tensor(SIZES))
    block = torch.arange(4).repeat_interleave(torch.tensor([8, 3, 3, 10]))
    return Levels(level, block, torch.tensor([3.0, 5.0, 1.0]).double()[level], 0.6)


def drawn(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    scores = torch.randint(4, (sum(SIZES),), generator=draw).double()  # many are equal
    return scores.requires_grad_(), torch.randn(3, generator=draw, dtype=torch.float64).requires_grad_()


@pytest.mark.parametrize("kept", [0.999, 0.6, 0.2])
def test_shares_keep_the_budget_with_a_gradient_that_says_so(kept: float) -> None:
    own, (_, theta) = levels(), drawn()
    r = mlpruning.shares(theta, own, kept)
    prices = torch.tensor([24.0, 30.0, 10.0]).double()
    assert ((prices * r).sum() / prices.sum()).item() == pytest.approx(kept, rel=1e-9)
    assert torch.autograd.gradcheck(lambda one: mlpruning.shares(one, own, kept), (theta,), atol=1e-5)


@pytest.mark.parametrize("seed", range(3))
def test_each_block_keeps_its_best_and_the_order_says_the_same(seed: int) -> None:
    own, (scores, theta) = levels(), drawn(seed)
    r = mlpruning.shares(theta, own, own.target)
    found, z = mlpruning.mask(scores, r, own), mlpruning.order(scores, r, own)
    assert set(found.tolist()) <= {0.0, 1.0}
    for number in range(4):
        of_block = own.block == number
        share = r[own.level[of_block][0]].item()
        ranked = scores.detach()[of_block].argsort(stable=True)  # of equal ones the lower number goes first
        stays = ranked[len(ranked) - math.ceil(share * len(ranked)) :]
        assert found[of_block].nonzero().flatten().tolist() == sorted(stays.tolist())
        assert z[of_block].argsort(stable=True).tolist() == ranked.tolist()
        if len(stays) > 1:
            assert torch.equal(z[of_block] > 0, found[of_block] == 1)


def test_a_share_of_whole_units_keeps_these_whatever_its_last_bits() -> None:
    own, (scores, _) = levels(), drawn()
    for rounded in (-1e-15, 0.0, 1e-15):
        found = mlpruning.mask(scores, torch.tensor([0.5, 1 / 3, 0.7], dtype=torch.float64) + rounded, own)
        assert torch.zeros(3).double().index_add(0, own.level, found.detach()).tolist() == [4, 2, 7]


def test_gradients_go_straight_through() -> None:
    own, (scores, _) = levels(), drawn()
    r, g = torch.tensor([0.5, 0.7, 0.2]).double().requires_grad_(), torch.arange(24).double()
    found = mlpruning.mask(scores, r, own)
    of_scores, of_shares = torch.autograd.grad((g * found).sum(), (scores, r))
    assert torch.equal(of_scores, g)
    assert torch.equal(of_shares, torch.zeros(3).double().index_add(0, own.level, g * found.detach()))
