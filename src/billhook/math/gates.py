"""Gates of units, numbers between 0 and 1 that keep a budget of parameters, and how they are learned by gradient.

    z_i     what unit i's gate is learned as;  p_i its parameters;  B what a group of units may keep of them;  T a heat
    g_i   = sigmoid((z_i - tau) / T),  tau such that sum_i p_i g_i = B, by bisection
    dtau  = sum_i p_i g_i (1 - g_i) dz_i / sum_i p_i g_i (1 - g_i)                 (the implicit function's derivative)

So what one gate gains the others of its group pay, at the price of their parameters, and the budget is met at every
step.  At a heat near 0 the gates are 0 and 1.  With all prices 1 this is IFPruning's SoftTopK (arXiv:2501.02086).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from billhook.tensors import Chances, Places, Scores

HALVINGS = 60
COLDEST = 40.0  # beyond so many heats from the threshold a gate is 0 or 1


@dataclass(frozen=True)
class Goal:
    """What gates must keep."""

    prices: Chances  # parameters of each unit, float64
    group: Places  # of each unit: those of one group share a budget
    budget: Tensor  # (groups,), parameters that each group may keep, float64

    def kept(self, gates: Chances) -> Tensor:
        """Parameters that gates keep of each group."""
        return torch.zeros_like(self.budget).index_add(0, self.group, self.prices * gates)


def threshold(z: Chances, goal: Goal, heat: float) -> Tensor:
    """tau of each group."""
    reach = COLDEST * heat
    low = torch.full_like(goal.budget, float(z.min()) - reach)
    high = torch.full_like(goal.budget, float(z.max()) + reach)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        more = goal.kept(torch.sigmoid((z - middle[goal.group]) / heat)) > goal.budget
        low, high = torch.where(more, middle, low), torch.where(more, high, middle)
    return (low + high) / 2


def soft(z: Chances, goal: Goal, heat: float) -> Chances:
    """g, with the gradient of the budget: what it is of units that share a group sums, by price, to nothing."""
    still = z.detach()
    tau = threshold(still, goal, heat)
    g = torch.sigmoid((still - tau[goal.group]) / heat)
    weight = goal.prices * g * (1 - g)
    mass = torch.zeros_like(tau).index_add(0, goal.group, weight).clamp(min=torch.finfo(tau.dtype).tiny)
    moved = torch.zeros_like(tau).index_add(0, goal.group, weight * (z - still)) / mass
    return torch.sigmoid((z - (tau + moved)[goal.group]) / heat)


def hard(z: Chances, goal: Goal) -> Chances:
    """1 for the units of largest z in each group, as long as the budget lasts; else 0."""
    order = z.detach().argsort(descending=True, stable=True)
    order = order[goal.group[order].argsort(stable=True)]
    cost = goal.prices[order].cumsum(0)
    totals = goal.kept(torch.ones_like(goal.prices))
    before = (totals.cumsum(0) - totals)[goal.group[order]]
    gates = torch.zeros_like(goal.prices)
    gates[order] = (cost - before <= goal.budget[goal.group[order]] * (1 + 1e-12)).to(gates.dtype)
    return gates


def straight_through(z: Chances, goal: Goal, heat: float) -> Chances:
    """`hard`, with the gradient of `soft` (GRASPrune, arXiv:2604.19398)."""
    g = soft(z, goal, heat)
    return hard(z, goal) + g - g.detach()


def top(z: Chances, goal: Goal, heat: float, reopen: bool) -> Chances:
    """`soft` where `hard` is 1, else 0: SoftTopK as IFPruning trains with it (arXiv:2501.02086).

    Args:
        reopen: whether units at 0 keep the gradient of their soft gates; in the paper they have none.
    """
    g, is_open = soft(z, goal, heat), hard(z, goal)
    return g * is_open + (g - g.detach()) * (1 - is_open) * reopen


def by_rank(scores: Scores) -> Chances:
    """Where gates of an axis start: the quantiles of a normal distribution in the order of their scores.

    So every axis begins alike, whatever its scores' scale, and loses the same share of its units.
    """
    ranks = scores.detach().cpu().double().argsort(stable=True).argsort()
    return torch.special.ndtri((ranks.double() + 0.5) / len(scores))
