"""Masks of training windows, learned with the model under a budget of windows (AdaPruner for data, arXiv:2312.05599).

    m_i  the mask of window i, 1 at first;  s  a heat;  w_i = sigmoid(s m_i)  what its loss weighs
    l_i  its loss, over the median of all windows';  rho  the share to keep;  c  the share of windows with m_i > 0
    L  = sum_i (l_i - log(l_i + 1e-5)) w_i + lambda N (mean w - rho)^2,      lambda = 1 + 50 |c - rho|
    m  <- m - step of L's gradient, momentum 0.9

A mask is pushed down by l - log l, which is least at l = 1: windows of an ordinary loss stay, the easiest and the
hardest go.  The budget's gradient, the same for all, pushes back.

The equations are those of the code that was published under the paper's title; its body was not at hand.  There l is
the loss itself, and a mask is pushed when its window is read.  Losses of language models are far from 1, hence the
median; and pushed so, the windows that are read first fall first, whatever their losses.  Here every mask moves at
every step, by the last loss of its window.
"""

from dataclasses import dataclass, replace

import torch

from billhook.tensors import Kept, Losses, Masks

COLDEST, HOTTEST = 0.1, 5.0  # heat at first, and where it rises to
MOMENTUM = 0.9
TRAVEL = 20.0  # how far a gradient of 1 at every step moves a mask over a run
URGE = 50.0  # how much more the budget weighs for each window beyond it
SHARPEN = 10.0  # factor of the heat over the last pass
DECIDED = (0.1, 0.9)  # weights beyond these are as good as 0 and 1
ENOUGH = 0.9  # share of decided windows at which the heat stays
SMALLEST = 1e-5  # what is added to losses before their logarithm


@dataclass(frozen=True)
class Learning:
    """How masks are learned."""

    keep: float  # rho
    steps: int  # in which masks move: those after all windows are read once
    last: int  # the last of these, in which masks become 0 or 1: a pass


@dataclass(frozen=True)
class State:
    """All that changes from step to step."""

    masks: Masks
    speed: Masks  # the sum of past gradients, each step's less
    heat: float = COLDEST
    step: int = 0

    @classmethod
    def first(cls, windows: int) -> "State":
        return cls(torch.ones(windows, dtype=torch.float64), torch.zeros(windows, dtype=torch.float64))

    @property
    def weights(self) -> Masks:
        """w, what each window's loss weighs in training."""
        return torch.sigmoid(self.heat * self.masks)


def moved(state: State, pulls: Losses, learning: Learning) -> State:
    """The state after a step, in which each mask is pushed down so hard, and all by the budget."""
    w, c = state.weights, kept_share(state)
    urge = (1 + URGE * abs(c - learning.keep)) * 2 * (w.mean() - learning.keep)
    gradient = state.heat * w * (1 - w) * (pulls + urge)
    speed = MOMENTUM * state.speed + gradient
    pace = (1 - MOMENTUM) * TRAVEL / learning.steps
    after = replace(state, masks=state.masks - pace * speed, speed=speed, step=state.step + 1)
    return replace(after, heat=_heat(after, learning))


def pull(losses: Losses) -> Losses:
    """How hard each window's mask is pushed down: l - log l of l, the loss over the median."""
    relative = losses / losses.median().clamp(min=SMALLEST)
    return relative - (relative + SMALLEST).log()


def kept_share(state: State) -> float:
    """c, the share of windows that weigh more than a half."""
    return float((state.masks > 0).double().mean())


def largest(state: State, count: int) -> Kept:
    """The windows that are kept: so many of the largest masks, by their numbers."""
    return state.masks.argsort(descending=True, stable=True)[:count].sort().values


def _heat(state: State, learning: Learning) -> float:
    """It rises as long as enough windows stay, and falls back where too few do; in the last pass it only rises."""
    if state.step > learning.steps - learning.last:
        low, high = DECIDED
        decided = float(((state.weights < low) | (state.weights > high)).double().mean())
        return state.heat * (SHARPEN ** (1 / learning.last) if decided < ENOUGH else 1)
    rise = (HOTTEST - COLDEST) / learning.steps
    return state.heat + rise if kept_share(state) >= learning.keep else max(COLDEST, state.heat - rise)
