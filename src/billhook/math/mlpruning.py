"""MLPruning's masks (arXiv:2105.14636): a level keeps the units of largest score, and how many is learned, too.

A level is an axis of a layer: its heads or KV groups, or the rows of its FFN.

    s_u    score of unit u,  p_u its parameters;  theta_l what the share r_l of level l is learned as,  n_l its units
    r_l    = sigmoid(theta_l - tau),  tau such that sum_u p_u r_l(u) is what the budget leaves (billhook.math.gates)
    m_u    = 1 for the ceil(r_l n_l) units of largest s, else 0
    ds_u   = g_u,  dr_l = sum of g_u m_u over the level              straight through, g being the gradient of m

With k_u the units of its level that have larger scores, z_u = logit(r_l) - logit(k_u / n_l) is positive for what stays,
and puts the units of all levels in one order: what has the lowest z is the next to go.

The paper has no tau: its r_l = sigmoid(theta_l) come down to the budget by a penalty, in tens of thousands of steps.
"""

from dataclasses import dataclass

import torch

from billhook.math import gates
from billhook.math.gates import Goal
from billhook.tensors import Chances, LevelShares, Places, Scores

ROUNDING = 1e-9  # a share that is a whole number of units but for so much keeps no further unit


@dataclass(frozen=True)
class Levels:
    """Which units are ranked together, and what they should keep."""

    level: Places  # of each unit: those of one level share r
    block: Places  # of each unit: a level keeps as many in each of its blocks; numbered in the order of units
    prices: Chances  # parameters of each unit, float64
    target: float  # the share of all parameters that stays

    def goal(self, kept: float) -> Goal:
        """Levels as what gates are of, which keep a share of all parameters together."""
        prices = torch.zeros(int(self.level.max()) + 1, dtype=torch.float64).index_add(0, self.level, self.prices)
        return Goal(prices, torch.zeros(len(prices), dtype=torch.long), kept * prices.sum()[None])


def shares(theta: LevelShares, levels: Levels, kept: float) -> LevelShares:
    """r, with its gradient, where all levels together keep a share of the parameters."""
    return gates.soft(theta, levels.goal(kept), heat=1.0)


def ahead(scores: Scores, levels: Levels) -> Chances:
    """k / n: the share of each unit's block that has larger scores; of equal ones, higher numbers."""
    order = scores.detach().argsort(stable=True)
    order = order[levels.block[order].argsort(stable=True)]
    block, sizes = levels.block[order], levels.block.bincount()
    share = torch.empty(len(scores), dtype=torch.float64)
    share[order] = (sizes.cumsum(0)[block] - 1 - torch.arange(len(order))).double() / sizes[block]
    return share


def mask(scores: Scores, r: LevelShares, levels: Levels) -> Chances:
    """m, with the gradients above."""
    stays = (r.detach()[levels.level] - ROUNDING > ahead(scores, levels)).double()
    return stays + (scores - scores.detach()) + stays * (r - r.detach())[levels.level]


def order(scores: Scores, r: LevelShares, levels: Levels) -> Chances:
    """z; a level's first unit counts as half a unit from the top, which keeps z finite."""
    half = 0.5 / levels.block.bincount()[levels.block]
    return r.logit()[levels.level] - torch.maximum(ahead(scores, levels), half).logit()
