"""The rounds of AdaPruner's search: known metrics, then batches of candidates, dropped by a proxy or tried."""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from billhook.errors import BillhookError
from billhook.runtime.progress import Tick
from billhook.search.ladder import BATCH, PROMOTED, RUNGS
from billhook.search.metrics import TERMS, Solution, digest
from billhook.search.problem import Problem
from billhook.search.samplers import Study
from billhook.search.space import Candidate
from billhook.search.trial import Trial, best_of_each_mask, by_fronts, paired_gain
from billhook.search.validation import RungWindows


@dataclass(frozen=True)
class Known:
    """The known metrics of the space, tried on the same windows."""

    standard: Solution  # the best of them
    worse: Mapping[str, float]  # nats a token more than the standard, by mask
    rows: tuple[dict[str, Any], ...]  # one row a metric, for the record


def try_known(problem: Problem, rungs: RungWindows, tick: Tick) -> Known:
    """Step 2: try every known metric of the space.

    Raises:
        BillhookError: none of them has a finite loss.
    """
    metrics = problem.space.known
    masks = {name: problem.mask(Candidate(metric)) for name, metric in metrics.items()}
    every = problem.evaluator.losses(list(masks.values()), rungs.take(RUNGS[1]), tick, "known metrics")
    losses = dict(zip(masks, every, strict=True))
    means = {name: statistics.fmean(window_losses) for name, window_losses in losses.items()}
    finite = {name: mean for name, mean in means.items() if math.isfinite(mean)}
    if not finite:
        raise BillhookError("no known metric gives a model with a finite loss here: lower the ratio")
    best = min(finite, key=finite.__getitem__)
    worse = {digest(mask): means[name] - means[best] for name, mask in masks.items()}
    rows = [
        {
            "metric": name,
            "meaning": TERMS[name][1],
            "mask": digest(masks[name]),
            "loss": means[name],
            "standard": name == best,
            **paired_gain(losses[best], losses[name]),
        }
        for name in losses
    ]
    return Known(metrics[best], worse, tuple(rows))


class Rounds:
    """Batches of candidates, each compared with the standard on the same windows."""

    def __init__(self, problem: Problem, known: Known, rungs: RungWindows, tick: Tick) -> None:
        self.problem, self.standard, self.rungs, self.tick = problem, known.standard, rungs, tick
        self.worse = dict(known.worse)  # nats a token more than the standard, by mask: all that were tried

    def run(self, study: Study, is_over: Callable[[], bool]) -> list[Trial]:
        """Step 3, until the trials are used up or time is."""
        trials: list[Trial] = []
        total, starts = self.problem.chosen.trials, self._starts()
        while len(trials) < total and not (trials and is_over()):
            first = [] if trials else starts
            count = min(max(BATCH, len(first)), total - len(trials))
            self.tick("trials", len(trials), total)
            trials += self._round(study, study.ask(count, first[:count]))
        self.tick("trials", total, total)
        return trials

    def _starts(self) -> list[dict[str, Any]]:
        """Values of the dimensions for the known metrics, as far as the space can express them."""
        space = self.problem.space
        encoded = [(space.encode(metric), metric) for metric in space.known.values()]
        return [values for values, metric in encoded if space.decode(values, self.standard).solution == metric]

    def _round(self, study: Study, proposals: Sequence[tuple[int, Mapping[str, Any]]]) -> list[Trial]:
        trials = [self._trial(number, values) for number, values in proposals]
        fresh = {t.mask: t for t in reversed(trials) if t.mask and t.mask not in self.worse}
        self._try(self.problem.better_half(list(fresh.values())))
        for trial in trials:
            self._settle(trial, study)
        return trials

    def _trial(self, number: int, values: Mapping[str, Any]) -> Trial:
        candidate = self.problem.space.decode(values, self.standard)
        try:
            units = self.problem.mask(candidate)
        except BillhookError:  # a shape that cannot save that much
            return Trial(number, candidate, "")
        return Trial(number, candidate, digest(units), units=units)

    def _try(self, trials: Sequence[Trial]) -> None:
        """Try candidates on the windows of one round, beside the standard."""
        if not trials:
            return
        masks = [self.problem.mask(Candidate(self.standard)), *(trial.units for trial in trials)]
        standard, *every = self.problem.evaluator.losses(masks, self.rungs.take(RUNGS[0]))
        for trial, losses in zip(trials, every, strict=True):
            self.worse[trial.mask] = statistics.fmean(losses) - statistics.fmean(standard)
            trial.losses["round"] = losses

    def _settle(self, trial: Trial, study: Study) -> None:
        """Set what became of a trial, and tell the sampler."""
        trial.proxy = self.problem.proxy(trial.units) if trial.mask else None
        trial.worse = self.worse.get(trial.mask)
        if not trial.mask or (trial.worse is not None and not math.isfinite(trial.worse)):
            trial.state, trial.worse = "failed", None
            study.tell(trial.number, None)
        elif trial.worse is None:
            assert trial.proxy is not None
            trial.state = "dropped"
            study.drop(trial.number, trial.proxy)
        else:
            trial.state = "tried" if "round" in trial.losses else "repeated"
            study.tell(trial.number, trial.worse)

    def promote(self, trials: Sequence[Trial]) -> list[Trial]:
        """Step 4, first half: try the best on more windows; returns them in the order of their fronts."""
        standard = self.problem.mask(Candidate(self.standard))
        promoted = best_of_each_mask(trials, PROMOTED, besides=digest(standard))
        if not promoted:
            return []
        masks = [standard, *(trial.units for trial in promoted)]
        of_standard, *every = self.problem.evaluator.losses(masks, self.rungs.take(RUNGS[1]), self.tick, "promoted")
        for trial, losses in zip(promoted, every, strict=True):
            trial.losses |= {"promoted": losses, "standard": of_standard}
        return by_fronts(promoted)
