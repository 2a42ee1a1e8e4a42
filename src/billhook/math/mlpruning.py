"""MLPruning's masks (arXiv:2105.14636): a level keeps the units of largest score, and how many is learned, too.

A level is an axis of a layer: its heads or KV groups, or the rows of its FFN.

    s_u    score of unit u,  p_u its parameters;  theta_l what the share of level l is learned as,  n_l its units
    m_u    = 1 for the ceil(sigmoid(theta_l) n_l) units of largest s, else 0
    ds_u   = g_u,  dtheta_l = sum of g_u m_u over the level          straight through, g being the gradient of m
    r      = sum_u p_u sigmoid(theta_l) / sum_u p_u                  the share of parameters that stays; t, that should
    R      = (r - t)^2 where r > t, else 0
    loss   + lambda R,   lambda = max(20000 R / (1 - t)^2, 50), or 10 where R < 3e-4

With k_u the units of its level that have larger scores, z_u = theta_l - logit(k_u / n_l) is positive for what stays,
and puts the units of all levels in one order: what has the lowest z is the next to go.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from billhook.tensors import Chances, Places, Scores

STEEP, LEAST, NEAR, SLIGHT = 20_000.0, 50.0, 3e-4, 10.0  # of lambda


@dataclass(frozen=True)
class Levels:
    """Which units are ranked together, and what they should keep."""

    level: Places  # of each unit: those of one level share theta
    block: Places  # of each unit: a level keeps as many in each of its blocks; numbered in the order of units
    prices: Chances  # parameters of each unit, float64
    target: float  # t

    def kept(self, theta: Tensor) -> Tensor:
        """r."""
        return (self.prices * theta.sigmoid()[self.level]).sum() / self.prices.sum()


def ahead(scores: Scores, levels: Levels) -> Chances:
    """k / n: the share of each unit's block that has larger scores; of equal ones, higher numbers."""
    order = scores.detach().argsort(stable=True)
    order = order[levels.block[order].argsort(stable=True)]
    sizes = levels.block.bincount()
    block = levels.block[order]
    share = torch.empty(len(scores), dtype=torch.float64)
    share[order] = (sizes.cumsum(0)[block] - 1 - torch.arange(len(order))).double() / sizes[block]
    return share


def mask(scores: Scores, theta: Tensor, levels: Levels) -> Chances:
    """m, with the gradients above."""
    stays = (theta.detach().sigmoid()[levels.level] > ahead(scores, levels)).double()
    return stays + (scores - scores.detach()) + stays * (theta - theta.detach())[levels.level]


def order(scores: Scores, theta: Tensor, levels: Levels) -> Chances:
    """z; a level's first unit counts as half a unit from the top, which keeps z finite."""
    half = 0.5 / levels.block.bincount()[levels.block]
    return theta.detach()[levels.level] - torch.maximum(ahead(scores, levels), half).logit()


def penalty(theta: Tensor, levels: Levels) -> Tensor:
    """lambda R, with the gradient of R."""
    R = (levels.kept(theta) - levels.target).clamp(min=0).square()
    found = R.item()
    weight = max(STEEP * found / (1 - levels.target) ** 2, LEAST) if found >= NEAR else SLIGHT
    return weight * R
