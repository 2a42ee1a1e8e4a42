"""Gates that are learned with the weights frozen: which units stay, and then by how much each is scaled.

After DDP (arXiv:2603.08065) and GRASPrune (arXiv:2604.19398), whose idea this is: a few million tokens of gradients on
one number a unit say more of what may go than scores of weights do.  And after IFPruning (arXiv:2501.02086), whose
masks are of a prompt or of a task; here, of a task.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from billhook.math import gates
from billhook.math.gates import Goal
from billhook.tensors import Chances
from billhook.training.gating import Learner

WAYS = {"annealed": gates.soft, "straight-through": gates.straight_through}
HOT, COLD = 1.0, 0.1  # heats of the first and the last step, where gates start with a spread of 1
TAKING_OVER = 1 / 3  # share of the steps in which SoftTopK's mask takes over from the whole model
SCALED = 0.02  # highest rate of scales


class Chosen(Learner):
    """Which units stay: gates that meet the budget at every step (billhook.math.gates)."""

    def __init__(self, start: Chances, goal: Goal, way: str, rate: float, steps: int):
        super().__init__()
        self.z = nn.Parameter(start.double().clone())
        self.goal, self.way, self.rate, self.steps = goal, WAYS[way], rate, steps

    def gates(self, step: int) -> Chances:
        heat = HOT * (COLD / HOT) ** (step / max(1, self.steps - 1))
        return self.way(self.z, self.goal, heat)

    def groups(self) -> list[dict[str, Any]]:
        return [{"params": [self.z], "lr": self.rate}]


class SoftTopK(Learner):
    """Which units stay: with m the mask, and a rising from 0 to 1, gates are 1 - a + a m."""

    def __init__(
        self, start: Chances, goal: Goal, mask: Callable[[Chances, Goal], Chances], rate: float, steps: int
    ) -> None:
        super().__init__()
        self.z = nn.Parameter(start.double().clone())
        self.goal, self.mask, self.rate, self.steps = goal, mask, rate, steps

    def gates(self, step: int) -> Chances:
        share = min(1.0, (step + 1) / (TAKING_OVER * self.steps))
        return (1 - share) + share * self.mask(self.z, self.goal)

    def groups(self) -> list[dict[str, Any]]:
        return [{"params": [self.z], "lr": self.rate}]


class Scales(Learner):
    """By how much what each unit that stays puts out is scaled, to be folded into what reads it."""

    def __init__(self, mask: Chances):
        super().__init__()
        self.scale = nn.Parameter(torch.ones_like(mask))
        self.mask = mask

    def gates(self, step: int) -> Chances:
        return self.scale * self.mask

    def groups(self) -> list[dict[str, Any]]:
        return [{"params": [self.scale], "lr": SCALED}]
