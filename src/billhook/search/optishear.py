"""OptiShear's search (arXiv:2502.10735): by which metric, and with which sparsities over depth, a model loses weights best.

1. Norms      of what enters every linear weight, in one forward pass of the unpruned model.
2. Known ones Wanda's metric and RIA's are points of the space; Wanda's is the standard, which the search may not fall behind.
3. Rounds     a sampler asks for a few candidates; those whose zeros differ from all before are tried, zeros in place, on a few
              windows that the next round does not see again, against the standard on these very windows.
4. Ladder     the best go on to more windows, those on the front of gain and steadiness are pruned as the result will be.
5. Acceptance as in billhook.search.adapruner: windows that nothing has seen, paired, by more than two standard errors.

The paper scores trials by the distance of logits on its calibration prompts and searches each layer's sparsity afterwards;
here a slope and a bend over depth are dimensions of the same search.  Its steps 4 and 5 are billhook's.
"""

import copy
import hashlib
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from transformers import PreTrainedModel

from billhook.calibration.linears import operators
from billhook.cuts import masking
from billhook.cuts.masking import Masking
from billhook.errors import BillhookError
from billhook.math import sparsity
from billhook.math.optishear import FUNCTIONS, SCALES, Metric, norms_of, score
from billhook.models.families import layers
from billhook.runtime import cache
from billhook.runtime.progress import Clock, Tick, quiet
from billhook.runtime.run_folder import claim
from billhook.search.adapruner import said
from billhook.search.rounds import (
    BATCH,
    FINALISTS,
    HERE,
    PROMOTED,
    RESTORED_ON,
    RUNGS,
    Trial,
    Validation,
    deadline,
    fronts,
    gained,
    verdict,
)
from billhook.search.samplers import Study
from billhook.search.settings import SearchSettings
from billhook.search.space import Dimension, groups_of
from billhook.search.trials import Means, bench_of, tried
from billhook.tensors import Tokens, Weight, precise

KNOWN = {"wanda": Metric(), "ria": Metric("both", "identity", "none", "sqrt")}  # RIA: up to how its two sums add
STANDARD = "wanda"
# of its weights that a layer gives more or less by either dimension of depth; OptiShear's choices are 0.05 off
MOST = 0.1
NORMS = "norms of inputs"


@dataclass(frozen=True)
class Candidate:
    """A point of the space."""

    metric: Metric
    slope: float = 0.0  # how many more zeros the last layer has than the average, as a share of its weights
    bend: float = 0.0  # likewise both ends

    def describe(self) -> dict[str, Any]:
        return {"metric": str(self.metric), "slope": self.slope, "bend": self.bend}


@dataclass(frozen=True)
class Found:
    """What to make sparse, and how that came about."""

    how: Masking
    record: dict[str, Any]


def dimensions(groups: Sequence[str], how: Masking) -> dict[str, Dimension]:
    """By name, as Optuna knows them; sparsities differ over depth only where they are shares."""
    found: dict[str, Dimension] = {}
    if "metric" in groups:
        choices = {"alpha": SCALES, "f1": FUNCTIONS, "beta": SCALES, "f2": FUNCTIONS}
        found |= {name: Dimension(choices=names) for name, names in choices.items()}
    if "budgets" in groups and how.pattern.group is None and not how.by_layer:
        found |= {name: Dimension(-MOST, MOST, MOST / 5) for name in ("slope", "bend")}
    return found


def decode(given: Mapping[str, Any]) -> Candidate:
    """The candidate that values of the dimensions stand for; what is not open is Wanda's."""
    metric = Metric(*(given[name] for name in ("alpha", "f1", "beta", "f2"))) if "alpha" in given else Metric()
    slope, bend = (round(given.get(name, 0.0), 6) for name in ("slope", "bend"))  # steps of a tenth are not exact
    return Candidate(metric.canonical, slope, bend)


def with_candidate(how: Masking, one: Candidate, total: int) -> Masking:
    """What a candidate asks for: of `total` layers together as many zeros as `how`."""
    settings = replace(how.settings, metric=str(one.metric))
    if not (one.slope or one.bend):
        return replace(how, settings=settings)
    at = [2 * n / max(total - 1, 1) - 1 for n in range(total)]
    off = [one.slope * x + one.bend * (2 * x * x - 1) for x in at]
    shares = {n: how.pattern.share + each - statistics.fmean(off) for n, each in enumerate(off)}
    if min(shares.values()) < 0 or max(shares.values()) >= 1:
        raise BillhookError(f"a slope of {one.slope:g} and a bend of {one.bend:g} leave no share of zeros")
    return replace(how, settings=settings, by_layer=shares)


class Shears:
    """Candidates tried on one model, which is as it was after each."""

    def __init__(
        self,
        model: PreTrainedModel,
        how: Masking,
        tokens: Tokens,
        texts: Validation,
        objective: str,
        folder: Path | None,
        tick: Tick,
    ) -> None:
        self.model, self.how, self.texts, self.tick = model, how, texts, tick
        self.total, self.used = len(layers(model)), 0
        self.bench = bench_of(model, objective, folder)
        self.norms: dict[str, Tensor] = {}
        for group in operators(model, tokens, how.targets, stream="dense", held_out=0.0, tick=_renamed(tick)):
            norms = norms_of(group.fit.gram.diagonal().clone(), tokens.numel())
            self.norms |= {name: norms for name in group.names.values()}
        self.key = {
            **self.bench.key,
            "objective": objective,
            "norms": cache.digest({name: one.tolist() for name, one in self.norms.items()}),
            "how": [str(how.pattern), list(how.targets), how.keep_zeros],
        }

    def windows(self, count: int) -> Tokens:
        """The next windows of the rungs; from the start again when all were used."""
        found, self.used = self.texts.next(self.used, count)
        return found

    def zeros(self, one: Candidate) -> Iterator[tuple[str, Tensor]]:
        """Path of every weight and what stays of it (out, in)."""
        how = with_candidate(self.how, one, self.total)
        for n, _, name in masking.every(self.model, how.targets):
            W = precise(masking.weight_of(self.model, name))
            there = masking.held(W, how)
            yield name, sparsity.keep_mask(score(W, self.norms[name], one.metric), how.at(n), "row", there)

    @contextmanager
    def without(self, one: Candidate) -> Iterator[str]:
        """The model with a candidate's zeros, and their digest.

        Raises:
            BillhookError: its scores are not numbers; its sparsities are no shares.
        """
        whole: dict[str, Weight] = {}
        digest = hashlib.sha256()
        try:
            for name, stay in self.zeros(one):
                whole[name] = masking.weight_of(self.model, name)
                digest.update(np.packbits(stay.cpu().numpy()).tobytes())
                masking.put_weight(self.model, name, whole[name].masked_fill(~stay.to(whole[name].device), 0.0))
            yield digest.hexdigest()[:16]
        finally:
            for name, weight in whole.items():
                masking.put_weight(self.model, name, weight)

    def losses(
        self, candidates: Sequence[Candidate], windows: Tokens, tick: Tick = quiet
    ) -> list[tuple[str, list[float]]]:
        """Of every candidate the digest of its zeros and the loss of every window; no losses where it has no zeros."""
        taught = self.bench.taught(windows) if self.bench.objective == "kl" else None
        seen, found = hashlib.sha256(windows.numpy().tobytes()).hexdigest(), []
        for n, one in enumerate(candidates):
            tick("promoted", n, len(candidates))
            with ExitStack() as applied:
                try:
                    digest = applied.enter_context(self.without(one))
                except BillhookError:  # no such zeros: a trial that failed, and is counted
                    found.append(("", []))
                    continue
                key = {**self.key, "windows": seen, "mask": digest}
                given = self.model, {}, windows, taught, None, self.bench.autocast
                found.append((digest, cache.cached(self.bench.folder, "trial", key, lambda given=given: tried(*given))))
        tick("promoted", len(candidates), len(candidates))
        return found


def _renamed(tick: Tick) -> Tick:
    return lambda _, done, total: tick(NORMS, done, total)


def search(  # noqa: PLR0913
    model: PreTrainedModel,
    chosen: SearchSettings,
    how: Masking,
    texts: Validation,
    judges: Sequence[str],
    calibration: Tokens,
    *,
    folder: Path | None = None,
    means: Means = HERE,
    clock: Clock | None = None,
    tick: Tick = quiet,
) -> Found:
    """Search, and return what to make sparse: by what won, or by Wanda's metric.

    Raises:
        BillhookError: nothing is open to choose; the time is too short for one round; the study's folder is another search's.
    """
    clock, started = clock or Clock(), time.perf_counter()
    groups = groups_of(chosen.space)
    space = dimensions(("metric",) if chosen.space == "paper" else groups, how)
    if not space:
        raise BillhookError(
            f"--space {chosen.space} leaves nothing to choose for zeros: metric, and budgets without a --pattern, do"
        )
    if means.study:
        settled = chosen.model_dump(mode="json", exclude={"trials", "minutes"})
        claim(means.study, {**bench_of(model, chosen.objective, None).key, "settings": settled}, means.fresh)
    with clock("norms"):
        at = Shears(model, how, calibration, texts, chosen.objective, means.study or folder, tick)
    pace = (time.perf_counter() - started) / calibration.numel()
    over = deadline(chosen.minutes, started, pace * _end_tokens(texts, calibration[:RESTORED_ON].numel()))
    study = Study(space, chosen.sampler, chosen.seed)
    with clock("trials"):
        trials = _rounds(at, study, space, chosen.trials, over)
    with clock("promotion"):
        promoted = _promoted(at, trials)
    with clock("finals"):
        ended = _finals(at, promoted[:FINALISTS], calibration[:RESTORED_ON])
    winner: Candidate = ended.pop("candidate")
    record = {
        "method": "optishear",
        "space": chosen.space,
        "dimensions": list(space),
        "sampler": chosen.sampler,
        "objective": chosen.objective,
        "seed": chosen.seed,
        "trials": [said(trial, trial.candidate.describe()) for trial in trials],
        "promoted": [trial.number for trial in promoted],
        "importance": study.importance(),
        "winner": winner.describe(),
        **ended,
        "judges": list(judges),
        "validation": {part: list(getattr(texts, part).shape) for part in ("rungs", "final")},
        "rung_windows": at.used,
    }
    return Found(with_candidate(how, winner, at.total), record)


def _end_tokens(texts: Validation, calibration: int) -> int:
    """Tokens of the forward passes that follow the trials; a finalist takes some three of its calibration windows."""
    rungs = [count * texts.rungs.shape[1] for count in RUNGS]
    return (PROMOTED + 1) * rungs[1] + (FINALISTS + 1) * (rungs[2] + texts.final.numel() + 3 * calibration)


def _rounds(
    at: Shears, study: Study, space: Mapping[str, Dimension], most: int, over: Callable[[], bool]
) -> list[Trial]:
    trials: list[Trial] = []
    known: dict[str, float] = {}  # how much worse than the standard, by zeros
    same: dict[Candidate, str] = {}
    every = {**asdict(Metric()), "slope": 0.0, "bend": 0.0}
    warm = [{name: {**every, **asdict(metric)}[name] for name in space} for metric in KNOWN.values()]
    while len(trials) < most and not (trials and over()):
        at.tick("trials", len(trials), most)
        first = [] if trials else warm if "alpha" in space else warm[:1]
        count = min(BATCH, most - len(trials))
        asked = study.ask(count, first[:count])
        fresh = [one for one in dict.fromkeys(decode(given) for _, given in asked) if one not in same]
        yard, *found = at.losses([Candidate(KNOWN[STANDARD]), *fresh], at.windows(RUNGS[0]))
        news: dict[str, list[float]] = {}
        for one, (digest, losses) in zip(fresh, found, strict=True):
            same[one] = digest
            if digest and digest not in known:
                known[digest], news[digest] = statistics.fmean(losses) - statistics.fmean(yard[1]), losses
        for number, given in asked:
            one = decode(given)
            trial = Trial(number, one, same[one])
            trial.worse = known.get(trial.mask)
            if trial.worse is None or not np.isfinite(trial.worse):
                trial.state, trial.worse = "failed", None
            else:
                trial.state = "tried" if trial.mask in news else "repeated"
                trial.losses |= {"round": news.pop(trial.mask)} if trial.mask in news else {}
            study.tell(number, trial.worse)
            trials.append(trial)
    at.tick("trials", most, most)
    return trials


def _promoted(at: Shears, trials: Sequence[Trial]) -> list[Trial]:
    """The best, on more windows; in the order of the front of gain and steadiness."""
    best: dict[str, Trial] = {}
    standard = Candidate(KNOWN[STANDARD])
    for trial in sorted((t for t in trials if t.worse is not None), key=lambda t: (t.worse, t.number)):
        if trial.candidate != standard:
            best.setdefault(trial.mask, trial)
    up = list(best.values())[:PROMOTED]
    yard, *found = at.losses([standard, *(t.candidate for t in up)], at.windows(RUNGS[1]), at.tick)
    for trial, (_, losses) in zip(up, found, strict=True):
        trial.losses |= {"promoted": losses, "standard": yard[1]}
    return fronts([trial for trial in up if trial.mask != yard[0]])


def _finals(at: Shears, finalists: Sequence[Trial], calibration: Tokens) -> dict[str, Any]:
    """The winner, of candidates pruned in the result's own stream: the best finalist if it beats the standard, else that."""
    every: list[tuple[str | int, Candidate]] = [(STANDARD, Candidate(KNOWN[STANDARD]))]
    every += [(trial.number, trial.candidate) for trial in finalists]
    rung, losses = at.windows(RUNGS[2]), []
    for n, (_, one) in enumerate(every):
        at.tick("pruning finalists", n, len(every))
        how = with_candidate(at.how, one, at.total)
        key = {
            **at.key,
            "candidate": [one.describe(), sorted(how.by_layer.items())],
            "how": [*at.key["how"], how.stream, str(asdict(replace(how.settings, zeros=None)))],
            "calibration": cache.digest({"tokens": calibration.tolist()}),
            "windows": [cache.digest({"tokens": each.tolist()}) for each in (rung, at.texts.final)],
        }
        losses.append(
            cache.cached(
                at.bench.folder, "final", key, lambda how=how: _measured(at, how, calibration, (rung, at.texts.final))
            )
        )
    at.tick("pruning finalists", len(every), len(every))
    order = sorted(range(1, len(every)), key=lambda n: statistics.fmean(losses[n][0]))
    best = order[0] if order else 0
    decided = verdict(losses[0][1], losses[best][1])
    rows = [
        {
            "name": name,
            "rung": statistics.fmean(on_rung),
            "final": statistics.fmean(on_final),
            **gained(losses[0][1], on_final),
        }
        for (name, _), (on_rung, on_final) in zip(every, losses, strict=True)
    ]
    return {
        "candidate": every[best if decided["accepted"] else 0][1],
        "standard": STANDARD,
        "chosen": every[best][0] if best else None,
        "finalists": rows,
        **decided,
        "restoration": False,
    }


def _measured(at: Shears, how: Masking, calibration: Tokens, judges: Sequence[Tensor]) -> list[list[float]]:
    sparse = copy.deepcopy(at.model)
    masking.mask(sparse, calibration, how)
    return [tried(sparse, {}, windows, None, None, at.bench.autocast) for windows in judges]
