"""From a budget to units of axes: measure what the allocation needs to know, then solve it."""

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from billhook.calibration.gradients import WINDOW, gradient_sums
from billhook.calibration.passage import Route
from billhook.calibration.walk import walk
from billhook.checkpoints.load import Opened
from billhook.choices import GRADIENT_SCORES
from billhook.cuts.narrowing import Settings, axis_scores
from billhook.errors import BillhookError
from billhook.math.scores import standardised
from billhook.math.taylor import FROM_GRADIENTS, NEED_MEAN_GRADIENT
from billhook.models import limits
from billhook.models.axes import axes, reader_weight
from billhook.models.families import layers
from billhook.models.layout import layout_of
from billhook.models.plan import Curves, Plan, UnitScores
from billhook.planning import allocation, planners
from billhook.planning.budget import Planner, solved
from billhook.planning.recipe import Recipe
from billhook.planning.sensitivity import curves
from billhook.planning.texts import Texts
from billhook.runtime import cache
from billhook.runtime.run import Run
from billhook.tensors import Tokens

GLOBAL_SCORE = "taylor2_element"  # where the recipe's own score does not compare across layers


def check(model: PreTrainedModel, recipe: Recipe) -> None:
    """Refuse what the family cannot give up, or the layout cannot hold.  Raises BillhookError."""
    limits.check_kinds(model, recipe.kinds, recipe.shape.layout)
    if recipe.shape.layout == "uniform":
        check_uniform(model)


def check_uniform(model: PreTrainedModel) -> None:
    """Refuse the uniform layout where it could not hold the model as it is.  Raises BillhookError."""
    if layout_of(model) == "per_layer":
        raise BillhookError("the layers of this model differ already: use --layout per_layer")


def axis_plan(opened: Opened, recipe: Recipe, settings: Settings, texts: Texts, scores: UnitScores, run: Run) -> Plan:
    """What to cut of a model so that the recipe's budget is met.

    Args:
        settings: of the cut, which an allocation that measures carries out.
        scores: of `gradient_scores`, if the recipe names such a score.

    Raises:
        BillhookError: the budget cannot be met; says what can.
    """
    model, said = opened.model, recipe.shape.spread
    if said.keep is not None:
        return planners.file_plan(model, recipe.unit_kinds, said.keep)
    if not recipe.sized:
        return Plan()  # the vocabulary alone
    return solved(opened, recipe, weighing_planner(opened, recipe, settings, texts, scores, run), run.tick)


def weighing_planner(
    opened: Opened,
    recipe: Recipe,
    settings: Settings,
    texts: Texts,
    scores: UnitScores,
    run: Run,
    *,
    gone: Collection[int] = (),
) -> Planner:
    """The planner of a recipe's allocation, with what that has to measure; `gone` are layers that go whole."""
    model, weighed = opened.model, None
    if recipe.shape.spread.name in allocation.NEED_CURVES:
        _check_possible(opened, recipe, gone)
        weighed = _kept(
            run.statistics,
            _key(model, recipe, settings, texts),
            lambda: measured(model, recipe, settings, texts, scores, run),
        )
    return planners.planner(model, recipe, weighed, gone=gone)


def _check_possible(opened: Opened, recipe: Recipe, gone: Collection[int]) -> None:
    """Refuse what no measurement could help: solved as if nothing cost anything.  A budget in speed must time first."""
    free: Curves = {(axis.layer, axis.kind): {} for axis in axes(opened.model, recipe.unit_kinds)}
    if "layers" in recipe.kinds:
        free |= {(n, "layers"): {1: 0.0} for n in range(len(layers(opened.model)))}
    planner = planners.planner(opened.model, recipe, free, gone=gone)
    if recipe.sized and recipe.budget.speedup is None:
        solved(opened, recipe, planner)


def gradient_scores(model: PreTrainedModel, recipe: Recipe, score: str, tokens: Tokens, run: Run) -> UnitScores:
    """A gradient score of every unit; nothing for a score that needs no gradients."""
    if score not in GRADIENT_SCORES or not recipe.unit_kinds:
        return {}
    with run.clock("gradients"):
        need_mean = score in NEED_MEAN_GRADIENT
        sums = gradient_sums(model, tokens[:, :WINDOW], recipe.unit_kinds, mean_gradient=need_mean, tick=run.tick)
        return {place: FROM_GRADIENTS[score](of_unit) for place, of_unit in sums.items()}


def unit_scores(
    model: PreTrainedModel, recipe: Recipe, score: str, settings: Settings, tokens: Tokens, run: Run
) -> UnitScores:
    """A score of every unit: by the gradients of one pass, or by the Grams of another; nothing without axes."""
    if not recipe.unit_kinds:
        return {}
    return gradient_scores(model, recipe, score, tokens, run) or _forward_scores(model, recipe, settings, tokens, run)


def measured(
    model: PreTrainedModel, recipe: Recipe, settings: Settings, texts: Texts, scores: UnitScores, run: Run
) -> Curves:
    """The losses that the recipe's allocation weighs."""
    name = recipe.shape.allocation
    if name == "global":
        found = scores or gradient_scores(model, recipe, GLOBAL_SCORE, texts.calibration, run)
        return planners.score_curves(model, found)
    if name == "standardised":
        found = standardised(scores or _forward_scores(model, recipe, settings, texts.calibration, run))
        # losses are not negative; what is added to all alike moves no threshold
        least = min(each.min() for each in found.values())
        return planners.score_curves(model, {place: each - least for place, each in found.items()})
    whole = "layers" in recipe.kinds
    return curves(model, texts, recipe.unit_kinds, settings, run, scores=scores, whole_layers=whole)


def _forward_scores(model: PreTrainedModel, recipe: Recipe, settings: Settings, tokens: Tokens, run: Run) -> UnitScores:
    steps = walk(model, tokens, recipe.unit_kinds, run, Route(held_out=0.0))
    return {
        (axis.layer, axis.kind): axis_scores(
            axis, reader_weight(model, axis), layer.fit[axis.reader_module].gram, settings
        )
        for layer in steps
        for axis in layer.axes
    }


def _key(model: PreTrainedModel, recipe: Recipe, settings: Settings, texts: Texts) -> dict[str, Any]:
    """All that decides what is measured."""
    decides = {name: getattr(settings, name) for name in ("score", "damping", "restoration")}
    decides |= {"named score": recipe.flat().get("score"), "kinds": recipe.kinds, "dtype": recipe.compute.dtype}
    return {"curves": recipe.shape.allocation, **cache.model_key(model), **texts.hashes, **decides}


def _kept(folder: Path | None, key: dict[str, Any], measure: Callable[[], Curves]) -> Curves:
    """`measure()`, or what it gave before where `folder` has it under the same key."""

    def plain() -> list[list[Any]]:
        return [[n, kind, list(points.items())] for (n, kind), points in measure().items()]

    stored = cache.cached(folder, key["curves"], key, plain)
    return {(n, kind): {count: float(loss) for count, loss in points} for n, kind, points in stored}
