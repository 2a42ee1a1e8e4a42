"""From a recipe to a plan: gather what the allocation needs to know, then solve it for the budget."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from billhook.calibration.gradients import WINDOW, gradient_sums
from billhook.calibration.passage import Route
from billhook.calibration.walk import walk
from billhook.choices import GRADIENT_SCORES
from billhook.cuts.narrowing import axis_scores
from billhook.errors import BillhookError
from billhook.math.scores import standardised
from billhook.math.taylor import FROM_GRADIENTS, NEED_MEAN_GRADIENT
from billhook.models import limits
from billhook.models.axes import axes, reader_weight
from billhook.models.families import layers
from billhook.models.layout import layout_of
from billhook.models.plan import Curves, Plan, UnitScores
from billhook.pruning import allocation, planners, residual_budget
from billhook.pruning.depth_or_width import depth_or_width
from billhook.pruning.layer_plan import layer_plan
from billhook.pruning.method_settings import settings_of
from billhook.pruning.recipe import BUDGETS, Recipe
from billhook.pruning.sensitivity import curves
from billhook.pruning.solve import solved
from billhook.pruning.texts import Texts, hashes
from billhook.runtime import cache
from billhook.runtime.progress import Clock, Tick, quiet
from billhook.runtime.run import Run
from billhook.tensors import Scores, Tokens

GLOBAL_SCORE = "taylor2_element"  # where the recipe's own score does not compare across layers


def make_plan(
    model: PreTrainedModel,
    chosen: Recipe,
    texts: Texts,
    dtype: torch.dtype,
    scores: UnitScores | None = None,
    statistics: Path | None = None,
    clock: Clock | None = None,
    tick: Tick = quiet,
) -> Plan:
    """What to cut of `model` so that the recipe's budget is met.

    Args:
        dtype: what the result will be stored in, for a budget in bytes.
        scores: of `unit_scores`.
        statistics: a folder that keeps what was measured, for the next ratio.

    Raises:
        BillhookError: the budget cannot be met; says what can.
    """
    clock, scores, said = clock or Clock(), scores or {}, allocation.parse(chosen.allocation)
    kinds = chosen.unit_kinds
    limits.check_kinds(model, chosen.kinds, chosen.layout)
    if chosen.slices:
        if all(getattr(chosen, name) is None for name in BUDGETS):
            return Plan()  # the vocabulary alone
        return solved(model, chosen, residual_budget.planner(model, chosen.width_step, chosen.rotate), dtype, tick)
    if chosen.layout == "uniform" and layout_of(model) == "per_layer":
        raise BillhookError("the layers of this model differ already: use --layout per_layer")
    if not chosen.chops and "layers" in chosen.kinds and said.name not in ("sensitivity", "auto"):
        raise BillhookError("axis 'layers' is weighed against the others: use --allocation sensitivity, or auto")
    if chosen.chops:
        with clock("layers"):
            return layer_plan(model, chosen, texts, dtype, statistics, tick)
    if said.name != "file" and all(getattr(chosen, name) is None for name in BUDGETS):
        return Plan()  # the vocabulary alone
    if said.keep is not None:
        return planners.file_plan(model, kinds, said.keep)
    if said.name == "auto":
        return depth_or_width(model, chosen, texts, dtype, scores, clock, tick)
    weighed = None
    if said.name in allocation.NEED_CURVES:
        _check_possible(model, chosen, kinds, said, dtype)
        weighed = _kept(
            statistics,
            _key(model, chosen, said.name, texts),
            lambda: _curves(model, chosen, said.name, texts, scores, clock, tick),
        )
    planner = planners.planner(
        model, kinds, said, multiple_of=chosen.width_step, floor=chosen.floor, layout=chosen.layout, curves=weighed
    )
    return solved(model, chosen, planner, dtype, tick)


def _check_possible(
    model: PreTrainedModel, chosen: Recipe, kinds: tuple[str, ...], said: allocation.Allocation, dtype: torch.dtype
) -> None:
    """Refuse what no measurement could help: solved as if nothing cost anything.  A budget in speed must time first."""
    free: Curves = {(axis.layer, axis.kind): {} for axis in axes(model, kinds)}
    if "layers" in chosen.kinds:
        free |= {(n, "layers"): {1: 0.0} for n in range(len(layers(model)))}
    planner = planners.planner(
        model, kinds, said, multiple_of=chosen.width_step, floor=chosen.floor, layout=chosen.layout, curves=free
    )
    if chosen.speedup is None:
        solved(model, chosen, planner, dtype, quiet)


def unit_scores(
    model: PreTrainedModel, chosen: Recipe, tokens: Tokens, clock: Clock | None = None, tick: Tick = quiet
) -> UnitScores:
    """The gradient score that the recipe names, of every unit; nothing where it names one that needs no gradients."""
    if chosen.score not in GRADIENT_SCORES or not chosen.unit_kinds:
        return {}
    limits.check_kinds(model, chosen.kinds, chosen.layout)
    return _gradient_scores(model, chosen.score, chosen.unit_kinds, tokens, clock or Clock(), tick)


def _curves(
    model: PreTrainedModel, chosen: Recipe, name: str, texts: Texts, scores: UnitScores, clock: Clock, tick: Tick
) -> Curves:
    if name == "global":
        found = scores or _gradient_scores(model, GLOBAL_SCORE, chosen.unit_kinds, texts.calibration, clock, tick)
        return planners.score_curves(model, found)
    if name == "standardised":
        found = standardised(scores or _forward_scores(model, chosen, texts.calibration, clock, tick))
        # losses are not negative; what is added to all alike moves no threshold
        least = min(each.min() for each in found.values())
        return planners.score_curves(model, {place: each - least for place, each in found.items()})
    return curves(
        model,
        texts.calibration,
        texts.probe,
        chosen.unit_kinds,
        settings_of(chosen),
        scores=scores,
        whole_layers="layers" in chosen.kinds,
        clock=clock,
        tick=tick,
    )


def _gradient_scores(
    model: PreTrainedModel, score: str, kinds: tuple[str, ...], tokens: Tokens, clock: Clock, tick: Tick
) -> UnitScores:
    with clock("gradients"):
        sums = gradient_sums(model, tokens[:, :WINDOW], kinds, mean_gradient=score in NEED_MEAN_GRADIENT, tick=tick)
        return {place: FROM_GRADIENTS[score](found) for place, found in sums.items()}


def _forward_scores(
    model: PreTrainedModel, chosen: Recipe, tokens: Tokens, clock: Clock, tick: Tick
) -> dict[tuple[int, str], Scores]:
    settings, run = settings_of(chosen), Run(tick=tick, clock=clock)
    return {
        (axis.layer, axis.kind): axis_scores(
            axis, reader_weight(model, axis), layer.fit[axis.reader_module].gram, settings
        )
        for layer in walk(model, tokens, chosen.unit_kinds, run, Route(held_out=0.0))
        for axis in layer.axes
    }


def _key(model: PreTrainedModel, chosen: Recipe, name: str, texts: Texts) -> dict[str, Any]:
    """All that decides what is measured."""
    decides = ("kinds", "score", "ridge", "restoration", "dtype")
    return {"curves": name, **cache.model_key(model), **hashes(texts)} | {k: getattr(chosen, k) for k in decides}


def _kept(folder: Path | None, key: dict[str, Any], measure: Callable[[], Curves]) -> Curves:
    """`measure()`, or what it gave before where `folder` has it under the same key."""

    def plain() -> list[list[Any]]:
        return [[n, kind, list(points.items())] for (n, kind), points in measure().items()]

    stored = cache.cached(folder, key["curves"], key, plain)
    return {(n, kind): {count: float(loss) for count, loss in points} for n, kind, points in stored}
