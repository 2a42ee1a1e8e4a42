"""What AdaPruner's search measures before the first trial, and what a candidate means by it."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from billhook.errors import BillhookError
from billhook.math import selection
from billhook.models.axes import Axis, axes
from billhook.models.plan import WHOLE, AxisKey, Plan
from billhook.runtime.progress import Tick, ticked
from billhook.runtime.run import Run
from billhook.search.budgets import BaseCut, exchanged, longest_block, shaped
from billhook.search.evaluator import Evaluator, Mask
from billhook.search.evidence import evidence, gate_fishers
from billhook.search.ladder import RUNGS
from billhook.search.layer_blocks import Block, Patch, cheapest, lengths, patch
from billhook.search.metrics import TERMS, PoolEvidence, Solution, digest, scores
from billhook.search.pool import Pool
from billhook.search.settings import SearchSettings
from billhook.search.space import Candidate, Space, groups_of, space
from billhook.search.trial import Trial, paired_gain
from billhook.search.validation import RungWindows, Validation
from billhook.tensors import Scores


@dataclass(frozen=True)
class Measured:
    """What is known before the first trial.  Nothing in it changes while the search runs."""

    base: BaseCut
    chosen: SearchSettings
    axes: tuple[Axis, ...]  # the axes that the base cut takes units from
    evidence: PoolEvidence
    fishers: dict[AxisKey, Scores]  # of each unit, the mean squared gradient of a gate on it, over the proxy windows
    floor: float  # share of its FFN channels that a layer keeps at least
    space: Space
    evaluator: Evaluator

    def plan(self, candidate: Candidate) -> Plan:
        """How many units a candidate drops from every axis, and which layers."""
        base, planned = self.base, next(iter(self.space.attention), None)
        if candidate.block or candidate.attention not in (None, planned):
            plan = exchanged(base, attention=candidate.attention, block=candidate.block)
            base = replace(base, plan=plan)
        return base.plan if candidate.shape is None else shaped(base, candidate.shape, self.floor)

    def mask(self, candidate: Candidate) -> Mask:
        """The units that a candidate with a solution drops."""
        assert candidate.solution is not None
        plan, unit_scores = self.plan(candidate), self.scores(candidate)
        mask: dict[AxisKey, torch.Tensor] = {(n, WHOLE): torch.empty(0, dtype=torch.long) for n in plan.layers}
        for axis in self.axes:
            place = axis.layer, axis.kind
            if count := plan.drops.get(place, 0):
                mask[place] = selection.lowest(unit_scores[place], count, axis.blocks)[0]
        return mask

    def trial(self, number: int, candidate: Candidate) -> Trial:
        """A trial of a candidate.

        Its proxy is 1/2 sum over dropped units of the mean squared gate gradient: the loss's second order, one gate at
        a time.
        """
        try:
            units = self.mask(candidate)
        except BillhookError:  # a shape that cannot save that much
            return Trial(number, candidate)
        dropped = {place: entries for place, entries in units.items() if place[1] != WHOLE}
        proxy = sum(float(self.fishers[place][entries].sum()) for place, entries in dropped.items()) / 2
        return Trial(number, candidate, digest(units), digest(units), proxy=proxy, units=units)

    def scores(self, candidate: Candidate) -> Mapping[AxisKey, Scores]:
        """The scores of units by a candidate's own solution; none where FASP's own score is used."""
        return scores(self.evidence, candidate.solution) if candidate.solution else {}


def prepare(
    base: BaseCut,
    chosen: SearchSettings,
    pool: Pool,
    validation: Validation,
    evaluator: Evaluator,
    rungs: RungWindows,
    run: Run,
) -> Measured:
    """Measure what the search stands on: the pool's evidence, the proxy's gradients, blocks of layers that may go.

    Raises:
        BillhookError: nothing is open to choose; what was kept of an earlier run cannot be read.
    """
    model = base.model
    kinds = tuple(dict.fromkeys(kind for _, kind in base.plan.drops))
    cut_axes = tuple(axis for axis in axes(model, kinds) if (axis.layer, axis.kind) in base.plan.drops)
    measured = evidence(model, pool.tokens, pool.clusters, kinds, folder=evaluator.folder, tick=run.tick)
    fishers = gate_fishers(model, validation.proxy, kinds, folder=evaluator.folder, tick=run.tick)
    blocks, patches = _blocks(base, chosen, pool, evaluator, rungs, run)
    return Measured(
        base=base,
        chosen=chosen,
        axes=cut_axes,
        evidence=measured,
        fishers=fishers,
        floor=min(chosen.floor, _even_share(base.plan, cut_axes) / 2),
        space=space(chosen.space, base, measured.count, len(pool.tokens), blocks),
        evaluator=replace(evaluator, patches=patches),
    )


def _even_share(plan: Plan, cut_axes: Sequence[Axis]) -> float:
    """The share of FFN channels that an even cut leaves.

    A floor near to it would leave shapes nothing to choose: half of SmolLM2's decoder is two thirds of its channels,
    and a floor of 0.3 makes nearly all layers alike.
    """
    ffn = [axis for axis in cut_axes if axis.kind == "ffn"]
    dropped = sum(plan.drops[axis.layer, "ffn"] for axis in ffn)
    return 1 - dropped / sum(axis.units for axis in ffn) if ffn else 1.0


def _blocks(
    base: BaseCut, chosen: SearchSettings, pool: Pool, evaluator: Evaluator, rungs: RungWindows, run: Run
) -> tuple[tuple[Block, ...], dict[Block, Patch]]:
    """For each length, the block that costs least on a round's windows; and patches, where weights are restored."""
    is_open = base.layout == "uniform" and "budgets" in groups_of(chosen.space)
    counts = lengths(longest_block(base.model, base.plan)) if is_open else range(0)
    if not counts:
        return (), {}
    blocks = cheapest(base.model, rungs.take(RUNGS[0]), counts, evaluator.autocast, run.tick)
    patches: dict[Block, Patch] = {}
    if chosen.restores:
        for block in ticked(blocks, "patching blocks", run.tick):
            if made := patch(base.model, pool.tokens, block, run):
                patches[block] = made
    return blocks, patches


@dataclass(frozen=True)
class Known:
    """The known metrics of the space, tried on the same windows."""

    standard: Solution  # the best of them
    worse: Mapping[str, float]  # nats a token more than the standard, by mask
    rows: tuple[dict[str, Any], ...]  # one row a metric, for the record


def try_known(measured: Measured, rungs: RungWindows, tick: Tick) -> Known:
    """Try every known metric of the space.

    Raises:
        BillhookError: none of them has a finite loss.
    """
    metrics = measured.space.known
    masks = {name: measured.mask(Candidate(metric)) for name, metric in metrics.items()}
    every = measured.evaluator.losses(list(masks.values()), rungs.take(RUNGS[1]), tick, "known metrics")
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
