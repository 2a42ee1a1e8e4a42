"""From a table of what is missed to a plan: widths first, then whole layers on the cut model (MoPE-CLIP)."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from billhook.checkpoints.load import Opened
from billhook.math import layer_presets, selection
from billhook.models import sizes
from billhook.models.axes import Axis, axes
from billhook.models.families import layers
from billhook.models.limits import allowed_drops
from billhook.models.plan import WHOLE, AxisKey, Plan
from billhook.models.surgery import silenced
from billhook.planning import planners
from billhook.planning.ablation import Dropped, Judge, Table, missed_least
from billhook.planning.budget import Planner, solved
from billhook.planning.ordered_plan import Ordered, beside, in_order, layers_parameters
from billhook.planning.recipe import Recipe
from billhook.runtime import cache
from billhook.runtime.run import Run
from billhook.tensors import Scores


@dataclass(frozen=True)
class Order:
    """How modules go."""

    by: str  # a name in ORDERS
    joint: bool  # whether whole layers are weighed against the other modules, in place of going last
    depth: float  # the share of the budget that whole layers give where they go last


def width_planner(
    model: PreTrainedModel, recipe: Recipe, table: Table, order: Order, gone: Collection[int] = ()
) -> Planner:
    """What turns parameters to save into widths, and into whole layers where they are weighed against them.

    Args:
        gone: layers that go whole, whatever the table says.
    """
    if recipe.shape.layout == "uniform":
        return planners.even_planner(model, recipe, gone=gone)
    if order.by == "knapsack":
        return planners.weighing_planner(model, recipe, table.curves(model, order.joint), gone=gone)
    order_of = Ordered(table.worths, table.module_losses(), table.layers if order.joint else {})
    return in_order(model, recipe, order_of, gone=gone)


def plan(
    opened: Opened, recipe: Recipe, table: Table, judge: Judge, order: Order, run: Run, key: Mapping[str, Any]
) -> tuple[Plan, dict[str, Any]]:
    """The plan of a recipe's budget, and what the report shows of it.

    Args:
        key: all that decides the table, by which `run.statistics` keeps what is measured of the cut model.

    Raises:
        BillhookError: the budget cannot be met; says what can.
    """
    model, depth = opened.model, list[dict[str, Any]]()
    if order.joint or WHOLE not in recipe.kinds:
        found = solved(opened, recipe, width_planner(model, recipe, table, order), run.tick)
    else:
        likely = solved(opened, recipe, by_both(model, recipe, order.depth), run.tick)
        first, count = _widths_first(model, recipe, table, order, likely), len(likely.layers)
        decides = {**key, "widths": repr(sorted(first.drops.items())), "layers": count}

        def missed() -> list[dict[str, Any]]:
            return missed_least(judge, _dropped(model, first, table.worths), count, table.layers, run)

        depth = cache.cached(run.statistics, "mope-depth", decides, missed) if count else []
        gone = sorted(one["layer"] for one in depth)
        found = Plan(layers=tuple(gone))
        if recipe.unit_kinds:  # the budget is met by the widths of the layers that stay
            planner = beside(model, recipe, width_planner(model, recipe, table, order, gone), gone)
            found = solved(opened, recipe, planner, run.tick)
    return found, {"depth": depth, **_foretold(judge, found, table, run)}


def by_both(model: PreTrainedModel, recipe: Recipe, depth: float) -> Planner:
    """How many layers go, and how much each other layer gives: layers from the middle stand for whichever will go.

    Whole layers give a share `depth` of the saving, or more where widths cannot give the rest.
    """
    total = len(layers(model))
    widths = sum(axis.price(model) * _most(model, recipe, axis) for axis in axes(model, recipe.unit_kinds)) / total
    each = sum(sizes.layer_parameters(model, n) for n in range(total)) / total

    def count(saving: float | int) -> int:
        wanted = min(round(depth * saving / each), total - 1)
        while wanted < total - 1 and saving - wanted * each > widths * (total - wanted) + each / 2:
            wanted += 1
        return wanted

    def make(saving: float | int) -> Plan:
        gone = layer_presets.middle(total, count(saving) if recipe.unit_kinds else max(1, round(saving / each)))
        return beside(model, recipe, planners.even_planner(model, recipe, gone=gone), gone).make(saving)

    step = min((axis.price(model) for axis in axes(model, recipe.unit_kinds)), default=each)
    return Planner(make, (total - 1) * each + widths, step)


def _most(model: PreTrainedModel, recipe: Recipe, axis: Axis) -> int:
    """How many units an axis may give: in the per_layer layout every layer keeps the recipe's floor."""
    least = recipe.shape.floor * axis.units if recipe.shape.layout == "per_layer" else 0
    drops = allowed_drops(model, axis, recipe.shape.width_step, recipe.shape.layout)
    return max(count for count in drops if not count or axis.units - count >= least)


def _widths_first(model: PreTrainedModel, recipe: Recipe, table: Table, order: Order, likely: Plan) -> Plan:
    """The widths before any layer goes: every layer gives as much as those that stay will have to."""
    total, gone = len(layers(model)), likely.layers
    if not likely.kinds:
        return Plan()
    saving = (sizes.saved_by(model, likely) - layers_parameters(model, gone)) * total / (total - len(gone))
    planner = width_planner(model, recipe, table, order)
    return planner.make(min(max(saving, planner.step), planner.most))


def _dropped(model: PreTrainedModel, plan: Plan, worths: Mapping[AxisKey, Scores]) -> Dropped:
    """The units that a plan takes, axis by axis."""
    return [
        (axis, selection.lowest(worths[axis.layer, axis.kind], count, axis.blocks)[0])
        for axis in axes(model, plan.kinds)
        if (count := plan.drops.get((axis.layer, axis.kind), 0))
    ]


def _foretold(judge: Judge, found: Plan, table: Table, run: Run) -> dict[str, Any]:
    """What the plan should cost if losses add up, and what it does cost before anything is restored: the cut of each
    layer alone, and all of it."""
    model, rows = judge.model, list[dict[str, Any]]()
    dropped = _dropped(model, found, table.worths)
    judge.probe.begin()
    with run.clock("predicted against measured"):
        for n in range(len(layers(model))):
            if of_layer := [(axis, units) for axis, units in dropped if axis.layer == n]:
                told = sum(float(table.worths[n, axis.kind][units].sum()) for axis, units in of_layer)
                with silenced(model, of_layer):
                    rows.append({"layer": n, "predicted": told, "measured": judge.lost(n)[0]})
            judge.probe.advance()
        judge.probe.begin()
        with silenced(model, dropped, found.layers):
            lost = judge.lost(0)[0]
    told = sum(row["predicted"] for row in rows) + sum(table.layers.get(n, 0.0) for n in found.layers)
    return {"layers": rows, "all": {"predicted": told, "measured": lost}}
