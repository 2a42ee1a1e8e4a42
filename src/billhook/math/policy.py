"""Policy-gradient pruning, "Bypass Back-propagation" (Gao et al. 2024, arXiv:2406.10576): masks drawn from chances that
learn from losses alone.

    m_i ~ Bernoulli(s_i)   whether unit i stays;  L(m) the loss of the model with only these units
    grad_s E[L] = E[(L - b) (m - s) / (s (1 - s))]   for any b that does not depend on m   (REINFORCE)

1. Start      a score, standardised within each layer, through the sigmoid, moved until the budget is met.
2. Gradient   of K masks, (L_k - b) times the score of m_k; the published code divides by sqrt(s (1 - s)) in place of
              s (1 - s), which weighs units near 0 and 1 less.
3. Step       s <- s - rate * gradient, the rate falling to 0 as a cosine.
4. Projection s <- clip(s - v c / mean(c)), v by bisection, until what the chances keep is the budget; c_i is 1 in the
              paper, here the parameters of unit i.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from billhook.tensors import Chances, Drawn, MaskLosses, Places

EPSILON = 1e-7  # under the root of the published score
MEMORY = 5  # steps that the moving average of losses remembers
HALVINGS = 60


@dataclass(frozen=True)
class Prices:
    """What units cost.  A unit may be a whole layer, without which none of the layer's units counts."""

    each: Chances  # parameters of each unit; of a whole layer, those that no other unit has
    layer: Places  # of each unit
    whole: tuple[bool, ...]  # which units are whole layers
    group: Places  # of each unit: those of one group share a budget

    def kept(self, s: Chances) -> Tensor:
        """Parameters that are expected to stay, of each group."""
        stays = torch.ones(int(self.layer.max()) + 1, dtype=torch.float64)
        whole = torch.tensor(self.whole)
        stays[self.layer[whole]] = s[whole]
        parts = self.each * torch.where(whole, s, s * stays[self.layer])
        return torch.zeros(int(self.group.max()) + 1, dtype=torch.float64).index_add_(0, self.group, parts)

    @property
    def pace(self) -> Tensor:
        """By how much each unit moves in a projection: what it saves alone, by the mean of its group 1."""
        whole = torch.tensor(self.whole)
        of_layer = torch.zeros(int(self.layer.max()) + 1, dtype=torch.float64).index_add_(0, self.layer, self.each)
        saves = torch.where(whole, of_layer[self.layer], self.each)
        counts = torch.zeros(int(self.group.max()) + 1, dtype=torch.float64)
        sums = counts.index_add(0, self.group, saves)
        return saves / (sums / counts.index_add(0, self.group, torch.ones_like(saves)))[self.group]


def standardised_chances(scores: Sequence[Tensor]) -> Chances:
    """Step 1 but for the budget: the sigmoid of scores, standardised in each of several lists; one alone is 1/2."""
    found = []
    for values in scores:
        away = values.double() - values.double().mean()
        spread = away.square().mean().sqrt()
        found.append(torch.sigmoid(away / spread if spread > 0 else torch.zeros_like(away)))
    return torch.cat(found)


def project(s: Chances, prices: Prices, budget: Tensor, margin: float = 0.0) -> Chances:
    """Step 4: chances between `margin` and 1 - `margin` that keep `budget` (of each group), or come nearest to it."""
    pace, low, high = prices.pace, torch.full_like(budget, -1.0), torch.full_like(budget, 1.0)
    reach = 2 / float(pace.min())
    low, high = low * reach, high * reach

    def moved(v: Tensor) -> Tensor:
        return (s - v[prices.group] * pace).clamp(margin, 1 - margin)

    for _ in range(HALVINGS):
        middle = (low + high) / 2
        more = prices.kept(moved(middle)) > budget
        low, high = torch.where(more, middle, low), torch.where(more, high, middle)
    return moved((low + high) / 2)


def drawn(s: Chances, count: int, generator: torch.Generator) -> Drawn:
    """`count` masks."""
    return (torch.rand(count, len(s), generator=generator, dtype=torch.float64) < s).double()


def scored(s: Chances, masks: Drawn, exact: bool) -> Drawn:
    """(m - s) over s (1 - s), or over its root as published."""
    spread = s * (1 - s) if exact else ((s + EPSILON) * (1 - s + EPSILON)).sqrt()
    return (masks - s) / spread


def advantages(losses: MaskLosses, average: float | None) -> MaskLosses:
    """How much worse each loss is than its baseline: the moving average, or without one the mean of the others."""
    if average is not None:
        return losses - average
    return (losses - losses.mean()) * len(losses) / (len(losses) - 1)


def gradient(
    s: Chances, masks: Drawn, losses: MaskLosses, average: float | None = None, exact: bool = False
) -> Chances:
    """Step 2.  With a moving average it is divided by K - 1, as published; else by K, which has no bias."""
    away = advantages(losses, average)[:, None] * scored(s, masks, exact)
    return away.sum(0) / (max(len(losses) - 1, 1) if average is not None else len(losses))


def averaged(average: float | None, losses: MaskLosses) -> float:
    """The moving average with these losses; it begins at the first mean."""
    mean = float(losses.mean())
    return mean if average is None else (1 - 1 / MEMORY) * average + mean / MEMORY


def rate_at(step: int, steps: int, rate: float) -> float:
    """Step 3: the rate at a step, from `rate` to 0 as half of a cosine."""
    return rate * (1 + math.cos(math.pi * step / steps)) / 2


@dataclass(frozen=True)
class State:
    """Where learning is."""

    chances: Chances
    average: float | None = None

    def plain(self) -> dict[str, Any]:
        return {"chances": self.chances.tolist(), "average": self.average}

    @classmethod
    def read(cls, plain: dict[str, Any]) -> "State":
        return cls(torch.tensor(plain["chances"], dtype=torch.float64), plain["average"])


@dataclass(frozen=True)
class Goal:
    """What chances must keep: of each group of units a budget, by their prices."""

    prices: Prices
    budget: Tensor


@dataclass(frozen=True)
class Learning:
    """How chances learn; what the paper has, and what billhook changes for a few hundred forward passes."""

    steps: int
    masks: int  # of each step
    rate: float
    baseline: str  # loo or ema
    exact: bool  # whether the score is divided by s (1 - s)
    margin: float  # how near to 0 and 1 chances may come
    shuffled: bool = False  # whether each mask is told any mask's loss: the control, which can learn nothing


def learned(
    state: State, step: int, masks: Drawn, losses: MaskLosses, how: Learning, goal: Goal, draw: torch.Generator
) -> State:
    """Steps 2 to 4, from what a step's masks have lost; masks whose loss is not finite are left out.

    Args:
        draw: what the control's permutation is drawn by.
    """
    finite = losses.isfinite()
    masks, losses = masks[finite], losses[finite]
    if len(losses) < (2 if how.baseline == "loo" else 1):
        return state
    if how.shuffled:
        losses = losses[torch.randperm(len(losses), generator=draw)]
    average = averaged(state.average, losses) if how.baseline == "ema" else None
    g = gradient(state.chances, masks, losses, average, how.exact)
    moved = state.chances - rate_at(step, how.steps, how.rate) * g
    return State(project(moved, goal.prices, goal.budget, how.margin), average)
