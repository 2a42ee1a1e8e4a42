"""The trials of `auto`: cuts as they would be made, on a few windows, in one process or several, and which is best.

Every cut is made in a copy of the model, refined by one pass, and compared with the unpruned model on windows that no
fit has seen: what refines well may win where the closed form alone would lose.  What the closed form leaves too far
behind the best before it is not refined.  Where several processes work, a cut may be refined before it is known to be
too far behind; that refinement then does not count, so that it is decided as in one process.
"""

import copy
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from statistics import fmean, stdev
from typing import Any

from billhook.methods.rivals import Ready
from billhook.planning.method import Run, Texts

GAINED = 1 / 8  # share of its divergence that a refinement took off a cut of widths, at most (docs/LOG.md)


@dataclass(frozen=True)
class Tried:
    """What one trial came to."""

    closed: Sequence[float]  # nats a token from the unpruned model, by window, as the closed form leaves it
    refined: Sequence[float] | None  # and when it is refined
    seconds: float


@dataclass(frozen=True)
class Bench:
    """A model, and what its cuts are tried on."""

    model: Any  # unpruned
    texts: Texts  # the windows that cuts are fitted on, and those that judge them
    refining: Any  # or None
    hidden: Any = None  # room for hidden states

    @cached_property
    def standard(self) -> Any:
        """What the unpruned model says of the windows that judge."""
        from billhook.calibration.nearness import Standard

        return Standard(self.model, self.texts.probe)

    def tried(self, made: Ready, least: float) -> Tried:
        """One cut, tried in a copy of the model.

        Args:
            least: nats a token of the best so far: what is too far behind it is not refined.
        """
        from billhook.runtime.run import Run
        from billhook.training.refinement import aims, refine, spans_of

        standard, (method, planned), tokens = self.standard, made, self.texts.calibration
        run, started, model = Run(hidden=self.hidden), time.perf_counter(), copy.deepcopy(self.model)
        method.carry_out(model, self.texts, planned, run)
        closed, refined = standard.divergences(model), None
        if self.refining is not None and not _too_far(closed, least):
            wanted = spans_of(self.model, planned.plan, self.refining.length)
            refine(model, tokens, aims(self.model, tokens, wanted, self.refining, run), self.refining, run)
            refined = standard.divergences(model)
        return Tried(closed, refined, time.perf_counter() - started)


def tried(bench: Bench, found: Mapping[str, Ready], run: Run) -> dict[str, Tried]:
    """Every cut's trial, in the order given.

    The run's `folder` keeps what was found, for the same run after a kill.
    """
    from billhook.runtime import cache

    def key(name: str) -> dict[str, Any]:
        return {"rival": name, "plan": repr(found[name][1].plan), "windows": len(bench.texts.calibration)}

    done: dict[str, Tried] = {}
    missing = [name for name in found if not cache.has(run.folder, "trial", key(name))]
    # in several processes what is known when one of them is free
    items = ((found[name], min(map(_mean, losses_of(done).values()), default=math.inf)) for name in missing)
    with run.clock("trials"), _at_work(bench, run, len(missing)) as each:
        results = each(items)
        for number, name in enumerate(found):
            run.tick("trying cuts", number, len(found))
            one = cache.cached(run.folder, "trial", key(name), lambda: asdict(next(results)))
            done[name] = Tried(**one)
    run.tick("trying cuts", len(found), len(found))
    return done


def losses_of(done: Mapping[str, Tried]) -> dict[str, Sequence[float]]:
    """How far each cut is from the unpruned model, nats a token, by window: refined where it was not too far behind
    those before it."""
    found: dict[str, Sequence[float]] = {}
    least = math.inf
    for name, one in done.items():
        found[name] = one.closed if one.refined is None or _too_far(one.closed, least) else one.refined
        least = min(least, _mean(found[name]))
    return found


def best(losses: Mapping[str, Sequence[float]]) -> str:
    """The first that is not worse than the least by more than two standard errors
    of the difference, window by window."""
    near = (name for name, (more, error) in behind(losses).items() if more <= 2 * (error or 0.0))
    return next(near, next(iter(losses)))  # none is, where all losses are no numbers


def behind(losses: Mapping[str, Sequence[float]]) -> dict[str, tuple[float, float | None]]:
    """By how much each is behind the least, nats a token, and the standard error of that; None of a single window, or
    where a loss is no number."""
    least, found = min(losses.values(), key=_mean, default=[]), {}
    for name, each in losses.items():
        more = [a - b for a, b in zip(each, least, strict=True)]
        several = len(more) > 1 and all(map(math.isfinite, more))
        found[name] = fmean(more), stdev(more) / len(more) ** 0.5 if several else None
    return found


def record_of(done: Mapping[str, Tried]) -> dict[str, Any]:
    """What a report shows of trials: nats a token, mean over windows; and how each was come by."""
    taken = losses_of(done)
    trials = {
        name: {
            "closed": fmean(one.closed),
            "refined": taken[name] is one.refined,
            "behind": more,
            "behind_standard_error": error,
            "seconds": round(one.seconds, 1),
        }
        for (name, one), (more, error) in zip(done.items(), behind(taken).values(), strict=True)
    }
    return {"tried": {name: fmean(each) for name, each in taken.items()}, "trials": trials}


def _mean(each: Sequence[float]) -> float:
    """Infinite, where a loss is no number."""
    found = fmean(each)
    return found if math.isfinite(found) else math.inf


def _too_far(closed: Sequence[float], least: float) -> bool:
    return (1 - GAINED) * _mean(closed) > least


Each = Callable[[Iterable[tuple[Ready, float]]], Iterator[Tried]]  # tries cuts, in order; takes the next when it can


@contextmanager
def _at_work(bench: Bench, run: Run, count: int) -> Iterator[Each]:
    """Yield what tries cuts: here, or in the processes of a run, no more than cuts, each of which opens the model."""
    from billhook.runtime.workers import worker_pool

    workers, device = replace(run.workers, jobs=min(run.workers.jobs, max(1, count))), str(bench.model.device)
    if not workers.many:
        yield lambda items: (bench.tried(*item) for item in items)
        return
    opens = {"name": workers.name, "device": device, "dtype": workers.dtype, "family_row": workers.family_row}
    with worker_pool(workers, device, partial(_opened, opens, bench.texts, bench.refining, run.hidden.limit)) as pool:
        yield lambda items: pool.map(_tried, items)


def _opened(opens: dict[str, Any], texts: Texts, refining: Any, limit: Any) -> Bench:
    from billhook.checkpoints.load import open_model
    from billhook.runtime.activations import Room

    return Bench(open_model(**opens).model, texts, refining, Room(limit))


def _tried(bench: Bench, item: tuple[Ready, float]) -> Tried:
    return bench.tried(*item)
