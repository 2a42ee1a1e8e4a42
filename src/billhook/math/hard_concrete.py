"""Hard-concrete gates: random numbers between 0 and 1 that are 0, or 1, with a chance that can be learned.

Louizos et al. 2018 (arXiv:1712.01312), as Sheared LLaMA (arXiv:2310.06694) and DRPruning (arXiv:2411.14055) have them.

    u ~ Uniform(0, 1)
    z = clamp(1.2 sigmoid((log u - log(1 - u) + a) / beta) - 0.1, 0, 1)     a, the log of alpha, is what is learned
    P(z > 0) = sigmoid(a - beta log(0.1 / 1.1))
    settled:   sigmoid(0.8 a / beta)                                        what is left of a gate once nothing is drawn

What is expected to go is kept to a target by two multipliers that ascend while the gates descend:

    + lambda_1 (s - t) + lambda_2 (s - t)^2     s the share of parameters that is expected to go, t the target
"""

import math

import torch
from torch import Tensor

from billhook.math.gates import Goal
from billhook.tensors import Chances

BETA = 2 / 3
LOW, HIGH = -0.1, 1.1  # what the sigmoid is stretched to before it is clamped
EDGE = 1e-6  # how near u comes to 0 and 1
LEAST, MOST = math.log(0.01), math.log(100)  # of log alpha
SETTLING = 0.8


def drawn(log_alpha: Chances, generator: torch.Generator) -> Chances:
    """z, with its gradient."""
    u = EDGE + (1 - 2 * EDGE) * torch.rand(len(log_alpha), generator=generator, dtype=log_alpha.dtype)
    return (LOW + (HIGH - LOW) * torch.sigmoid((u.logit() + log_alpha) / BETA)).clamp(0, 1)


def stays(log_alpha: Chances) -> Chances:
    """P(z > 0)."""
    return torch.sigmoid(log_alpha - BETA * math.log(-LOW / HIGH))


def settled(log_alpha: Chances) -> Chances:
    """What a gate that stays is in the end."""
    return torch.sigmoid(SETTLING * log_alpha / BETA)


def excess(log_alpha: Chances, goal: Goal, share: float) -> Tensor:
    """s - t of each group of units.

    Args:
        share: of the target, which rises from 0 to what the goal says.
    """
    whole = goal.kept(torch.ones_like(goal.prices))
    return (1 - goal.kept(stays(log_alpha)) / whole) - share * (1 - goal.budget / whole)
