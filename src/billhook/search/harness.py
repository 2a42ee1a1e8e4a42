"""The harness of every search: candidates climb a ladder of windows, beside one standard all the way.

1. Rounds      a sampler proposes a few candidates.  Those that are new are tried on a few windows that the next round
               does not see again; the sampler is told by how much each is worse than the standard on these windows.
2. Promotion   the best, one for each mask, are tried on more windows.
3. Finals      the first on the front of gain and steadiness are made what the result would be, and one is left.
4. Acceptance  it is taken if it beats the best standard by more than two standard errors, paired, on windows that
               nothing has seen.
"""

import math
import statistics
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

from transformers import PreTrainedModel

from billhook.runtime.progress import Tick, quiet
from billhook.runtime.run import Run
from billhook.runtime.run_folder import claim
from billhook.search.evaluator import Evaluator, evaluator_of
from billhook.search.ladder import BATCH, FINALISTS, PROMOTED, RUNGS, deadline
from billhook.search.samplers import Study
from billhook.search.settings import SearchSettings
from billhook.search.space import Dimension
from billhook.search.trial import Trial, best_of_each_mask, by_fronts, paired_gain, verdict
from billhook.search.validation import RungWindows
from billhook.tensors import Tokens

Losses = Sequence[Sequence[float]]  # on the windows that choose a finalist, and on those that decide


@dataclass(frozen=True)
class Opening:
    """What is known before the first round."""

    dimensions: Mapping[str, Dimension]
    starts: Sequence[Mapping[str, Any]]  # values of the dimensions that are proposed first
    standard: Trial  # what every trial is compared with
    standards: Mapping[str, Any]  # candidates that finalists must beat, by name
    rungs: RungWindows
    end: float  # seconds that promotion and finals take
    worse: Mapping[str, float] = field(default_factory=dict)  # nats a token more than the standard, of known masks
    always_measures: bool = False  # whether windows are used up by the standard alone where nothing is to be tried


@runtime_checkable
class Problem(Protocol):
    """What is searched for."""

    opening: Opening

    def trial(self, number: int, values: Mapping[str, Any]) -> Trial:
        """The candidate that values of the dimensions stand for."""
        ...

    def worth_trying(self, trials: Sequence[Trial]) -> Sequence[Trial]:
        """Those of several new trials that are tried; where there is a proxy, the others are dropped by it."""
        return trials

    def losses(self, trials: Sequence[Trial], windows: Tokens, tick: Tick) -> Sequence[tuple[str, list[float]]]:
        """Each trial's mask and its loss on every window (windows, length); '' and no losses if it is impossible."""
        ...

    def finalists(self, trials: Sequence[Trial]) -> list[tuple[int, Any]]:
        """The candidates that the best trials stand for in the finals, each with a trial's number."""
        return [(trial.number, trial.candidate) for trial in trials]

    def finished(self, candidates: Sequence[Any], rung: Tokens) -> Sequence[Losses]:
        """Losses of candidates as the result would be, on `rung` and on the deciding windows."""
        ...

    def mark(self, candidate: Any) -> dict[str, Any]:
        """What the record of the finals says of a candidate, or of none (None)."""
        return {}


@dataclass(frozen=True)
class Outcome:
    """What is taken in the end."""

    winner: Any
    losses: Sequence[float]  # of the winner, on the deciding windows
    record: dict[str, Any]


def evaluator_for(model: PreTrainedModel, chosen: SearchSettings, run: Run, **decides: str) -> Evaluator:
    """What evaluates candidates; losses are kept in the run's folder, claimed for this search,
    or else in its statistics.

    Args:
        decides: further digests of what decides the search.

    Raises:
        BillhookError: the folder is another search's.
    """
    evaluator = evaluator_of(model, chosen.objective, run.folder or run.statistics)
    if run.folder:
        settings = dict(chosen.decides)
        claim(run.folder, {**evaluator.key, "settings": settings, **decides}, run.fresh)
    return evaluator


def search(problem: Problem, chosen: SearchSettings, run: Run, began: float) -> Outcome:
    """Search, and return the winner: a candidate, or the best standard.

    Args:
        began: when the search began, by `time.perf_counter`.

    Raises:
        BillhookError: the time is too short for one round.
    """
    opening = problem.opening
    is_over = deadline(chosen.minutes, began, opening.end)
    study = Study(opening.dimensions, chosen.sampler, chosen.seed)
    rounds = Rounds(problem, run.tick)
    with run.clock("trials"):
        trials = rounds.run(study, chosen.trials, is_over)
    with run.clock("promotion"):
        promoted = rounds.promote(trials)
    with run.clock("finals"):
        outcome = _decide(problem, problem.finalists(promoted[:FINALISTS]))
    record = {
        "space": chosen.space,
        "dimensions": list(opening.dimensions),
        "sampler": chosen.sampler,
        "objective": chosen.objective,
        "seed": chosen.seed,
        "trials": [trial.record() for trial in trials],
        "promoted": [trial.number for trial in promoted],
        "importance": study.importance(),
        "winner": outcome.winner.describe(),
        **outcome.record,
        "rung_windows": opening.rungs.used,
    }
    return replace(outcome, record=record)


class Rounds:
    """Batches of candidates, each compared with the standard on the same windows."""

    def __init__(self, problem: Problem, tick: Tick) -> None:
        self.problem, self.opening, self.tick = problem, problem.opening, tick
        self.worse = dict(self.opening.worse)  # nats a token more than the standard, by mask: all that were tried
        self.masks: dict[Hashable, str] = {
            "": "",
            **{mask: mask for mask in self.worse},
        }  # masks that are known, by what trials go by

    def run(self, study: Study, total: int, is_over: Callable[[], bool]) -> list[Trial]:
        """Rounds until the trials are used up or time is."""
        trials: list[Trial] = []
        while len(trials) < total and not (trials and is_over()):
            first = [] if trials else self.opening.starts
            count = min(max(BATCH, len(first)), total - len(trials))
            self.tick("trials", len(trials), total)
            trials += self._round(study, study.ask(count, first[:count]))
        self.tick("trials", total, total)
        return trials

    def _round(self, study: Study, proposals: Sequence[tuple[int, Mapping[str, Any]]]) -> list[Trial]:
        trials = [self.problem.trial(number, values) for number, values in proposals]
        fresh = {trial.key: trial for trial in reversed(trials) if trial.key not in self.masks}
        self._try(sorted(self.problem.worth_trying(list(fresh.values())), key=lambda trial: trial.number))
        for trial in trials:
            self._settle(trial, study)
        return trials

    def _beside_standard(self, trials: Sequence[Trial], rung: int, tick: Tick) -> Sequence[tuple[str, list[float]]]:
        """Mask and losses of the standard, then of each trial, on the same windows."""
        if not trials and not self.opening.always_measures:
            return [(self.opening.standard.mask, [])]
        return self.problem.losses([self.opening.standard, *trials], self.opening.rungs.take(RUNGS[rung]), tick)

    def _try(self, trials: Sequence[Trial]) -> None:
        """Try candidates on the windows of one round."""
        (_, standard), *results = self._beside_standard(trials, 0, quiet)
        for trial, (mask, losses) in zip(trials, results, strict=True):
            self.masks[trial.key] = mask
            if mask and mask not in self.worse:
                self.worse[mask] = statistics.fmean(losses) - statistics.fmean(standard)
                trial.losses["round"] = losses

    def _settle(self, trial: Trial, study: Study) -> None:
        """Set what became of a trial, and tell the sampler."""
        trial.mask = self.masks.get(trial.key, trial.mask)
        trial.worse = self.worse.get(trial.mask)
        if not trial.mask or (trial.worse is not None and not math.isfinite(trial.worse)):
            trial.state, trial.worse = "failed", None
        elif trial.worse is None:
            assert trial.proxy is not None
            trial.state = "dropped"
            study.drop(trial.number, trial.proxy)
            return
        else:
            trial.state = "tried" if "round" in trial.losses else "repeated"
        study.tell(trial.number, trial.worse)

    def promote(self, trials: Sequence[Trial]) -> list[Trial]:
        """Try the best on more windows; returns them in the order of their fronts."""
        promoted = best_of_each_mask([t for t in trials if t.key != self.opening.standard.key], PROMOTED)
        (mask, standard), *results = self._beside_standard(promoted, 1, self.tick)
        for trial, (_, losses) in zip(promoted, results, strict=True):
            trial.losses |= {"promoted": losses, "standard": standard}
        return by_fronts([trial for trial in promoted if trial.mask != mask])


def _decide(problem: Problem, finalists: Sequence[tuple[int, Any]]) -> Outcome:
    """The best finalist if it beats the best standard on windows that nothing has seen, else that standard."""
    standards = problem.opening.standards
    names = [*standards, *(number for number, _ in finalists)]
    candidates = [*standards.values(), *(candidate for _, candidate in finalists)]
    losses = problem.finished(candidates, problem.opening.rungs.take(RUNGS[2]))
    order = sorted(range(len(candidates)), key=lambda n: inf_unless_finite(statistics.fmean(losses[n][0])))
    standard = next(n for n in order if n < len(standards))
    best = next((n for n in order if n >= len(standards)), None)
    decided = verdict(losses[standard][1], losses[standard if best is None else best][1])
    rows = [
        {
            "name": name,
            **problem.mark(candidate),
            "rung": statistics.fmean(on_rung),
            "final": statistics.fmean(on_final),
            **paired_gain(losses[standard][1], on_final),
        }
        for name, candidate, (on_rung, on_final) in zip(names, candidates, losses, strict=True)
    ]
    taken = best if decided["accepted"] and best is not None else standard
    record = {
        "standard": names[standard],
        "chosen": None if best is None else names[best],
        **problem.mark(None if best is None else candidates[best]),
        "finalists": rows,
        **decided,
    }
    return Outcome(candidates[taken], losses[taken][1], record)


def inf_unless_finite(loss: float) -> float:
    return loss if math.isfinite(loss) else math.inf
