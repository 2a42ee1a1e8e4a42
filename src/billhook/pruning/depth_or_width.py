"""Allocation `auto`: fewer layers or narrower ones, whichever does less harm on held-out windows."""

import copy
from collections.abc import Mapping

import torch
from transformers import PreTrainedModel

from billhook.errors import BillhookError
from billhook.models.families import layers
from billhook.models.plan import Plan, UnitScores
from billhook.pruning import planners
from billhook.pruning.carry_out import CUTS
from billhook.pruning.method_settings import settings_of
from billhook.pruning.recipe import Recipe
from billhook.pruning.sensitivity import Probe, curves
from billhook.pruning.solve import solved
from billhook.pruning.texts import Texts
from billhook.runtime.progress import Clock, Tick, quiet
from billhook.runtime.run import Run

PATIENCE = 2  # trials of `auto` without a gain before it stops


def depth_or_width(
    model: PreTrainedModel,
    chosen: Recipe,
    texts: Texts,
    dtype: torch.dtype,
    scores: UnitScores,
    clock: Clock,
    tick: Tick,
) -> Plan:
    """The best of the (layers dropped, common width) pairs on the budget line, each tried on a copy of the model.

    A trial is the whole prune, on all calibration windows: with a quarter of them what makes up for a dropped layer is
    fitted too loosely, and depth did not win (docs/LOG.md).
    """
    settings, kinds = settings_of(chosen), chosen.unit_kinds
    if kinds:  # what equal widths cannot give is refused before anything is measured
        whole = planners.even_planner(model, kinds, chosen.width_step, chosen.layout)
        if chosen.speedup is None:
            solved(model, chosen, whole, dtype, quiet)
    alone = curves(model, texts.calibration[:1], texts.probe, (), settings, whole_layers=True, clock=clock, tick=tick)
    probe, best, since = Probe(model, texts.probe), (float("inf"), Plan()), 0
    for count in range(0 if kinds else 1, len(layers(model)) // 2):
        gone = _apart({n: loss[1] for (n, _), loss in alone.items()}, count)
        planner = planners.even_planner(model, kinds, chosen.width_step, chosen.layout, gone=gone)
        try:
            plan = solved(model, chosen, planner, dtype, tick)
        except BillhookError:
            if not count:
                raise
            if not kinds:
                continue
            break  # these layers alone are more than the budget
        tick("trying depths", count, count + PATIENCE)
        with clock("trials"):
            trial = copy.deepcopy(model)
            CUTS[chosen.method](trial, texts.calibration, plan, settings, Run(tick=tick), scores)
            loss = probe.divergence_of(trial)
            del trial  # before the next copy is made
        best, since = ((loss, plan), 0) if loss < best[0] else (best, since + 1)
        if since == PATIENCE:
            break
    tick("trying depths", 1, 1)
    return best[1]


def _apart(losses: Mapping[int, float], count: int) -> list[int]:
    """`count` layers of least loss, no two neighbours (the FFN before a layer that goes makes up for it), never the first."""
    taken: list[int] = []
    for n in sorted(losses, key=lambda n: losses[n]):
        if len(taken) < count and n and not {n - 1, n + 1} & set(taken):
            taken.append(n)
    return sorted(taken)
