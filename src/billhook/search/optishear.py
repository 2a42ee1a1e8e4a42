"""OptiShear's search (arXiv:2502.10735): the best metric for a model's weights, and the best sparsities over depth.

1. Norms      of what enters every linear weight, in one forward pass of the unpruned model.
2. Known ones Wanda's metric and RIA's are points of the space; Wanda's is the standard, which the search may not fall
              behind.
3. Rounds     a sampler proposes a few candidates.  Those whose zeros differ from all before are tried, zeros in place,
              on a few windows that the next round does not see again, against the standard on the same windows.
4. Ladder     the best are tried on more windows; those on the front of gain and steadiness are pruned as the result
              will be.
5. Acceptance as in billhook.search.adapruner: by more than two standard errors, paired, on windows that nothing has
              seen.

The paper scores trials by the distance of logits on its calibration prompts and searches each layer's sparsity
afterwards; here a slope and a bend over depth are dimensions of the same search.  Steps 4 and 5 are billhook's.
"""

import copy
import hashlib
import math
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
from billhook.calibration.passage import Route
from billhook.cuts import masking
from billhook.cuts.masking import Masking
from billhook.errors import BillhookError
from billhook.math import sparsity
from billhook.math.metric import FUNCTIONS, SCALES, Metric
from billhook.math.optishear import norms_of, score
from billhook.models.families import layers
from billhook.runtime import cache
from billhook.runtime.progress import Clock, Tick, quiet
from billhook.runtime.run import Run
from billhook.runtime.run_folder import claim
from billhook.search.evaluator import IN_PROCESS, Evaluator, Execution, evaluator_of, masked_losses
from billhook.search.inputs import SearchTexts
from billhook.search.ladder import BATCH, FINALISTS, PROMOTED, RESTORED_ON, RUNGS, deadline
from billhook.search.samplers import Study
from billhook.search.settings import SearchSettings
from billhook.search.space import Dimension, groups_of
from billhook.search.trial import Trial, best_of_each_mask, by_fronts, paired_gain, verdict
from billhook.search.validation import RungWindows, Validation
from billhook.tensors import Tokens, Weight, precise

KNOWN = {
    "wanda": Metric(),
    "ria": Metric("both", "identity", "none", "sqrt"),  # RIA, up to how its two sums are added
}
STANDARD = "wanda"
# the largest slope or bend, as a share of a layer's weights; OptiShear's choices of sparsity are 0.05 apart
STEEPEST = 0.1
NORMS = "norms of inputs"
PRUNING = 3  # forward passes over the calibration windows that pruning a finalist costs


@dataclass(frozen=True)
class Candidate:
    """A point of the space."""

    metric: Metric
    slope: float = 0.0  # how many more zeros the last layer has than the average layer, as a share of its weights
    bend: float = 0.0  # how many more zeros the first and the last layer have, as a share of their weights

    def describe(self) -> dict[str, Any]:
        return {"metric": str(self.metric), "slope": self.slope, "bend": self.bend}


STANDARD_CANDIDATE = Candidate(KNOWN[STANDARD])


@dataclass(frozen=True)
class Found:
    """What to make sparse, and how that came about."""

    masking: Masking
    record: dict[str, Any]


def dimensions(groups: Sequence[str], base: Masking) -> dict[str, Dimension]:
    """The open dimensions, by Optuna's names for them; slope and bend are open only where sparsities are shares."""
    opened: dict[str, Dimension] = {}
    if "metric" in groups:
        choices = {"alpha": SCALES, "f1": FUNCTIONS, "beta": SCALES, "f2": FUNCTIONS}
        opened |= {name: Dimension(choices=names) for name, names in choices.items()}
    if "budgets" in groups and base.pattern.group is None and not base.by_layer:
        opened |= {name: Dimension(-STEEPEST, STEEPEST, STEEPEST / 5) for name in ("slope", "bend")}
    return opened


def decode(values: Mapping[str, Any]) -> Candidate:
    """The candidate that values of the dimensions stand for; what is not open is Wanda's."""
    metric = Metric(*(values[name] for name in ("alpha", "f1", "beta", "f2"))) if "alpha" in values else Metric()
    slope, bend = (round(values.get(name, 0.0), 6) for name in ("slope", "bend"))  # steps of a tenth are not exact
    return Candidate(metric.canonical, slope, bend)


def with_candidate(base: Masking, candidate: Candidate, total: int) -> Masking:
    """What a candidate asks for: over `total` layers together as many zeros as `base`.

    Raises:
        BillhookError: slope and bend leave some layer without a share of zeros between 0 and 1.
    """
    settings = replace(base.settings, metric=str(candidate.metric))
    if not (candidate.slope or candidate.bend):
        return replace(base, settings=settings)
    depths = [2 * n / max(total - 1, 1) - 1 for n in range(total)]  # from -1 at the first layer to 1 at the last
    offsets = [candidate.slope * x + candidate.bend * (2 * x * x - 1) for x in depths]
    shares = {n: base.pattern.share + offset - statistics.fmean(offsets) for n, offset in enumerate(offsets)}
    if min(shares.values()) < 0 or max(shares.values()) >= 1:
        raise BillhookError(f"a slope of {candidate.slope:g} and a bend of {candidate.bend:g} leave no share of zeros")
    return replace(base, settings=settings, by_layer=shares)


@dataclass(frozen=True)
class Problem:
    """What is known before the first trial.  Candidates are tried on one model, which is as it was after each."""

    base: Masking  # what is masked, by Wanda's metric
    norms: Mapping[str, Tensor]  # norms of the inputs of every linear weight, by the weight's path
    validation: Validation
    evaluator: Evaluator
    key: Mapping[str, Any]  # what decides a loss besides candidate and windows

    @property
    def model(self) -> PreTrainedModel:
        return self.evaluator.model

    def masking(self, candidate: Candidate) -> Masking:
        return with_candidate(self.base, candidate, len(layers(self.model)))

    def kept(self, candidate: Candidate) -> Iterator[tuple[str, Tensor]]:
        """Every weight's path, and which entries (out, in) a candidate keeps."""
        wanted = self.masking(candidate)
        for n, _, name in masking.every(self.model, wanted.targets):
            W = precise(masking.weight_of(self.model, name))
            fixed = masking.held(W, wanted)
            yield name, sparsity.keep_mask(score(W, self.norms[name], candidate.metric), wanted.at(n), "row", fixed)

    @contextmanager
    def applied(self, candidate: Candidate) -> Iterator[str]:
        """The model with a candidate's zeros while open; yields their digest.

        Raises:
            BillhookError: the candidate's scores are not numbers; its sparsities are not shares.
        """
        originals: dict[str, Weight] = {}
        sha256 = hashlib.sha256()
        try:
            for name, keep in self.kept(candidate):
                weight = originals[name] = masking.weight_of(self.model, name)
                sha256.update(np.packbits(keep.cpu().numpy()).tobytes())
                masking.put_weight(self.model, name, weight.masked_fill(~keep.to(weight.device), 0.0))
            yield sha256.hexdigest()[:16]
        finally:
            for name, weight in originals.items():
                masking.put_weight(self.model, name, weight)

    def losses(
        self, candidates: Sequence[Candidate], windows: Tokens, tick: Tick = quiet
    ) -> list[tuple[str, list[float]]]:
        """The digest of each candidate's zeros, and its loss on every window; '' and no losses if it is impossible."""
        evaluator = self.evaluator
        targets = evaluator.dense_predictions(windows) if evaluator.objective == "kl" else None
        windows_sha256, results = hashlib.sha256(windows.numpy().tobytes()).hexdigest(), []
        for n, candidate in enumerate(candidates):
            tick("promoted", n, len(candidates))
            with ExitStack() as stack:
                try:
                    mask = stack.enter_context(self.applied(candidate))
                except BillhookError:  # a trial that failed, which is counted
                    results.append(("", []))
                    continue
                key = {**self.key, "windows": windows_sha256, "mask": mask}
                losses = cache.cached(
                    evaluator.folder,
                    "trial",
                    key,
                    lambda: masked_losses(self.model, {}, windows, targets, None, evaluator.autocast),
                )
                results.append((mask, losses))
        tick("promoted", len(candidates), len(candidates))
        return results

    def pruned_losses(self, candidate: Candidate, calibration: Tokens, rung: Tensor) -> list[list[float]]:
        """Losses on `rung` and on the deciding windows of a candidate that is pruned as the result will be."""
        wanted, both = self.masking(candidate), (rung, self.validation.final)
        key = {
            **self.key,
            "candidate": [candidate.describe(), sorted(wanted.by_layer.items())],
            "how": [*self.key["how"], wanted.stream, str(asdict(replace(wanted.settings, zeros=None)))],
            "calibration": cache.digest({"tokens": calibration.tolist()}),
            "windows": [cache.digest({"tokens": windows.tolist()}) for windows in both],
        }

        def measure() -> list[list[float]]:
            sparse = copy.deepcopy(self.model)
            masking.mask(sparse, calibration, wanted, Run())
            return [masked_losses(sparse, {}, windows, None, None, self.evaluator.autocast) for windows in both]

        return cache.cached(self.evaluator.folder, "final", key, measure)


def prepare(base: Masking, tokens: Tokens, validation: Validation, evaluator: Evaluator, tick: Tick) -> Problem:
    """Step 1: the norms of what enters every linear weight.

    Args:
        tokens: calibration windows (windows, length).
    """

    def tick_norms(_: str, done: int, total: int) -> None:
        tick(NORMS, done, total)

    norms: dict[str, Tensor] = {}
    for group in operators(evaluator.model, tokens, base.targets, Run(tick_norms), Route(held_out=0.0)):
        of_group = norms_of(group.fit.gram.diagonal().clone(), tokens.numel())
        norms |= {name: of_group for name in group.names.values()}
    key = {
        **evaluator.key,
        "objective": evaluator.objective,
        "norms": cache.digest({name: values.tolist() for name, values in norms.items()}),
        "how": [str(base.pattern), list(base.targets), base.keep_zeros],
    }
    return Problem(base, norms, validation, evaluator, key)


def search(
    model: PreTrainedModel,
    chosen: SearchSettings,
    base: Masking,
    texts: SearchTexts,
    calibration: Tokens,
    *,
    folder: Path | None = None,
    execution: Execution = IN_PROCESS,
    clock: Clock | None = None,
    tick: Tick = quiet,
) -> Found:
    """Search, and return what to make sparse: by the metric that won, or by Wanda's.

    Args:
        base: what is masked, and how many zeros there are.
        calibration: (windows, length), what the norms are measured and finalists pruned on.
        folder: keeps every loss where the search has no study folder.

    Raises:
        BillhookError: nothing is open to choose; the time is too short for one round; the study folder is another
            search's.
    """
    clock, started = clock or Clock(), time.perf_counter()
    space = dimensions(("metric",) if chosen.space == "paper" else groups_of(chosen.space), base)
    if not space:
        raise BillhookError(
            f"--space {chosen.space} leaves nothing to choose for zeros: choose metric, or budgets without a --pattern"
        )
    evaluator = evaluator_of(model, chosen.objective, execution.study or folder)
    if execution.study:
        settled = chosen.model_dump(mode="json", exclude={"trials", "minutes"})
        claim(execution.study, {**evaluator.key, "settings": settled}, execution.fresh)
    rungs = RungWindows(texts.validation.rungs)
    with clock("norms"):
        problem = prepare(base, calibration, texts.validation, evaluator, tick)
    pace = (time.perf_counter() - started) / calibration.numel()
    end = pace * _end_tokens(texts.validation, calibration[:RESTORED_ON].numel())
    is_over = deadline(chosen.minutes, started, end)
    study = Study(space, chosen.sampler, chosen.seed)
    rounds = Rounds(problem, space, rungs, tick)
    with clock("trials"):
        trials = rounds.run(study, chosen.trials, is_over)
    with clock("promotion"):
        promoted = rounds.promote(trials)
    with clock("finals"):
        winner, decided = _decide(problem, promoted[:FINALISTS], calibration[:RESTORED_ON], rungs.take(RUNGS[2]), tick)
    record = {
        "method": "optishear",
        "space": chosen.space,
        "dimensions": list(space),
        "sampler": chosen.sampler,
        "objective": chosen.objective,
        "seed": chosen.seed,
        "trials": [trial.record(trial.candidate.describe()) for trial in trials],
        "promoted": [trial.number for trial in promoted],
        "importance": study.importance(),
        "winner": winner.describe(),
        **decided,
        "judges": list(texts.names),
        "validation": {part: list(getattr(texts.validation, part).shape) for part in ("rungs", "final")},
        "rung_windows": rungs.used,
    }
    return Found(problem.masking(winner), record)


def _end_tokens(validation: Validation, calibration: int) -> int:
    """Tokens of the forward passes that follow the trials."""
    _, promotion, choice = (count * validation.rungs.shape[1] for count in RUNGS)
    finalist = choice + validation.final.numel() + PRUNING * calibration
    return (PROMOTED + 1) * promotion + (FINALISTS + 1) * finalist


class Rounds:
    """Batches of candidates, each compared with the standard on the same windows."""

    def __init__(self, problem: Problem, space: Mapping[str, Dimension], rungs: RungWindows, tick: Tick) -> None:
        self.problem, self.space, self.rungs, self.tick = problem, space, rungs, tick
        self.worse: dict[str, float] = {}  # nats a token more than the standard, by the digest of the zeros
        self.masks: dict[Candidate, str] = {}  # digest of the zeros of every candidate so far

    def run(self, study: Study, total: int, is_over: Callable[[], bool]) -> list[Trial]:
        """Step 3, until the trials are used up or time is."""
        trials: list[Trial] = []
        starts = self._starts()
        while len(trials) < total and not (trials and is_over()):
            self.tick("trials", len(trials), total)
            count = min(BATCH, total - len(trials))
            trials += self._round(study, study.ask(count, [] if trials else starts[:count]))
        self.tick("trials", total, total)
        return trials

    def _starts(self) -> list[dict[str, Any]]:
        """Values of the dimensions for the known metrics, as far as the space can express them."""
        even = {"slope": 0.0, "bend": 0.0}
        every = [{name: {**even, **asdict(metric)}[name] for name in self.space} for metric in KNOWN.values()]
        return every if "alpha" in self.space else every[:1]

    def _round(self, study: Study, proposals: Sequence[tuple[int, Mapping[str, Any]]]) -> list[Trial]:
        candidates = {number: decode(values) for number, values in proposals}
        fresh = [candidate for candidate in dict.fromkeys(candidates.values()) if candidate not in self.masks]
        (_, standard), *results = self.problem.losses([STANDARD_CANDIDATE, *fresh], self.rungs.take(RUNGS[0]))
        first: dict[str, list[float]] = {}  # losses of zeros that were not seen before, by their digest
        for candidate, (mask, losses) in zip(fresh, results, strict=True):
            self.masks[candidate] = mask
            if mask and mask not in self.worse:
                self.worse[mask] = statistics.fmean(losses) - statistics.fmean(standard)
                first[mask] = losses
        trials = []
        for number, candidate in candidates.items():
            trial = Trial(number, candidate, self.masks[candidate])
            trial.worse = self.worse.get(trial.mask)
            if trial.worse is None or not math.isfinite(trial.worse):
                trial.state, trial.worse = "failed", None
            elif trial.mask in first:
                trial.state = "tried"
                trial.losses["round"] = first.pop(trial.mask)
            else:
                trial.state = "repeated"
            study.tell(number, trial.worse)
            trials.append(trial)
        return trials

    def promote(self, trials: Sequence[Trial]) -> list[Trial]:
        """Step 4, first half: try the best on more windows; returns them in the order of their fronts."""
        others = [trial for trial in trials if trial.candidate != STANDARD_CANDIDATE]
        promoted = best_of_each_mask(others, PROMOTED)
        candidates = [STANDARD_CANDIDATE, *(trial.candidate for trial in promoted)]
        (mask, standard), *results = self.problem.losses(candidates, self.rungs.take(RUNGS[1]), self.tick)
        for trial, (_, losses) in zip(promoted, results, strict=True):
            trial.losses |= {"promoted": losses, "standard": standard}
        return by_fronts([trial for trial in promoted if trial.mask != mask])


def _decide(
    problem: Problem, finalists: Sequence[Trial], calibration: Tokens, rung: Tensor, tick: Tick
) -> tuple[Candidate, dict[str, Any]]:
    """The best finalist if it beats the standard, else that, pruned in the result's own stream; and the record."""
    names: list[str | int] = [STANDARD, *(trial.number for trial in finalists)]
    candidates = [STANDARD_CANDIDATE, *(trial.candidate for trial in finalists)]
    losses = []
    for n, candidate in enumerate(candidates):
        tick("pruning finalists", n, len(candidates))
        losses.append(problem.pruned_losses(candidate, calibration, rung))
    tick("pruning finalists", len(candidates), len(candidates))
    order = sorted(range(1, len(candidates)), key=lambda n: statistics.fmean(losses[n][0]))
    best = order[0] if order else 0
    decided = verdict(losses[0][1], losses[best][1])
    rows = [
        {
            "name": name,
            "rung": statistics.fmean(on_rung),
            "final": statistics.fmean(on_final),
            **paired_gain(losses[0][1], on_final),
        }
        for name, (on_rung, on_final) in zip(names, losses, strict=True)
    ]
    return candidates[best if decided["accepted"] else 0], {
        "standard": STANDARD,
        "chosen": names[best] if best else None,
        "finalists": rows,
        **decided,
        "restoration": False,
    }
