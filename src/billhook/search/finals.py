"""The finals of AdaPruner's search: finalists are tried as the result would be, and one is taken or none."""

import copy
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor

from billhook.cuts.narrowing import Settings, narrow
from billhook.models.plan import AxisKey, Plan
from billhook.models.surgery import cast
from billhook.runtime import cache
from billhook.runtime.progress import Tick
from billhook.runtime.run import Run
from billhook.search.evaluator import masked_losses
from billhook.search.metrics import Solution, digest, scores
from billhook.search.problem import Problem
from billhook.search.space import Candidate
from billhook.search.trial import Trial, paired_gain, verdict
from billhook.tensors import Scores

STANDARDS = 1  # how many known metrics, the best first, finalists are measured against
BUDGETS = "and its budgets"
RESTORED = "and restored"
Losses = tuple[list[float], list[float]]  # losses on the windows that choose a finalist, and on those that decide


@dataclass(frozen=True)
class Decision:
    """What is taken in the end."""

    candidate: Candidate
    losses: list[float]  # of each deciding window
    record: dict[str, Any]


@dataclass(frozen=True)
class Finals:
    """Steps 4 and 5: finalists as they will be, first on rung windows, then on windows that nothing has seen.

    Windows are (windows, length) of token ids.
    """

    problem: Problem
    standard: Solution  # the best known metric
    rung: Tensor  # windows that choose a finalist
    final: Tensor  # windows that decide
    calibration: Tensor  # windows that kept weights are restored on
    settings: Settings  # settings of the restoration
    tick: Tick

    def decide(self, known: Sequence[Mapping[str, Any]], finalists: Sequence[Trial]) -> Decision:
        """The best finalist if it beats the best standard on windows that nothing has seen, else that standard.

        Standards are the best of the known metrics and, where kept weights are restored, FASP's own score: what is best
        before the restoration need not be best after it.  So finalists with budgets of their own stand there a second
        time, by that score.

        Args:
            known: a row for each known metric, with its name and loss.
        """
        standards = self._standards(known)
        others: list[tuple[int, Candidate]] = [(trial.number, trial.candidate) for trial in finalists]
        if self.settings.restoration:
            by_fasp = [(number, replace(candidate, solution=None)) for number, candidate in others]
            others += [(number, candidate) for number, candidate in by_fasp if candidate != Candidate()]
        names = [*standards, *(number for number, _ in others)]
        candidates = [*standards.values(), *(candidate for _, candidate in others)]
        losses = self._restored(candidates) if self.settings.restoration else self._cut(candidates)
        order = sorted(range(len(candidates)), key=lambda n: _inf_unless_finite(statistics.fmean(losses[n][0])))
        standard = next(n for n in order if n < len(standards))
        best = next((n for n in order if n >= len(standards)), None)
        decided = verdict(losses[standard][1], losses[standard if best is None else best][1])
        rows = [
            {
                "name": name,
                "by_fasp": candidate.solution is None,
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
            "by_fasp": best is not None and candidates[best].solution is None,
            "finalists": rows,
            **decided,
            "restoration": self.settings.restoration,
        }
        return Decision(candidates[taken], losses[taken][1], record)

    def _standards(self, known: Sequence[Mapping[str, Any]]) -> dict[str, Candidate]:
        metrics = [row["metric"] for row in sorted(known, key=lambda row: _inf_unless_finite(row["loss"]))]
        standards = {name: Candidate(self.problem.space.known[name]) for name in metrics[:STANDARDS]}
        if self.settings.restoration:
            standards[f"{self.settings.score} (FASP)"] = Candidate()
        return standards

    def parts(self, winner: Candidate, restored: list[float]) -> list[dict[str, Any]]:
        """What samples, metric and budgets each bring, on the windows that decide, without restoration.

        Args:
            restored: the winner's losses after the restoration, which make the last row.
        """
        standard, solution = self.standard, winner.solution
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
        masks = [self.problem.mask(candidate) for candidate in steps.values()]
        every = self.problem.evaluator.losses(masks, self.final, self.tick, "parts")
        rows = dict(zip(steps, every, strict=True))
        if self.settings.restoration:
            rows[RESTORED] = restored
        return [
            {"what": name, "loss": statistics.fmean(losses), **paired_gain(every[0], losses)}
            for name, losses in rows.items()
        ]

    def _cut(self, candidates: Sequence[Candidate]) -> list[Losses]:
        """Losses of candidates without restoration."""
        masks, evaluator = [self.problem.mask(candidate) for candidate in candidates], self.problem.evaluator
        both = [evaluator.losses(masks, windows, self.tick, "finals") for windows in (self.rung, self.final)]
        return list(zip(*both, strict=True))

    def _restored(self, candidates: Sequence[Candidate]) -> list[Losses]:
        """Losses of candidates as the result will be, by the recipe's own stream, on fewer calibration windows."""
        problem = self.problem
        common = {
            **problem.evaluator.key,
            "calibration": cache.digest({"tokens": self.calibration.tolist()}),
            "settings": asdict(self.settings),
            "windows": [cache.digest({"tokens": windows.tolist()}) for windows in (self.rung, self.final)],
        }
        losses: list[Losses] = []
        for n, candidate in enumerate(candidates):
            self.tick("restoring finalists", n, len(candidates))
            plan = problem.plan(candidate)
            cut = {f"{layer} {kind}": count for (layer, kind), count in plan.drops.items()}
            mask = candidate.solution and digest(problem.mask(candidate))
            key = {**common, "cut": cut, "layers": list(plan.layers), "mask": mask}
            measure = partial(self._losses_once_restored, candidate, plan)
            losses.append(tuple(cache.cached(problem.evaluator.folder, "final", key, measure)))
        self.tick("restoring finalists", len(candidates), len(candidates))
        return losses

    def _losses_once_restored(self, candidate: Candidate, plan: Plan) -> list[list[float]]:
        autocast = self.problem.evaluator.autocast
        smaller = copy.deepcopy(self.problem.base.model)
        cast(smaller, autocast or smaller.dtype)  # as good, and a third faster (docs/LOG.md)
        narrow(smaller, self.calibration, plan, self.settings, Run(), scores_of(self.problem, candidate))
        return [masked_losses(smaller, {}, windows, None, None, autocast) for windows in (self.rung, self.final)]


def scores_of(problem: Problem, candidate: Candidate) -> Mapping[AxisKey, Scores]:
    """The scores of units by a candidate's own solution; none where FASP's own score is used."""
    return scores(problem.evidence, candidate.solution) if candidate.solution else {}


def _inf_unless_finite(loss: float) -> float:
    return loss if math.isfinite(loss) else math.inf
