"""MLPruning: gates at 0 and 1 by scores, with shares that are learned beside adapters (`math.mlpruning`)."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from billhook.math import mlpruning
from billhook.math.gates import Goal
from billhook.math.mlpruning import Levels
from billhook.tensors import Chances, LevelShares
from billhook.training.gating import Learner, Units

CLOSING = 1 / 3  # share of the steps in which what stays falls to what the budget says
REACH = 4.0  # how far what shares are learned as could move if its rate never fell


@dataclass(frozen=True)
class Pace:
    """How fast everything learns."""

    steps: int
    scores: float  # highest rate
    adapters: float  # highest rate


def levels_of(units: Units, goal: Goal, alike: bool) -> Levels:
    """Every axis is a level, or with `alike` all of them are one."""
    counts = torch.tensor([axis.units for axis in units.axes])
    blocks = torch.tensor([axis.blocks for axis in units.axes])
    level = torch.arange(len(counts)).repeat_interleave(counts)
    block = torch.arange(int(blocks.sum())).repeat_interleave((counts // blocks).repeat_interleave(blocks))
    return Levels(0 * level if alike else level, block, goal.prices, float(goal.budget.sum() / goal.prices.sum()))


class Ratios(Learner):
    """Which units stay, and how many of each level; the weights' own adapters train beside them."""

    def __init__(self, start: Chances, levels: Levels, adapters: Iterable[nn.Module], pace: Pace) -> None:
        """
        Args:
            start: scores to begin with, alike for all levels.
        """
        super().__init__()
        self.scores = nn.Parameter(start.double().clone())
        self.theta = nn.Parameter(torch.zeros(int(levels.level.max()) + 1, dtype=torch.float64))
        self.adapters = nn.ModuleList(adapters)
        self.levels, self.pace = levels, pace

    @property
    def shares(self) -> LevelShares:
        """What each level has learned to keep."""
        return mlpruning.shares(self.theta.detach(), self.levels, self.levels.target)

    @property
    def order(self) -> Chances:
        """In which order units go, the lowest first."""
        return mlpruning.order(self.scores.detach(), self.shares, self.levels)

    def gates(self, step: int) -> Chances:
        closed = min(1.0, (step + 1) / (CLOSING * self.pace.steps))
        r = mlpruning.shares(self.theta, self.levels, 1 - closed * (1 - self.levels.target))
        return mlpruning.mask(self.scores, r, self.levels)

    def groups(self) -> list[dict[str, Any]]:
        return [
            {"params": [self.scores], "lr": self.pace.scores},
            {"params": [self.theta], "lr": REACH / self.pace.steps},
            {"params": list(self.adapters.parameters()), "lr": self.pace.adapters},
        ]


class Settled(Learner):
    """Gates stay as they are, and the adapters train on."""

    def __init__(self, mask: Chances, adapters: Iterable[nn.Module], rate: float) -> None:
        super().__init__()
        self.mask, self.adapters, self.rate = mask, nn.ModuleList(adapters), rate

    def gates(self, step: int) -> Chances:
        return self.mask

    def groups(self) -> list[dict[str, Any]]:
        return [{"params": list(self.adapters.parameters()), "lr": self.rate}]
