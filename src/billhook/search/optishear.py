"""OptiShear's search (arXiv:2502.10735): the best metric for a model's weights, and the best sparsities over depth.

1. Norms      of what enters every linear weight, in one forward pass of the unpruned model.
2. Known ones Wanda's metric and RIA's are points of the space; Wanda's is the standard, which the search may not fall
              behind.
3. Rounds     a sampler proposes a few candidates, which are tried with their zeros in place; then as in every search
              (billhook.search.harness).

The paper scores trials by the distance of logits on its calibration prompts and searches each layer's sparsity
afterwards; here a slope and a bend over depth are dimensions of the same search.  What comes after the rounds is
billhook's.
"""

import copy
import hashlib
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
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
from billhook.runtime.progress import Tick, quiet, ticked
from billhook.runtime.run import Run
from billhook.search import harness
from billhook.search.evaluator import Evaluator, masked_losses
from billhook.search.harness import Losses, Opening, Problem
from billhook.search.inputs import SearchTexts
from billhook.search.ladder import FINALISTS, RESTORED_ON, end_tokens
from billhook.search.settings import SearchSettings
from billhook.search.space import Dimension, groups_of
from billhook.search.trial import Trial
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
class OptiShear(Problem):
    """The search for a metric and sparsities, as the harness sees it.  After each trial the model is as it was."""

    base: Masking  # what is masked, by Wanda's metric
    norms: Mapping[str, Tensor]  # norms of the inputs of every linear weight, by the weight's path
    opening: Opening
    final: Tensor  # windows that decide
    calibration: Tokens  # windows that finalists are pruned on
    evaluator: Evaluator
    run: Run

    @property
    def model(self) -> PreTrainedModel:
        return self.evaluator.model

    @cached_property
    def key(self) -> dict[str, Any]:
        """What decides a loss besides candidate and windows."""
        return {
            **self.evaluator.key,
            "objective": self.evaluator.objective,
            "norms": cache.digest({name: values.tolist() for name, values in self.norms.items()}),
            "how": [str(self.base.pattern), list(self.base.targets), self.base.keep_zeros],
        }

    def masking(self, candidate: Candidate) -> Masking:
        return with_candidate(self.base, candidate, len(layers(self.model)))

    def trial(self, number: int, values: Mapping[str, Any]) -> Trial:
        """A trial that goes by its candidate: only once its zeros are in place is their digest known."""
        candidate = decode(values)
        return Trial(number, candidate, key=candidate)

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

    def losses(self, trials: Sequence[Trial], windows: Tokens, tick: Tick = quiet) -> list[tuple[str, list[float]]]:
        evaluator = self.evaluator
        targets = evaluator.dense_predictions(windows) if evaluator.objective == "kl" else None
        windows_sha256, results = hashlib.sha256(windows.numpy().tobytes()).hexdigest(), []
        for trial in ticked(trials, "promoted", tick):
            with ExitStack() as stack:
                try:
                    mask = stack.enter_context(self.applied(trial.candidate))
                except BillhookError:  # a trial that failed, which is counted
                    results.append(("", []))
                    continue
                measure = partial(masked_losses, self.model, {}, windows, targets, None, evaluator.autocast)
                key = {**self.key, "windows": windows_sha256, "mask": mask}
                results.append((mask, cache.cached(evaluator.folder, "trial", key, measure)))
        return results

    def finished(self, candidates: Sequence[Candidate], rung: Tokens) -> list[Losses]:
        """Pruned in the result's own stream, on fewer calibration windows."""
        losses: list[Losses] = []
        for candidate in ticked(candidates, "pruning finalists", self.run.tick):
            wanted = self.masking(candidate)
            key = {
                **self.key,
                "candidate": [candidate.describe(), sorted(wanted.by_layer.items())],
                "how": [*self.key["how"], wanted.stream, str(asdict(replace(wanted.settings, zeros=None)))],
                "calibration": cache.digest({"tokens": self.calibration.tolist()}),
            }
            losses.append(self.evaluator.finished_losses(key, partial(self._pruned, wanted), (rung, self.final)))
        return losses

    def _pruned(self, wanted: Masking) -> PreTrainedModel:
        sparse = copy.deepcopy(self.model)
        masking.mask(sparse, self.calibration, wanted, Run(hidden=self.run.hidden))
        return sparse


def begin(
    evaluator: Evaluator,
    space: Mapping[str, Dimension],
    base: Masking,
    validation: Validation,
    calibration: Tokens,
    run: Run,
) -> OptiShear:
    """Step 1: the norms of what enters every linear weight.

    Args:
        calibration: (windows, length), what the norms are measured and finalists pruned on.
    """

    def tick_norms(_: str, done: int, total: int) -> None:
        run.tick(NORMS, done, total)

    norms, before = dict[str, Tensor](), time.perf_counter()
    with run.clock("norms"):
        for group in operators(
            evaluator.model, calibration, base.targets, Run(tick_norms, hidden=run.hidden), Route(held_out=0.0)
        ):
            of_group = norms_of(group.fit.gram.diagonal().clone(), calibration.numel())
            norms |= {name: of_group for name in group.names.values()}
    seconds, pruned_on = (time.perf_counter() - before) / calibration.numel(), calibration[:RESTORED_ON]
    every = [{"slope": 0.0, "bend": 0.0, **asdict(metric)} for metric in KNOWN.values()]
    starts = [{name: values[name] for name in space} for values in (every if "alpha" in space else every[:1])]
    opening = Opening(
        dimensions=space,
        starts=starts,
        standards={STANDARD: STANDARD_CANDIDATE},
        standard=Trial(-1, STANDARD_CANDIDATE, key=STANDARD_CANDIDATE),
        rungs=RungWindows(validation.rungs),
        end=seconds * end_tokens(validation, FINALISTS + 1, PRUNING * pruned_on.numel()),
        always_measures=True,
    )
    return OptiShear(base, norms, opening, validation.final, pruned_on, evaluator, run)


def search(
    model: PreTrainedModel,
    chosen: SearchSettings,
    base: Masking,
    texts: SearchTexts,
    calibration: Tokens,
    run: Run,
) -> Found:
    """Search, and return what to make sparse: by the metric that won, or by Wanda's.

    Args:
        base: what is masked, and how many zeros there are.
        calibration: (windows, length), what the norms are measured and finalists pruned on.

    Raises:
        BillhookError: nothing is open to choose; the time is too short for one round; the run's folder is another
            search's.
    """
    began, validation = time.perf_counter(), texts.validation
    space = dimensions(("metric",) if chosen.space == "paper" else groups_of(chosen.space), base)
    if not space:
        raise BillhookError(
            f"--space {chosen.space} leaves nothing to choose for zeros: choose metric, or budgets without a --pattern"
        )
    problem = begin(harness.evaluator_for(model, chosen, run), space, base, validation, calibration, run)
    outcome = harness.search(problem, chosen, run, began)
    record = outcome.record | {
        "method": "optishear",
        "restoration": False,
        "judges": list(texts.names),
        "validation": {part: list(getattr(validation, part).shape) for part in ("rungs", "final")},
    }
    return Found(problem.masking(outcome.winner), record)
