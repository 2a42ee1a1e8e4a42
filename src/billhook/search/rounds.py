"""The rounds of a search: known metrics, then batches of candidates, dropped by a proxy or tried in place (billhook.search.adapruner)."""

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from scipy.special import ndtr, stdtrit
from torch import Tensor
from transformers import PreTrainedModel

from billhook.errors import BillhookError
from billhook.math import selection
from billhook.models.axes import axes
from billhook.models.plan import Plan
from billhook.runtime.progress import Tick
from billhook.search.evidence import evidence, gate_fishers
from billhook.search.layer_blocks import Block, cheapest, lengths, patch
from billhook.search.metrics import TERMS, Solution, digest, scores
from billhook.search.pool import Pool
from billhook.search.samplers import Study
from billhook.search.settings import SearchSettings
from billhook.search.space import Candidate, Space, exchanged, groups_of, longest_block, shaped, space
from billhook.search.trials import WHOLE, Bench, Mask, Means, gone_in
from billhook.tensors import Tokens

BATCH = 8  # candidates of a round
SHORT = 128  # tokens of a window of the first rungs
RUNGS = (4, 16, 64)  # short windows of a round, of a promotion, and that choose among finalists
FINAL = 16  # windows of full length that decide in the end; a third of the text where it is short
PROXY = 32  # short windows whose gates' Fisher drops candidates untried; a third of what is left where that is short
LEAST = 12  # windows of full length
PROMOTED = 12
SURE = 2.0  # standard errors that a gain over many windows must exceed to be believed
ODDS = float(
    ndtr(-SURE)
)  # that a candidate which is just as good passes: one time in 44, whatever the number of windows


@dataclass(frozen=True)
class Validation:
    """Windows (windows, length) that candidates are tried on, none of them in the pool or in another part."""

    proxy: Tensor
    rungs: Tensor  # short ones, in the order of use
    final: Tensor

    def next(self, used: int, count: int) -> tuple[Tokens, int]:
        """The `count` windows of the rungs after `used` (all of them if they are fewer), and how many are used then."""
        count = min(count, len(self.rungs))
        return self.rungs[[n % len(self.rungs) for n in range(used, used + count)]], used + count


@dataclass
class Trial:
    """One candidate and what became of it."""

    number: int
    candidate: Any  # a point of the space
    mask: str  # digest of what it drops
    state: str = ""  # tried, repeated, dropped, failed
    proxy: float | None = None
    worse: float | None = None  # nats a token more than the standard, on the same windows
    losses: dict[str, list[float]] = field(default_factory=dict)  # of each rung


def validation(windows: Tokens, seed: int, leading: int = 0) -> Validation:
    """Split windows of full length, in an order drawn by `seed`: the last ones decide, the others are cut into short ones.

    Args:
        leading: special tokens that begin every window, and then every short one.

    Raises:
        BillhookError: they are too few.
    """
    if len(windows) < LEAST:
        raise BillhookError(
            f"the validation text has {len(windows)} windows of {windows.shape[1]} tokens, and a search needs {LEAST}: name a longer "
            "--validation, or lower --seq-len"
        )
    final, short = min(FINAL, len(windows) // 3), min(SHORT, windows.shape[1])
    order = torch.Generator().manual_seed(seed)
    windows = windows[torch.randperm(len(windows), generator=order)]
    first, text, room = windows[:1, :leading], windows[final:, leading:], short - leading
    pieces = text[:, : text.shape[1] // room * room].reshape(-1, room)
    pieces = torch.cat([first.expand(len(pieces), -1), pieces], 1)
    pieces = pieces[torch.randperm(len(pieces), generator=order)]
    proxy = min(PROXY, len(pieces) // 3)
    return Validation(pieces[:proxy], pieces[proxy:], windows[:final])


class Search:
    """One search: what it knows before the first trial, and what it does then."""

    def __init__(
        self,
        model: PreTrainedModel,
        chosen: SearchSettings,
        base: Plan,
        pool: Pool,
        texts: Validation,
        bench: Bench,
        tick: Tick,
    ) -> None:
        self.model, self.chosen, self.base, self.texts, self.bench, self.tick = model, chosen, base, texts, bench, tick
        kinds = tuple(dict.fromkeys(kind for _, kind in base.drops))
        self.axes = [axis for axis in axes(model, kinds) if (axis.layer, axis.kind) in base.drops]
        self.evidence = evidence(model, pool.tokens, pool.clusters, kinds, folder=bench.folder, tick=tick)
        self.fishers = gate_fishers(model, texts.proxy, kinds, folder=bench.folder, tick=tick)
        self.used = 0  # rung windows so far
        self.floor = min(chosen.floor, self._evenly() / 2)
        blocks = self._blocks(pool)
        self.space: Space = space(
            chosen.space, chosen.layout, self.evidence.count, len(pool.tokens), model, base, chosen.width_step, blocks
        )
        self.standard = Solution((1,) * self.evidence.count)
        self.masks: dict[str, Mask] = {}
        self.known: dict[str, float] = {}  # how much worse than the standard, by mask

    def _evenly(self) -> float:
        """The share of FFN channels that an even cut leaves.  A floor near to it would leave shapes nothing to choose: half of
        SmolLM2's decoder is two thirds of its channels, and a floor of 0.3 makes nearly all layers alike."""
        ffn = [axis for axis in self.axes if axis.kind == "ffn"]
        gone = sum(self.base.drops[axis.layer, "ffn"] for axis in ffn)
        return 1 - gone / sum(axis.units for axis in ffn) if ffn else 1.0

    def _blocks(self, pool: Pool) -> tuple[Block, ...]:
        """Of every length the block that costs least on a round's windows; what makes up for it goes to the bench."""
        open_ = self.chosen.layout == "uniform" and "budgets" in groups_of(self.chosen.space)
        counts = lengths(longest_block(self.model, self.base)) if open_ else range(0)
        if not counts:
            return ()
        found = cheapest(self.model, self.windows(RUNGS[0]), counts, self.bench.autocast, self.tick)
        if self.chosen.restores:
            made = {}
            for n, block in enumerate(found):
                self.tick("patching blocks", n, len(found))
                made[block] = patch(self.model, pool.tokens, block)
            self.bench = replace(self.bench, patches={block: one for block, one in made.items() if one})
        return found

    def plan(self, candidate: Candidate) -> Plan:
        base, step, own = self.base, self.chosen.width_step, next(iter(self.space.attention), None)
        if candidate.block or candidate.attention not in (None, own):
            other = {"attention": candidate.attention, "block": candidate.block}
            base = exchanged(self.model, base, step, self.chosen.layout, **other)
        if candidate.shape is None:
            return base
        return shaped(self.model, base, candidate.shape, step, self.floor)

    def mask(self, candidate: Candidate) -> str:
        """The digest of what a candidate drops by a solution of its own; `masks` has the units."""
        assert candidate.solution is not None
        plan, found = self.plan(candidate), scores(self.evidence, candidate.solution)
        dropped = {(n, WHOLE): torch.empty(0, dtype=torch.long) for n in plan.layers}
        for axis in self.axes:
            place = axis.layer, axis.kind
            if count := plan.drops.get(place, 0):
                dropped[place] = selection.lowest(found[place], count, axis.blocks)[0]
        self.masks[key := digest(dropped)] = dropped
        return key

    def proxy(self, mask: str) -> float:
        """1/2 sum over dropped units of the mean squared gate gradient: the loss's second order, gates taken one by one."""
        dropped = {place: units for place, units in self.masks[mask].items() if place[1] != WHOLE}
        return sum(float(self.fishers[place][units].sum()) for place, units in dropped.items()) / 2

    def pass_on(self, masks: Sequence[str]) -> list[str]:
        """The better half by the proxy; of those with the same layers gone, since it says nothing of whole layers."""
        alike: dict[tuple[int, ...], list[str]] = {}
        for mask in sorted(masks, key=self.proxy):
            alike.setdefault(gone_in(self.masks[mask]), []).append(mask)
        return [mask for some in alike.values() for mask in some[: math.ceil(len(some) / 2)]]

    def windows(self, count: int) -> Tokens:
        """The next windows of the rungs; from the start again when all were used."""
        found, self.used = self.texts.next(self.used, count)
        return found

    def try_known(self) -> list[dict[str, Any]]:
        """Step 2: every fixed metric of the space; `standard` is the best."""
        every = self.space.known
        masks = {name: self.mask(Candidate(one)) for name, one in every.items()}
        found = self.bench.losses(
            [self.masks[m] for m in masks.values()], self.windows(RUNGS[1]), self.tick, "known metrics"
        )
        losses = dict(zip(masks, found, strict=True))
        usable = {name: mean for name, each in losses.items() if math.isfinite(mean := statistics.fmean(each))}
        if not usable:
            raise BillhookError("no known metric gives a model with a finite loss here: lower the ratio")
        best = min(usable, key=lambda name: usable[name])
        self.standard, own = every[best], losses[best]
        for name, mask in masks.items():
            self.known[mask] = statistics.fmean(losses[name]) - statistics.fmean(own)
        return [
            {
                "metric": name,
                "meaning": TERMS[name][1],
                "mask": masks[name],
                "loss": statistics.fmean(each),
                "standard": name == best,
                **gained(own, each),
            }
            for name, each in losses.items()
        ]

    def rounds(self, study: Study, deadline: Callable[[], bool]) -> list[Trial]:
        """Step 3, until the trials are used up or time is."""
        trials: list[Trial] = []
        warm = [given for one in self.space.known.values() if self._says(given := self.space.encode(one), one)]
        while len(trials) < self.chosen.trials and not (trials and deadline()):
            first = warm if not trials else []
            count = min(max(BATCH, len(first)), self.chosen.trials - len(trials))
            self.tick("trials", len(trials), self.chosen.trials)
            trials += self._round(study, study.ask(count, first[:count]))
        self.tick("trials", self.chosen.trials, self.chosen.trials)
        return trials

    def _says(self, given: Mapping[str, Any], solution: Solution) -> bool:
        """Whether values of the dimensions can stand for a solution."""
        return self.space.decode(given, self.standard).solution == solution

    def _round(self, study: Study, asked: Sequence[tuple[int, Mapping[str, Any]]]) -> list[Trial]:
        trials = [self._trial(number, given) for number, given in asked]
        fresh = {t.mask: t for t in reversed(trials) if t.mask and t.mask not in self.known}
        passed = self.pass_on(list(fresh))
        if passed:
            yard = self.mask(Candidate(self.standard))
            found = self.bench.losses([self.masks[m] for m in (yard, *passed)], self.windows(RUNGS[0]))
            for mask, losses in zip(passed, found[1:], strict=True):
                self.known[mask] = statistics.fmean(losses) - statistics.fmean(found[0])
                fresh[mask].losses["round"] = losses
        for trial in trials:
            trial.proxy = self.proxy(trial.mask) if trial.mask else None
            trial.worse = self.known.get(trial.mask)
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
        return trials

    def _trial(self, number: int, given: Mapping[str, Any]) -> Trial:
        candidate = self.space.decode(given, self.standard)
        try:
            return Trial(number, candidate, self.mask(candidate))
        except BillhookError:  # a shape that cannot save that much
            return Trial(number, candidate, "")

    def promote(self, trials: Sequence[Trial]) -> list[Trial]:
        """Step 4, first half: the best of all, on more windows; in the order of the front of gain and steadiness."""
        yard = self.mask(Candidate(self.standard))
        best: dict[str, Trial] = {}
        for trial in sorted((t for t in trials if t.worse is not None), key=lambda t: (t.worse, t.number)):
            if trial.mask != yard:
                best.setdefault(trial.mask, trial)
        up = list(best.values())[:PROMOTED]
        if not up:
            return []
        found = self.bench.losses(
            [self.masks[m] for m in (yard, *(t.mask for t in up))], self.windows(RUNGS[1]), self.tick, "promoted"
        )
        for trial, losses in zip(up, found[1:], strict=True):
            trial.losses |= {"promoted": losses, "standard": found[0]}
        return fronts(up)


def fronts(trials: Sequence[Trial]) -> list[Trial]:
    """Those that no other beats in both mean and spread over two halves of the windows; then those that only these beat; …"""
    sides = {t.number: _sides(t) for t in trials}
    left, ordered = list(trials), []
    while left:
        front = [t for t in left if not any(_beats(sides[o.number], sides[t.number]) for o in left)]
        ordered += sorted(front, key=lambda t: sides[t.number][0])
        left = [t for t in left if t not in front]
    return ordered


def _sides(trial: Trial) -> tuple[float, float]:
    more = [a - b for a, b in zip(trial.losses["promoted"], trial.losses["standard"], strict=True)]
    half = len(more) // 2
    return statistics.fmean(more), abs(statistics.fmean(more[:half]) - statistics.fmean(more[half:]))


def _beats(one: tuple[float, float], other: tuple[float, float]) -> bool:
    return one != other and one[0] <= other[0] and one[1] <= other[1]


def gained(standard: Sequence[float], own: Sequence[float]) -> dict[str, float | None]:
    """Nats a token that `own` is better by, with its standard error, from the same windows."""
    less = [a - b for a, b in zip(standard, own, strict=True)]
    error = statistics.stdev(less) / math.sqrt(len(less)) if len(less) > 1 and all(map(math.isfinite, less)) else None
    return {"gain": statistics.fmean(less), "standard_error": error}


def verdict(standard: Sequence[float], own: Sequence[float]) -> dict[str, Any]:
    """What `own` gains, and whether that is believed; a candidate that is no better is believed to be with odds of `ODDS`.

    With n windows the error is itself uncertain: what `SURE` is to a normal, Student's t of n - 1 degrees of freedom has at
    2.2 errors for 16 windows, and at 3.3 for 4.
    """
    found = gained(standard, own)
    needed = float(stdtrit(max(len(own) - 1, 1), 1 - ODDS))
    gain, error = found["gain"] or 0.0, found["standard_error"]
    believed = gain == math.inf if error is None else gain > needed * error
    return {**found, "needed": needed, "odds": ODDS, "accepted": believed}


FINALISTS = 2
RESTORED_ON = 16  # calibration windows that finalists are restored on; the winner has all of them
HERE = Means()


def deadline(minutes: float | None, started: float, end: float) -> Callable[[], bool]:
    """Whether trials must end for the rest to be done in time."""
    if minutes is None:
        return lambda: False
    if time.perf_counter() - started + end > 60 * minutes:
        least = (time.perf_counter() - started + end) / 60
        raise BillhookError(
            f"--minutes {minutes:g} is too short for one trial: the pool, the known metrics and the end take {least:.1f} here"
        )
    return lambda: time.perf_counter() - started + end > 60 * minutes
