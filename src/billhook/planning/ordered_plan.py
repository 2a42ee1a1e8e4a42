"""A plan by one order of all units: the lowest go first, of whatever layer and axis, until the budget is met."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor
from transformers import PreTrainedModel

from billhook.checkpoints.load import Opened
from billhook.errors import BillhookError
from billhook.math import selection
from billhook.math.ordering import Step, lowest_first
from billhook.models import sizes
from billhook.models.axes import Axis, axes
from billhook.models.families import layers
from billhook.models.limits import allowed_drops
from billhook.models.plan import AxisKey, Plan
from billhook.planning import planners
from billhook.planning.budget import Planner, solved
from billhook.planning.recipe import Recipe
from billhook.runtime.run import Run


@dataclass(frozen=True)
class Ordered:
    """What units and layers go by."""

    within: Mapping[AxisKey, Tensor]  # of each unit, by (layer, kind): in which order those of an axis go
    across: Mapping[AxisKey, Tensor]  # of each unit: in which order steps of all axes go
    whole: Mapping[int, float]  # of each layer that may go whole, beside `across`


def in_order(model: PreTrainedModel, recipe: Recipe, order: Ordered, *, gone: Collection[int] = ()) -> Planner:
    """What turns parameters to save into a plan of the per_layer layout; a layer that stays keeps the recipe's floor.

    Args:
        gone: layers that go whole, whatever the order says.
    """
    found = [axis for axis in axes(model, recipe.unit_kinds) if axis.layer not in gone]
    steps = [step for axis in found for step in _steps(model, recipe, axis, order)]
    steps += [
        Step(n, None, 0, sizes.layer_parameters(model, n), value) for n, value in order.whole.items() if n not in gone
    ]
    total, by_layers = len(layers(model)), layers_parameters(model, gone)
    most = {(step.layer, step.kind): step.saving for step in steps if not step.whole}
    largest = sum(most.values()) if not order.whole else sum(one.saving for one in steps if one.whole)

    def make(saving: float | int) -> Plan:
        counts, more = lowest_first(steps, saving - by_layers, total - len(gone))
        left = [(axis.layer, axis.kind) for axis in found if axis.layer not in more]
        return Plan({place: counts.get(place, 0) for place in left}, tuple(sorted({*gone, *more})))

    return Planner(make, by_layers + largest, min((step.saving for step in steps if step.count), default=1))


def _steps(model: PreTrainedModel, recipe: Recipe, axis: Axis, order: Ordered) -> list[Step]:
    """What an axis may give, a step of its width at a time."""
    place, price, found = (axis.layer, axis.kind), axis.price(model), list[Step]()
    within, across, last = order.within[place], order.across[place], float("-inf")
    for before, count in pairwise(allowed_drops(model, axis, recipe.shape.width_step, "per_layer")):
        if axis.units - count < recipe.shape.floor * axis.units:
            break
        kept = set(selection.lowest(within, before, axis.blocks)[1].tolist())
        units = selection.lowest(within, count, axis.blocks)[0].tolist()
        last = max(last, float(across[[unit for unit in units if unit in kept]].max()))
        found.append(Step(*place, count, count * price, last))
    return found


def beside(model: PreTrainedModel, recipe: Recipe, planner: Planner, gone: Collection[int]) -> Planner:
    """The same, where layers that go are all that is asked for, or more, without any widths."""
    places = [(axis.layer, axis.kind) for axis in axes(model, recipe.unit_kinds) if axis.layer not in gone]
    nothing, by_layers = Plan(dict.fromkeys(places, 0), tuple(sorted(gone))), layers_parameters(model, gone)

    def make(saving: float | int) -> Plan:
        return nothing if gone and saving - by_layers < planner.step / 2 else planner.make(saving)

    return Planner(make, planner.most, planner.step)


def layers_parameters(model: PreTrainedModel, numbers: Collection[int]) -> int:
    """Parameters of some layers together."""
    return sum(sizes.layer_parameters(model, n) for n in numbers)


def learned_plan(opened: Opened, recipe: Recipe, run: Run) -> Callable[..., Plan]:
    """What makes an order of units the plan of the recipe's budget, in the recipe's layout: `Ordered`'s fields -> plan.

    In the uniform layout the order says which whole layers go, and every layer that stays gives as much.
    """
    model, savings = opened.model, list[int]()

    def met(planner: Planner) -> Plan:
        if recipe.budget.speedup is None:
            return solved(opened, recipe, planner, run.tick)
        if not savings:  # to time the model is to measure it anew
            savings.append(sizes.saved_by(model, solved(opened, recipe, planner, run.tick)))
        return planner.make(savings[0])

    def planned(within: Mapping[AxisKey, Tensor], across: Mapping[AxisKey, Tensor], whole: Mapping[int, float]) -> Plan:
        ordered = in_order(model, recipe, Ordered(within, across, whole))
        if recipe.shape.layout == "per_layer" or not recipe.unit_kinds:
            return met(ordered)
        gone = met(ordered).layers if whole else ()
        return met(beside(model, recipe, planners.even_planner(model, recipe, gone=gone), gone))

    return planned


def equal_widths(opened: Opened, recipe: Recipe, run: Run) -> Plan | None:
    """The budget by the same from every layer, if that can be."""
    try:
        return (
            solved(opened, recipe, planners.even_planner(opened.model, recipe), run.tick) if recipe.unit_kinds else None
        )
    except BillhookError:
        return None
