"""AdaPruner (Kong et al. 2025, arXiv:2503.06184): search the calibration samples and the importance metric together.

1. Evidence     one backward pass over a pool of windows; after it a candidate's mask costs no data
                (billhook.search.metrics).
2. Known ones   every known metric on the whole pool is tried; the best is the standard, which the search may not fall
                behind.
3. Rounds       a sampler proposes a few candidates.  A proxy without a forward pass, 1/2 sum of the dropped gates'
                Fisher on validation windows, drops the worse half.  The others are tried, mask in place
                (billhook.search.harness).
4. Ladder       the best are tried on more windows, those on the front of gain and steadiness are restored, and one is
                left.
5. Acceptance   it is taken if it beats the best of the standards by more than two standard errors, paired, on windows
                that nothing has seen.  The standards are restored like it, and FASP's own score is among them.

Steps 3 to 5 are billhook's: of the paper the outline is public (a joint space of data and metrics, candidates scored by
the pruned model, TPE).  A search that trusts a few hundred tokens lowers its own loss and raises everyone else's
(docs/LOG.md).
"""

import copy
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from billhook.cuts.narrowing import Settings, narrow
from billhook.models.plan import Plan, UnitScores
from billhook.models.surgery import cast
from billhook.runtime import cache
from billhook.runtime.progress import Tick, ticked
from billhook.runtime.run import Run
from billhook.search import harness
from billhook.search.budgets import BaseCut
from billhook.search.evaluator import Evaluator, dropped_layers, with_workers
from billhook.search.harness import Losses, Opening, Problem, inf_unless_finite
from billhook.search.inputs import Inputs
from billhook.search.ladder import FINALISTS, RESTORED_ON, RUNGS, end_tokens
from billhook.search.measured import Known, Measured, prepare, try_known
from billhook.search.metrics import digest, shares
from billhook.search.settings import SearchSettings
from billhook.search.space import Candidate
from billhook.search.trial import Trial, paired_gain
from billhook.search.validation import RungWindows
from billhook.tensors import Tokens

STANDARDS = 1  # how many known metrics, the best first, finalists are measured against
PARTS = 5  # steps from the standard to the winner, each tried on the deciding windows
RESTORING = 4  # forward passes over the calibration windows that a restoration costs
BUDGETS = "and its budgets"
RESTORED = "and restored"


@dataclass(frozen=True)
class Found:
    """What to cut, and how that came about."""

    scores: UnitScores
    plan: Plan
    record: dict[str, Any]


def search(
    model: PreTrainedModel,
    chosen: SearchSettings,
    base: Plan,
    inputs: Inputs,
    calibration: Tokens,
    settings: Settings,
    run: Run,
) -> Found:
    """Search, and return the scores and the plan of the winner: a candidate, or the best standard.

    Args:
        base: how much goes from every axis; candidates with a shape of their own save as much.
        calibration: (windows, length), what finalists are restored on.
        settings: settings of the restoration, if there is one.

    Raises:
        BillhookError: nothing is open to choose; no known metric works; the time is too short for one round; the run's
            folder is another search's.
    """
    began, validation = time.perf_counter(), inputs.texts.validation
    pool_sha256 = cache.digest({"tokens": inputs.pool.tokens.tolist()})
    alone = harness.evaluator_for(model, chosen, run, pool=pool_sha256)
    with with_workers(alone, run.workers) as evaluator:
        problem = begin(evaluator, chosen, base, inputs, calibration, settings, run)
        outcome = harness.search(problem, chosen, run, began)
        with run.clock("finals"):
            parts = problem.parts(outcome.winner, outcome.losses)
    record = outcome.record | {
        "known": list(problem.known.rows),
        "parts": parts,
        "restoration": settings.restoration,
        "pool": _pool_record(inputs, problem, outcome.winner),
        "judges": list(inputs.texts.names),
        "validation": {part: list(getattr(validation, part).shape) for part in ("proxy", "rungs", "final")},
    }
    return Found(problem.measured.scores(outcome.winner), problem.measured.plan(outcome.winner), record)


def begin(
    evaluator: Evaluator,
    chosen: SearchSettings,
    base: Plan,
    inputs: Inputs,
    calibration: Tokens,
    settings: Settings,
    run: Run,
) -> "AdaPruner":
    """Steps 1 and 2.

    Raises:
        BillhookError: nothing is open to choose; no known metric works; what was kept of an earlier run cannot be read.
    """
    validation, rungs = inputs.texts.validation, RungWindows(inputs.texts.validation.rungs)
    with run.clock("evidence"):
        cut = BaseCut(evaluator.model, base, chosen.width_step, chosen.layout)
        measured = prepare(cut, chosen, inputs.pool, validation, evaluator, rungs, run)
    with run.clock("known metrics"):
        before = time.perf_counter()
        known = try_known(measured, rungs, run.tick)
        seconds = max(time.perf_counter() - before, 1e-6) / (len(known.rows) * RUNGS[1] * validation.rungs.shape[1])
    metrics = [row["metric"] for row in sorted(known.rows, key=lambda row: inf_unless_finite(row["loss"]))]
    standards = {name: Candidate(measured.space.known[name]) for name in metrics[:STANDARDS]}
    if settings.restoration:  # what is best before it need not be best after it
        standards[f"{settings.score} (FASP)"] = Candidate()
    restored_on = calibration[:RESTORED_ON]
    each = RESTORING * restored_on.numel() if settings.restoration else 0
    end = end_tokens(validation, 2 * FINALISTS + STANDARDS + 1, each) + PARTS * validation.final.numel()
    opening = Opening(
        dimensions=measured.space.dimensions(),
        starts=_starts(measured, known),
        standard=measured.trial(-1, Candidate(known.standard)),
        standards=standards,
        rungs=rungs,
        end=end * seconds,
        worse=known.worse,
    )
    return AdaPruner(measured, known, opening, validation.final, restored_on, settings, run)


def _starts(measured: Measured, known: Known) -> list[dict[str, Any]]:
    """Values of the dimensions for the known metrics, as far as the space can express them."""
    space = measured.space
    encoded = [(space.encode(metric), metric) for metric in space.known.values()]
    return [values for values, metric in encoded if space.decode(values, known.standard).solution == metric]


@dataclass(frozen=True)
class AdaPruner(Problem):
    """The search for samples, metric and budgets, as the harness sees it."""

    measured: Measured
    known: Known
    opening: Opening
    final: Tensor  # windows that decide
    calibration: Tokens  # windows that finalists are restored on
    settings: Settings  # settings of the restoration
    run: Run

    def trial(self, number: int, values: Mapping[str, Any]) -> Trial:
        return self.measured.trial(number, self.measured.space.decode(values, self.known.standard))

    def worth_trying(self, trials: Sequence[Trial]) -> list[Trial]:
        """The better half by the proxy, which says nothing of whole layers: of trials that drop the same ones."""
        by_layers: dict[tuple[int, ...], list[Trial]] = {}
        for trial in sorted(trials, key=lambda trial: trial.proxy or 0.0):
            by_layers.setdefault(dropped_layers(trial.units), []).append(trial)
        return [trial for group in by_layers.values() for trial in group[: math.ceil(len(group) / 2)]]

    def losses(self, trials: Sequence[Trial], windows: Tokens, tick: Tick) -> list[tuple[str, list[float]]]:
        losses = self.measured.evaluator.losses([trial.units for trial in trials], windows, tick, "promoted")
        return [(trial.mask, of_trial) for trial, of_trial in zip(trials, losses, strict=True)]

    def finalists(self, trials: Sequence[Trial]) -> list[tuple[int, Candidate]]:
        """Where kept weights are restored,
        those with budgets of their own stand there a second time, by FASP's score."""
        finalists = super().finalists(trials)
        by_fasp = [(number, replace(candidate, solution=None)) for number, candidate in finalists]
        return finalists + [each for each in by_fasp if self.settings.restoration and each[1] != Candidate()]

    def finished(self, candidates: Sequence[Candidate], rung: Tokens) -> list[Losses]:
        """By the recipe's own stream, on fewer calibration windows; or without restoration, in place."""
        windows, evaluator = (rung, self.final), self.measured.evaluator
        if not self.settings.restoration:
            masks = [self.measured.mask(candidate) for candidate in candidates]
            return list(zip(*(evaluator.losses(masks, part, self.run.tick, "finals") for part in windows), strict=True))
        losses: list[Losses] = []
        for candidate in ticked(candidates, "restoring finalists", self.run.tick):
            plan = self.measured.plan(candidate)
            key = {
                **evaluator.key,
                "calibration": cache.digest({"tokens": self.calibration.tolist()}),
                "settings": asdict(self.settings),
                "cut": {f"{layer} {kind}": count for (layer, kind), count in plan.drops.items()},
                "layers": list(plan.layers),
                "mask": candidate.solution and digest(self.measured.mask(candidate)),
            }
            losses.append(evaluator.finished_losses(key, partial(self._restored, candidate, plan), windows))
        return losses

    def _restored(self, candidate: Candidate, plan: Plan) -> PreTrainedModel:
        smaller = copy.deepcopy(self.measured.base.model)
        cast(smaller, self.measured.evaluator.autocast or smaller.dtype)  # as good, and a third faster (docs/LOG.md)
        narrow(
            smaller, self.calibration, plan, self.settings, Run(hidden=self.run.hidden), self.measured.scores(candidate)
        )
        return smaller

    def mark(self, candidate: Candidate | None) -> dict[str, Any]:
        return {"by_fasp": candidate is not None and candidate.solution is None}

    def parts(self, winner: Candidate, restored: Sequence[float]) -> list[dict[str, Any]]:
        """What samples, metric and budgets each bring, on the windows that decide, without restoration.

        Args:
            restored: the winner's losses after the restoration, which make the last row.
        """
        standard, solution = self.known.standard, winner.solution
        steps = {"the best fixed metric on the whole pool": Candidate(standard)}
        if solution:
            metric = {name: getattr(solution, name) for name in ("coefficients", "power", "reduction", "within")}
            samples = {name: getattr(solution, name) for name in ("levels", "count", "draw")}
            steps |= {
                "its samples changed": Candidate(replace(standard, **samples)),
                "its metric changed": Candidate(replace(standard, **metric)),
                "both": Candidate(solution),
            }
        if replace(winner, solution=None) != Candidate():
            steps[BUDGETS] = replace(winner, solution=solution or standard)
        masks = [self.measured.mask(candidate) for candidate in steps.values()]
        every = self.measured.evaluator.losses(masks, self.final, self.run.tick, "parts")
        rows: dict[str, Sequence[float]] = dict(zip(steps, every, strict=True))
        if self.settings.restoration:
            rows[RESTORED] = restored
        return [
            {"what": name, "loss": statistics.fmean(losses), **paired_gain(every[0], losses)}
            for name, losses in rows.items()
        ]


def _pool_record(inputs: Inputs, problem: AdaPruner, winner: Candidate) -> dict[str, Any]:
    """Every window of the pool: its text's number, its cluster, its share in the winner's mixture, and its text."""
    pool, solution = inputs.pool, winner.solution
    weights = shares(problem.measured.evidence.clusters, solution) if solution else torch.zeros(len(pool.tokens))
    return {
        "sources": list(pool.sources),
        "seq_len": pool.tokens.shape[1],
        "begins_with": list(pool.begins_with),
        "left_out": pool.left_out,
        "source": list(pool.source),
        "clusters": pool.clusters.tolist(),
        "shares": [round(float(weight), 6) for weight in weights],
        "samples": list(inputs.samples),
    }
