"""The ways to cut that `auto` tries, and how the plan of each is made."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import partial
from typing import Any

from billhook.choices import MIXED
from billhook.errors import BillhookError
from billhook.methods import experts, fasp, layerchop
from billhook.methods.minutes import Effort, Way
from billhook.planning.method import Method, Opened, Planned, Run, Texts
from billhook.planning.recipe import Recipe, Shape

Ready = tuple[Method, Planned]  # a method, and what it will do


@dataclass(frozen=True)
class Rival(Way):
    """A way that `auto` may try, and how its plan is made; of widths what is asked for and can be had."""

    ready: Callable[[Opened, Recipe, Effort, Texts, Run], Ready]

    def may(self, opened: Opened, recipe: Recipe) -> bool:
        """Whether it is asked for, and can be had of this family in this layout."""
        from billhook.runtime.offload import is_offloaded

        asked, layout = recipe.shape.axes, recipe.shape.layout
        if self.layouts == UNEVEN and is_offloaded(opened.model):
            return False  # curves are measured on the whole model
        if layout not in self.layouts or ("layers" in self.kinds and asked and "layers" not in asked):
            return False
        if set(self.kinds) & set(MIXED) and not _is_mixture(opened):
            return False
        units = tuple(kind for kind in self.kinds if kind != "layers")
        if units:
            return bool(_usable(opened, recipe, units))
        return layout == "uniform" or _can(opened, "ffn", layout)  # an axis that all have, for what the layout refuses


def able(opened: Opened, recipe: Recipe) -> list[Rival]:
    """The rivals that may be tried, those of less depth first, if the budget lets them."""
    return [rival for rival in RIVALS if rival.may(opened, recipe)]


def ready(
    opened: Opened, recipe: Recipe, effort: Effort, texts: Texts, run: Run
) -> tuple[dict[str, Ready], dict[str, str]]:
    """Every rival that can meet the budget, by name; and why others cannot.

    Raises:
        BillhookError: none can; says why the first could not.
    """
    found: dict[str, Ready] = {}
    refused: dict[str, BillhookError] = {}
    for rival in able(opened, recipe):
        if len(found) == effort.rivals:
            break
        try:
            found[rival.name] = rival.ready(opened, recipe, effort, texts, run)
        except BillhookError as error:
            refused[rival.name] = error
    if not found:
        family = opened.model.config.model_type
        raise next(iter(refused.values()), BillhookError(f"{family} can give up none of it: name other --axes"))
    return found, {name: str(error) for name, error in refused.items()}


def _usable(opened: Opened, recipe: Recipe, kinds: Sequence[str]) -> tuple[str, ...]:
    """Those of the kinds that are asked for and that the family can give up."""
    asked, layout = recipe.shape.axes, recipe.shape.layout
    return tuple(kind for kind in kinds if (not asked or kind in asked) and _can(opened, kind, layout))


def _can(opened: Opened, kind: str, layout: str) -> bool:
    from billhook.models.limits import check_kinds

    try:
        check_kinds(opened.model, (kind,), layout)
    except BillhookError:
        return False
    return True


def _is_mixture(opened: Opened) -> bool:
    from billhook.models.families import row_of

    return bool(row_of(opened.model).experts)


def _of(recipe: Recipe, method: Method, kinds: tuple[str, ...], allocation: str = "equal") -> Recipe:
    """The same budget for another method, with its default settings."""
    shape = Shape(**{**recipe.shape.model_dump(), "axes": kinds, "allocation": allocation})
    return replace(recipe, method=method, settings=method.Settings(), shape=shape)


def _layers(
    opened: Opened, recipe: Recipe, effort: Effort, texts: Texts, run: Run, share: Fraction = Fraction(1)
) -> Ready:
    """A share of as many neighbouring layers as the budget takes, those that are missed least; the rest of it by
    widths."""
    from billhook.calibration.layer_importance import missed_least
    from billhook.cuts.chopping import check_patch
    from billhook.cuts.settings import Chopping
    from billhook.math import layer_presets
    from billhook.models.families import layers
    from billhook.planning.budget import solved
    from billhook.planning.layer_plan import by_depth
    from billhook.planning.planners import even_planner

    model, total = opened.model, len(layers(opened.model))
    narrowed = tuple(kind for kind in recipe.shape.axes if kind in fasp.METHOD.kinds and kind != "layers")
    widths = _of(recipe, fasp.METHOD, narrowed or (("expert_ffn",) if _is_mixture(opened) else ("ffn",)))

    def plan(gone: Sequence[int]) -> Any:
        return solved(opened, widths, even_planner(model, widths, gone=gone), run.tick)

    count, refused = int(share * len(solved(opened, recipe, by_depth(model), run.tick).layers)), None
    while count:
        try:  # whether the budget can be met does not depend on which layers go
            plan(layer_presets.middle(total, count))
            break
        except BillhookError as error:
            count, refused = count - 1, refused or error
    if not count:
        raise refused or BillhookError("the budget is less than a layer")
    probe = texts.probe[: recipe.calibration.probes]  # of both kinds, where there are two
    with run.clock("layers"):
        # without a window as many, to say what it will come to
        gone = missed_least(model, count, probe, run) if len(probe) else layer_presets.middle(total, count)
    found = plan(gone)
    if found.kinds:
        return fasp.METHOD, Planned(found, widths.settings.cut)
    try:
        check_patch(model, found.layers)
        patch = "linear"
    except BillhookError:
        patch = "none"
    return layerchop.METHOD, Planned(replace(found, drops={}), Chopping(patch))


def _layers_and_widths(opened: Opened, recipe: Recipe, effort: Effort, texts: Texts, run: Run) -> Ready:
    """Half of the layers that the budget would take, neighbours; the rest by widths, where they are missed least."""
    from billhook.calibration.layer_importance import missed_least
    from billhook.planning.axis_plan import weighing_planner
    from billhook.planning.budget import solved
    from billhook.planning.layer_plan import by_depth

    few = _measured_on(texts, effort, "sensitivity")
    uneven = _of(recipe, fasp.METHOD, _usable(opened, recipe, UNITS), "sensitivity")
    count = len(solved(opened, recipe, by_depth(opened.model), run.tick).layers) // 2
    if not count:
        raise BillhookError("the budget is less than two layers")
    with run.clock("layers"):
        gone = missed_least(opened.model, count, texts.probe[: recipe.calibration.probes], run)
    cut = uneven.settings.cut
    return fasp.METHOD, Planned(
        solved(opened, uneven, weighing_planner(opened, uneven, cut, few, {}, run, gone=gone), run.tick), cut
    )


def _measured_on(texts: Texts, effort: Effort, allocation: str) -> Texts:
    if allocation != "equal" and not len(texts.probe):
        raise BillhookError("uneven widths are measured, and what they come to cannot be told beforehand: try it")
    return replace(texts, probe=texts.probe[: effort.curves])


def _planned_by(
    method: Method, *kinds: str, allocation: str = "equal"
) -> Callable[[Opened, Recipe, Effort, Texts, Run], Ready]:
    def planned(opened: Opened, recipe: Recipe, effort: Effort, texts: Texts, run: Run) -> Ready:
        few = _measured_on(texts, effort, allocation)
        own = _of(recipe, method, _usable(opened, recipe, kinds), allocation)
        return method, method.plan(opened, own, few, run)

    return planned


STOCK, UNEVEN, UNITS = ("uniform",), ("per_layer",), ("ffn", "groups")
RIVALS = (  # of two that no window tells apart the first: less depth is faster, and hurts other kinds of text less
    Rival("whole layers", ("layers",), STOCK + UNEVEN, _layers),
    Rival("fewer experts", ("experts",), STOCK, _planned_by(experts.METHOD, "experts")),
    Rival("narrower experts", ("expert_ffn",), STOCK, _planned_by(fasp.METHOD, "expert_ffn")),
    Rival("whole layers and equal widths", ("layers", "ffn"), STOCK, partial(_layers, share=Fraction(2, 3))),
    Rival("equal widths", ("ffn",), STOCK, _planned_by(fasp.METHOD, "ffn")),
    Rival("whole layers and uneven widths", ("layers", *UNITS), UNEVEN, _layers_and_widths),
    Rival("uneven widths", UNITS, UNEVEN, _planned_by(fasp.METHOD, *UNITS, allocation="sensitivity")),
)
