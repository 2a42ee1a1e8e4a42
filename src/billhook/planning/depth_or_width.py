"""Allocation `auto`: fewer layers or narrower ones, whichever does less harm on held-out windows."""

import copy
from collections.abc import Mapping

from billhook.checkpoints.load import Opened
from billhook.cuts.narrowing import Settings, narrow
from billhook.errors import BillhookError
from billhook.models.families import layers
from billhook.models.plan import Plan, UnitScores
from billhook.planning import planners
from billhook.planning.budget import solved
from billhook.planning.recipe import Recipe
from billhook.planning.sensitivity import Probe, curves
from billhook.planning.texts import Texts
from billhook.runtime.run import Run

PATIENCE = 2  # trials of `auto` without a gain before it stops


def depth_or_width(
    opened: Opened, recipe: Recipe, settings: Settings, texts: Texts, scores: UnitScores, run: Run
) -> Plan:
    """The best of the (layers dropped, common width) pairs on the budget line, each tried on a copy of the model.

    A trial is the whole prune, on all calibration windows: with a quarter of them what makes up for a dropped layer is
    fitted too loosely, and depth did not win (docs/LOG.md).
    """
    model, kinds = opened.model, recipe.unit_kinds
    if kinds and recipe.budget.speedup is None:  # what equal widths cannot give is refused before anything is measured
        solved(opened, recipe, planners.even_planner(model, recipe))
    few = Texts(texts.calibration[:1], texts.probe)
    alone = curves(model, few, (), settings, run, whole_layers=True)
    probe, best, since = Probe(model, texts.probe), (float("inf"), Plan()), 0
    for count in range(0 if kinds else 1, len(layers(model)) // 2):
        gone = _apart({n: loss[1] for (n, _), loss in alone.items()}, count)
        try:
            plan = solved(opened, recipe, planners.even_planner(model, recipe, gone=gone), run.tick)
        except BillhookError:
            if not count:
                raise
            if not kinds:
                continue
            break  # these layers alone are more than the budget
        run.tick("trying depths", count, count + PATIENCE)
        with run.clock("trials"):
            trial = copy.deepcopy(model)
            narrow(trial, texts.calibration, plan, settings, Run(run.tick, hidden=run.hidden), scores)
            loss = probe.divergence_of(trial)
            del trial  # before the next copy is made
        best, since = ((loss, plan), 0) if loss < best[0] else (best, since + 1)
        if since == PATIENCE:
            break
    run.tick("trying depths", 1, 1)
    return best[1]


def _apart(losses: Mapping[int, float], count: int) -> list[int]:
    """`count` layers of least loss, no two neighbours (the FFN before a layer that goes makes up for it), never the first."""
    taken: list[int] = []
    for n in sorted(losses, key=lambda n: losses[n]):
        if len(taken) < count and n and not {n - 1, n + 1} & set(taken):
            taken.append(n)
    return sorted(taken)
