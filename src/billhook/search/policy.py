"""Policy-gradient pruning (Gao et al. 2024, arXiv:2406.10576): chances of units to stay learn from losses alone.

1. Units       chunks of a layer's FFN channels (single ones in the paper), KV groups, whole layers; FFN channels are
               chunked in the order of the start's score.
2. Learning    each step draws masks by the chances, and runs the model without what they leave out on one batch that
               all masks share; then the chances move (billhook.math.policy).
3. Checks      every 64 forward passes the plan that the chances stand for is tried on windows of its own; the best is
               kept.
4. Acceptance  it is taken if it beats its own start, and the recipe's equal widths, by more than two standard errors,
               paired, on windows that nothing has seen; finished as the result will be.

Chunks, the price in parameters, the baseline by the other masks, steps 3 and 4 are billhook's.
"""

import copy
import hashlib
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from billhook.cuts.narrowing import Settings, narrow
from billhook.errors import BillhookError
from billhook.math import policy, selection
from billhook.math.policy import Goal, Learning, Prices, State
from billhook.models.axes import axes
from billhook.models.families import layers
from billhook.models.plan import WHOLE, AxisKey, Plan, UnitScores
from billhook.models.sizes import layer_parameters
from billhook.models.surgery import cast
from billhook.runtime import cache
from billhook.runtime.run import Run
from billhook.search.evaluator import Evaluator, Mask
from billhook.search.ladder import RESTORED_ON, RUNGS
from billhook.search.trial import paired_gain, verdict
from billhook.search.validation import Validation
from billhook.tensors import Tokens

CHECKED = 64  # forward passes between two checks
HAIR = 1e-6  # by how much equal chances differ; its square, by how much channels of one chunk do
STAGE = "learning which units stay"
START, EQUAL = "its start", "equal widths"


@dataclass(frozen=True)
class Pool:
    """What units a mask is of."""

    members: tuple[tuple[AxisKey, Tensor], ...]  # (layer, kind) and the axis's units; none of a whole layer
    start: tuple[Tensor, ...]  # scores, list by list of what is standardised together, in the order of members
    prices: Prices

    @cached_property
    def sha256(self) -> str:
        total = hashlib.sha256()
        for (n, kind), units in self.members:
            total.update(f"{n} {kind}".encode() + units.numpy().tobytes())
        return total.hexdigest()

    def mask(self, stays: Tensor) -> Mask:
        """What goes where `stays` is 0."""
        found: dict[AxisKey, list[Tensor]] = {}
        for (place, units), one in zip(self.members, stays.tolist(), strict=True):
            if not one:
                found.setdefault(place, []).append(units)
        gone = {n for n, kind in found if kind == WHOLE}
        return {
            place: torch.cat(parts).sort().values
            for place, parts in found.items()
            if place[1] == WHOLE or place[0] not in gone
        }

    def shares(self, chances: Tensor) -> list[dict[str, Any]]:
        """The mean chance of the units of each layer and kind."""
        found: dict[AxisKey, list[float]] = {}
        for (place, _), chance in zip(self.members, chances.tolist(), strict=True):
            found.setdefault(place, []).append(chance)
        return [{"layer": n, "kind": kind, "chance": statistics.fmean(each)} for (n, kind), each in found.items()]

    def order(self, chances: Tensor) -> tuple[dict[AxisKey, Tensor], dict[AxisKey, Tensor], dict[int, float]]:
        """By chances: of each unit of an axis the order within it and across all; and of each whole layer."""
        sizes: dict[AxisKey, int] = {}
        for place, units in self.members:
            sizes[place] = sizes.get(place, 0) + len(units)
        within = {place: torch.zeros(count, dtype=torch.float64) for place, count in sizes.items() if count}
        across = {place: torch.zeros(count, dtype=torch.float64) for place, count in sizes.items() if count}
        done, whole = dict.fromkeys(sizes, 0), dict[int, float]()
        moved = (chances + HAIR * policy.standardised_chances(self.start)).tolist()  # equal chances go as at the start
        for (place, units), chance in zip(self.members, moved, strict=True):
            if place[1] == WHOLE:
                whole[place[0]] = chance
                continue
            rank = torch.arange(done[place], done[place] + len(units), dtype=torch.float64) / sizes[place]
            within[place][units], across[place][units] = chance + HAIR**2 * rank, chance
            done[place] += len(units)
        return within, across, whole


def pool(
    model: PreTrainedModel,
    scores: UnitScores,
    layer_scores: Sequence[float],
    group: int,
    by_count: bool,
) -> Pool:
    """The units of a model, their start and their prices.

    Args:
        scores: of the units of every axis that takes part, by (layer, kind).
        layer_scores: of whole layers, if those take part.
        group: FFN channels of a chunk.
        by_count: whether every unit costs the same, and each kind has a budget of its own (the paper's).

    Raises:
        BillhookError: there is but one unit in each layer.
    """
    members, start = list[tuple[AxisKey, Tensor]](), list[Tensor]()
    prices, rest = list[float](), {n: float(layer_parameters(model, n)) for n in range(len(layers(model)))}
    for axis in axes(model, tuple(dict.fromkeys(kind for _, kind in scores))):
        place, price = (axis.layer, axis.kind), axis.price(model)
        values = scores[place].cpu()
        chunks = max(1, round(axis.units / group)) if axis.kind == "ffn" else axis.units
        parts = values.argsort(stable=True).tensor_split(chunks)
        members += [(place, part) for part in parts]
        start.append(torch.stack([values[part].double().mean() for part in parts]))
        prices += [1.0 if by_count else float(price * len(part)) for part in parts]
        rest[axis.layer] -= price * axis.units
    if start and not layer_scores and max(map(len, start)) == 1:
        raise BillhookError(
            "each layer has one unit, which says nothing of the others: lower --group, or name more --axes"
        )
    if layer_scores:
        members += [((n, WHOLE), torch.empty(0, dtype=torch.long)) for n in rest]
        start.append(torch.tensor(layer_scores, dtype=torch.float64))
        prices += list(rest.values())
    kinds = list(dict.fromkeys(kind for (_, kind), _ in members)) if by_count else [""]
    groups = [kinds.index(kind) if by_count else 0 for (_, kind), _ in members]
    layer, whole = [n for (n, _), _ in members], tuple(kind == WHOLE for (_, kind), _ in members)
    each = torch.tensor(prices, dtype=torch.float64)
    return Pool(tuple(members), tuple(start), Prices(each, torch.tensor(layer), whole, torch.tensor(groups)))


@dataclass(frozen=True)
class Batches:
    """Windows (windows, length) that the steps take in turn, in another order each time all were used."""

    windows: Tokens
    size: int
    seed: int

    def at(self, step: int) -> Tokens:
        """The windows of a step."""
        numbers = range(step * self.size, (step + 1) * self.size)
        return self.windows[[self._order(n // len(self.windows))[n % len(self.windows)] for n in numbers]]

    def _order(self, epoch: int) -> list[int]:
        generator = torch.Generator().manual_seed(self.seed + epoch)
        return torch.randperm(len(self.windows), generator=generator).tolist()


@dataclass(frozen=True)
class Candidate:
    """What chances stand for, or equal widths."""

    plan: Plan
    scores: UnitScores


@dataclass(frozen=True)
class Found:
    """What to cut, and how that came about."""

    plan: Plan
    scores: UnitScores
    record: dict[str, Any]


@dataclass(frozen=True)
class Policy:
    """All that a search by policy gradient is of."""

    evaluator: Evaluator
    units: Pool
    how: Learning
    batches: Batches
    validation: Validation
    planned: Callable[[Mapping[AxisKey, Tensor], Mapping[AxisKey, Tensor], Mapping[int, float]], Plan]
    settings: Settings  # of the cut that it ends with
    run: Run

    def candidate(self, chances: Tensor) -> Candidate:
        """The plan that meets the budget by chances."""
        within, across, whole = self.units.order(chances)
        return Candidate(self.planned(within, across, whole), within)

    def mask(self, candidate: Candidate) -> Mask:
        """The units that go."""
        plan = candidate.plan
        found: dict[AxisKey, Tensor] = {(n, WHOLE): torch.empty(0, dtype=torch.long) for n in plan.layers}
        for axis in axes(self.evaluator.model, plan.kinds):
            place = axis.layer, axis.kind
            if count := plan.drops.get(place, 0):
                found[place] = selection.lowest(candidate.scores[place], count, axis.blocks)[0]
        return found

    def search(self, equal: Plan | None, calibration: Tokens) -> Found:
        """Learn, and decide.

        Args:
            equal: the recipe's equal widths, which what was learned must beat, if there is such a plan.
            calibration: (windows, length), what finalists are finished on.

        Raises:
            BillhookError: no loss is finite.
        """
        units, how = self.units, self.how
        begun = policy.standardised_chances(units.start)
        goal = Goal(units.prices, self._budget(begun))
        state = State(policy.project(begun, goal.prices, goal.budget, how.margin))
        start = best = self.candidate(state.chances)
        rung = self._short[0]
        checks = [{"step": 0, "loss": self._loss(start, rung)}]
        trace, steps = list[dict[str, Any]](), max(1, CHECKED // how.masks)
        for first in range(0, how.steps, steps):
            self.run.tick(STAGE, first, how.steps)
            with self.run.clock("learning"):
                state, rows = self._block(state, first, min(first + steps, how.steps), goal)
            trace += rows
            if not any(row["finite"] for row in trace):
                dtype = str(self.evaluator.autocast or self.evaluator.model.dtype).removeprefix("torch.")
                raise BillhookError(f"no mask has a finite loss in {dtype}: try --dtype float32, or a smaller budget")
            with self.run.clock("checks"):
                tried = self.candidate(state.chances)
                loss = self._loss(tried, rung)
            best = tried if loss < min(check["loss"] for check in checks) else best
            checks.append({"step": min(first + steps, how.steps), "loss": loss})
        self.run.tick(STAGE, how.steps, how.steps)
        with self.run.clock("finals"):
            winner, decided = self._decide(start, best, equal, calibration[:RESTORED_ON])
        drawn = sum(row["masks"] for row in trace)
        record = {**asdict(how), "windows": self.batches.size, "units": len(units.members), "forwards": drawn}
        record |= {"kept": units.shares(state.chances), "trace": trace, "checks": checks}
        return Found(winner.plan, winner.scores, {**record, **decided})

    def _budget(self, chances: Tensor) -> Tensor:
        """What the chances must keep: of each group of units as much as the plan of the start leaves."""
        plan = self.candidate(chances).plan
        counts = {(axis.layer, axis.kind): axis.units for axis in axes(self.evaluator.model, plan.kinds)}
        stays = [
            float(place[0] not in plan.layers)
            if place[1] == WHOLE
            else 1 - plan.drops.get(place, 0) / counts.get(place, 1)
            for place, _ in self.units.members
        ]
        return self.units.prices.kept(torch.tensor(stays, dtype=torch.float64))

    def _block(self, state: State, first: int, end: int, goal: Goal) -> tuple[State, list[dict[str, Any]]]:
        """Steps `first` to `end`, or what they came to before a kill."""
        evaluator = self.evaluator
        key = {
            **evaluator.key,
            **{"objective": evaluator.objective, "units": self.units.sha256, "budget": goal.budget.tolist()},
            **{"how": asdict(self.how), "steps": [first, end], "seed": self.batches.seed, "state": state.plain()},
            "windows": hashlib.sha256(self.batches.windows.numpy().tobytes()).hexdigest(),
        }

        def measured() -> dict[str, Any]:
            now, rows = state, list[dict[str, Any]]()
            for step in range(first, end):
                now, row = self._step(now, step, goal)
                rows.append(row)
            return {"state": now.plain(), "rows": rows}

        found = cache.cached(evaluator.folder, "steps", key, measured)
        return State.read(found["state"]), found["rows"]

    def _step(self, state: State, step: int, goal: Goal) -> tuple[State, dict[str, Any]]:
        generator = torch.Generator().manual_seed((self.batches.seed * 1_000_003 + step) % 2**63)
        masks = policy.drawn(state.chances, self.how.masks, generator)
        once = replace(self.evaluator, folder=None, memory={})  # a file for each mask would be thousands
        losses = once.losses([self.units.mask(mask) for mask in masks], self.batches.at(step))
        means = torch.tensor([statistics.fmean(each) for each in losses], dtype=torch.float64)
        now = policy.learned(state, step, masks, means, self.how, goal, generator)
        finite = means[means.isfinite()]
        loss = float(finite.mean()) if len(finite) else None
        return now, {"step": step, "loss": loss, "finite": len(finite), "masks": len(masks)}

    def _loss(self, candidate: Candidate, windows: Tokens) -> float:
        (losses,) = self.evaluator.losses([self.mask(candidate)], windows)
        mean = statistics.fmean(losses)
        return mean if math.isfinite(mean) else math.inf

    def _decide(
        self, start: Candidate, best: Candidate, equal: Plan | None, calibration: Tokens
    ) -> tuple[Candidate, dict[str, Any]]:
        """The best of the checks if it beats both standards, else the better of these."""
        standards = {START: start} | ({EQUAL: Candidate(equal, {})} if equal else {})
        bare = self.evaluator.losses([self.mask(one) for one in (start, best)], self.validation.final)
        losses = {name: self._finished(one, calibration) for name, one in standards.items()}
        rung = {name: statistics.fmean(each[0]) for name, each in losses.items()}
        standard = min(rung, key=lambda name: rung[name] if math.isfinite(rung[name]) else math.inf)
        chosen = losses[START] if best is start else self._finished(best, calibration)
        decided = verdict(losses[standard][1], chosen[1])
        decided["accepted"] = decided["accepted"] and best is not start
        rows = [
            {"name": name, "final": statistics.fmean(each[1]), **paired_gain(losses[standard][1], each[1])}
            for name, each in [*losses.items(), ("learned", chosen)]
        ]
        told = {"standard": standard, "moved": best is not start, "finalists": rows, **decided}
        told["restoration"] = self.settings.restoration
        told["unrestored"] = {
            **{name: statistics.fmean(each) for name, each in zip(("start", "learned"), bare, strict=True)},
            **paired_gain(*bare),
        }
        return (best if decided["accepted"] else standards[standard]), told

    def _finished(self, candidate: Candidate, calibration: Tokens) -> list[list[float]]:
        """Losses as the result would be: on the windows that choose a standard, and on those that decide."""
        plan, scores = candidate.plan, candidate.scores
        key = {
            **self.evaluator.key,
            "calibration": cache.digest({"tokens": calibration.tolist()}),
            "settings": asdict(self.settings),
            "plan": repr(plan),
            "scores": cache.digest({f"{n} {kind}": each.tolist() for (n, kind), each in scores.items()}),
        }
        windows = (self._short[1], self.validation.final)
        return self.evaluator.finished_losses(key, partial(self._made, plan, scores, calibration), windows)

    @property
    def _short(self) -> tuple[Tensor, Tensor]:
        """Short windows: those of the checks, and others that choose a standard."""
        every = torch.cat([self.validation.proxy, self.validation.rungs])
        checks = min(RUNGS[1], len(every) // 2)
        return every[:checks], every[checks:][: RUNGS[2]]

    def _made(self, plan: Plan, scores: UnitScores, calibration: Tokens) -> PreTrainedModel:
        smaller = copy.deepcopy(self.evaluator.model)
        cast(smaller, self.evaluator.autocast or smaller.dtype)
        narrow(smaller, calibration, plan, self.settings, Run(hidden=self.run.hidden), scores)
        return smaller
