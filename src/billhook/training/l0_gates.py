"""L0: hard-concrete gates learn beside adapters, held to the budget by multipliers (`math.hard_concrete`)."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from billhook.math import hard_concrete
from billhook.math.gates import Goal
from billhook.tensors import Chances
from billhook.training.gating import Learner

RISING = 0.2  # share of the steps in which the target rises to what the budget says
PULL = 1.0  # rate of the multipliers, in Adam (the paper's)


class HardConcrete(Learner):
    """Random gates; the weights' own adapters train beside them."""

    def __init__(self, goal: Goal, adapters: Iterable[nn.Module], steps: int, rates: tuple[float, float], seed: int):
        """
        Args:
            rates: the highest of gates, and of adapters.
            seed: of what is drawn in each step.
        """
        super().__init__()
        start = torch.full_like(goal.prices, hard_concrete.MOST)
        self.log_alpha = nn.Parameter(start)
        self.multipliers = nn.Parameter(torch.zeros(2, len(goal.budget), dtype=torch.float64))
        self.adapters = nn.ModuleList(adapters)
        self.goal, self.steps, self.rates, self.seed = goal, steps, rates, seed

    def gates(self, step: int) -> Chances:
        with torch.no_grad():
            self.log_alpha.clamp_(hard_concrete.LEAST, hard_concrete.MOST)
        draw = torch.Generator().manual_seed((self.seed * 1_000_003 + step) % 2**63)
        return hard_concrete.drawn(self.log_alpha, draw)

    def penalty(self, step: int) -> Tensor:
        share = min(1.0, step / (RISING * self.steps))
        away = hard_concrete.excess(self.log_alpha, self.goal, share)
        return (self.multipliers[0] * away + self.multipliers[1] * away.square()).sum()

    def groups(self) -> list[dict[str, Any]]:
        gates, adapters = self.rates
        weights = [{"params": list(self.adapters.parameters()), "lr": adapters}] if len(self.adapters) else []
        return [
            {"params": [self.log_alpha], "lr": gates},
            {"params": [self.multipliers], "lr": PULL, "maximize": True},
            *weights,
        ]
