"""Trials of a search: what becomes of a candidate, how two are compared, and when a gain is believed."""

import math
import statistics
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

from scipy.special import ndtr, stdtrit

from billhook.search.evaluator import Mask

SURE = 2.0  # standard errors that a gain over many windows must exceed to be believed
# the chance that a candidate which is just as good passes: one in 44, for any number of windows
ODDS = float(ndtr(-SURE))


@dataclass
class Trial:
    """One candidate and what became of it."""

    number: int
    candidate: Any  # a point of the search space; its `describe()` is plain data
    mask: str = (
        ""  # digest of the units or weights that the candidate drops; '' where it is impossible, or not known yet
    )
    key: Hashable = ""  # what tells it from others before it is tried; '' where it is impossible
    state: str = ""  # tried, repeated, dropped or failed
    proxy: float | None = None
    worse: float | None = None  # nats a token more than the standard, on the same windows
    losses: dict[str, list[float]] = field(default_factory=dict)  # losses of each window, by rung
    units: Mask = field(default_factory=dict)  # the units that the candidate drops, where it drops units

    def record(self) -> dict[str, Any]:
        """The trial as plain data."""
        gain = {}
        if "promoted" in self.losses:
            gain = {"gain": paired_gain(self.losses["standard"], self.losses["promoted"])}
        return {
            "number": self.number,
            "mask": self.mask,
            "state": self.state,
            "proxy": self.proxy,
            "worse": self.worse,
            **self.candidate.describe(),
            **gain,
        }


def paired_gain(standard: Sequence[float], losses: Sequence[float]) -> dict[str, float | None]:
    """Nats a token by which `losses` are lower than `standard` on the same windows, with the standard error."""
    gains = [a - b for a, b in zip(standard, losses, strict=True)]
    error = None
    if len(gains) > 1 and all(map(math.isfinite, gains)):
        error = statistics.stdev(gains) / math.sqrt(len(gains))
    return {"gain": statistics.fmean(gains), "standard_error": error}


def verdict(standard: Sequence[float], losses: Sequence[float]) -> dict[str, Any]:
    """The gain of `losses` over `standard`, and whether it is believed.

    A candidate that is no better is believed to be with probability `ODDS`.  With n windows the error is itself
    uncertain: where a normal distribution needs `SURE` standard errors, Student's t of n - 1 degrees of freedom needs
    2.2 for 16 windows and 3.3 for 4.
    """
    gain = paired_gain(standard, losses)
    needed = float(stdtrit(max(len(losses) - 1, 1), 1 - ODDS))
    value, error = gain["gain"] or 0.0, gain["standard_error"]
    believed = value == math.inf if error is None else value > needed * error
    return {**gain, "needed": needed, "odds": ODDS, "accepted": believed}


def best_of_each_mask(trials: Sequence[Trial], count: int) -> list[Trial]:
    """The `count` best trials that were tried, one for each mask."""
    best: dict[str, Trial] = {}
    for trial in sorted((t for t in trials if t.worse is not None), key=lambda t: (t.worse, t.number)):
        best.setdefault(trial.mask, trial)
    return list(best.values())[:count]


def by_fronts(trials: Sequence[Trial]) -> list[Trial]:
    """Promoted trials in non-dominated order, by mean loss and by its difference between two halves of the windows.

    First come those that no other trial beats in both, then those that only these beat, and so on.
    """
    sides = {trial.number: _mean_and_spread(trial) for trial in trials}
    remaining, ordered = list(trials), []
    while remaining:
        front = [t for t in remaining if not any(_beats(sides[o.number], sides[t.number]) for o in remaining)]
        ordered += sorted(front, key=lambda t: sides[t.number][0])
        remaining = [t for t in remaining if t not in front]
    return ordered


def _mean_and_spread(trial: Trial) -> tuple[float, float]:
    excess = [a - b for a, b in zip(trial.losses["promoted"], trial.losses["standard"], strict=True)]
    half = len(excess) // 2
    return statistics.fmean(excess), abs(statistics.fmean(excess[:half]) - statistics.fmean(excess[half:]))


def _beats(first: tuple[float, float], second: tuple[float, float]) -> bool:
    return first != second and first[0] <= second[0] and first[1] <= second[1]
