"""From a number of parameters to save to a plan: which layers give how much, by an allocation."""

from collections.abc import Collection, Iterable, Mapping

from transformers import PreTrainedModel

from billhook.errors import BillhookError
from billhook.math import knapsack, selection
from billhook.models.axes import Axis, axes
from billhook.models.families import layers
from billhook.models.limits import allowed_drops, limit_reason
from billhook.models.plan import Curves, Plan, even_plan
from billhook.models.sizes import layer_parameters
from billhook.planning.allocation import NEED_CURVES
from billhook.planning.budget import Planner
from billhook.planning.recipe import Recipe
from billhook.tensors import Scores


def planner(
    model: PreTrainedModel, recipe: Recipe, curves: Curves | None = None, *, gone: Collection[int] = ()
) -> Planner:
    """What turns parameters to save into a plan, by the recipe's allocation.

    Args:
        curves: the losses that `global`, `standardised` and `sensitivity` weigh.
        gone: layers that go whole, whatever the curves say.

    Raises:
        BillhookError: the family cannot give up these axes; `make` raises it for an impossible saving.
    """
    total, allocation = len(layers(model)), recipe.shape.spread
    if allocation.name in NEED_CURVES:
        assert curves is not None
        return weighing_planner(model, recipe, curves, gone=gone)
    first, last = allocation.spared
    spared = [n for n in range(total) if n < first or n >= total - last]
    if len(spared) == total:
        raise BillhookError(f"allocation skip:{first},{last} spares all {total} layers: nothing is left to cut")
    return even_planner(model, recipe, spared=spared, gone=gone)


def weighing_planner(model: PreTrainedModel, recipe: Recipe, curves: Curves, *, gone: Collection[int] = ()) -> Planner:
    """What loses least by `curves`, in units of axes and, where they say what a layer costs, in whole layers."""
    found = [axis for axis in axes(model, recipe.unit_kinds) if axis.layer not in gone]
    choices, by_layers = _choices(model, recipe, curves, found), sum(layer_parameters(model, n) for n in gone)
    whole = {
        n: (layer_parameters(model, n), loss[1])
        for (n, kind), loss in curves.items()
        if kind == "layers" and n not in gone
    }
    step = min((c.savings[1] for c in choices if len(c.savings) > 1), default=1)
    most = by_layers + knapsack.largest_saving(choices, whole)
    return Planner(lambda saving: _weighed(choices, found, saving - by_layers, whole, gone), most, step)


def even_planner(
    model: PreTrainedModel, recipe: Recipe, *, spared: Collection[int] = (), gone: Collection[int] = ()
) -> Planner:
    """The same from every layer that is neither spared nor gone."""
    kinds = recipe.unit_kinds
    cut = [n for n in range(len(layers(model))) if n not in spared and n not in gone]
    candidates = []
    for kind in kinds:
        if not (found := [axis for axis in axes(model, (kind,)) if axis.layer in cut]):
            raise BillhookError(f"none of the layers that stay can give up {kind!r}")
        narrowest, price = min(found, key=lambda axis: axis.units), sum(axis.price(model) for axis in found)
        drops = allowed_drops(model, narrowest, recipe.shape.width_step, recipe.shape.layout)
        candidates.append(knapsack.AxisChoices(kind, narrowest.units, price, drops, limit_reason(model, narrowest)))
    by_layers = sum(layer_parameters(model, n) for n in gone)
    steps = [c.price * c.drops[1] for c in candidates if len(c.drops) > 1]

    def make(saving: float | int) -> Plan:
        rest = saving - by_layers
        if gone and abs(rest) <= min(steps, default=by_layers / len(gone)) / 2:  # they alone are what is asked for
            return even_plan(len(layers(model)), dict.fromkeys(kinds, 0), spared, gone)
        if not candidates:
            raise BillhookError(
                f"{len(gone)} whole layers save {by_layers:,} parameters, not the {saving:,.0f} asked for"
            )
        return even_plan(len(layers(model)), knapsack.even_widths(candidates, rest), spared, gone)

    most = by_layers + sum(c.drops[-1] * c.price for c in candidates)
    return Planner(make, most, min(steps, default=by_layers))


def score_curves(model: PreTrainedModel, scores: Mapping[tuple[int, str], Scores], steps: int = 48) -> Curves:
    """Loss curves from scores that add up over units and compare across layers:
    what the lowest units are worth together."""
    found: Curves = {}
    for axis in axes(model, tuple(dict.fromkeys(kind for _, kind in scores))):
        each, per_block = scores[axis.layer, axis.kind], axis.units // axis.blocks
        tried = sorted({axis.blocks * max(1, round(per_block * n / steps)) for n in range(1, steps + 1)})
        gone = {count: selection.lowest(each, count, axis.blocks)[0] for count in tried}
        found[axis.layer, axis.kind] = {count: float(each[units].sum()) for count, units in gone.items()}
    return found


def file_plan(model: PreTrainedModel, kinds: Iterable[str], keep: Mapping[int, Mapping[str, int]]) -> Plan:
    """The plan of an allocation file: what it says to keep of each axis of each layer.

    Raises:
        BillhookError: a layer is missing or unknown, or a width is impossible; names it.
    """
    by_place = {(axis.layer, axis.kind): axis for axis in axes(model, tuple(kinds))}
    total = len(layers(model))
    if unknown := sorted(set(keep) - set(range(total))):
        raise BillhookError(f"allocation file: there is no layer {unknown[0]}; the model has {total}, numbered from 0")
    if missing := sorted(set(range(total)) - set(keep)):
        raise BillhookError(f"allocation file: layer {missing[0]} is missing; name all {total}, whole ones too")
    drops = {}
    for layer, said in keep.items():
        for kind, units in said.items():
            axis = by_place.get((layer, kind))
            if axis is None:
                raise BillhookError(
                    f"allocation file, layer {layer}: {kind!r} is not among the axes to prune ({', '.join(kinds)})"
                )
            if not axis.blocks <= units <= axis.units or units % axis.blocks:
                step = f" in steps of {axis.blocks}" if axis.blocks > 1 else ""
                raise BillhookError(
                    f"allocation file, layer {layer}: {kind} cannot keep {units}; it has {axis.units} and keeps {axis.blocks} "
                    f"or more{step}"
                )
            drops[layer, kind] = axis.units - units
    return Plan({place: drops.get(place, 0) for place in by_place})


def _choices(model: PreTrainedModel, recipe: Recipe, curves: Curves, may_give: Iterable[Axis]) -> list[knapsack.Choice]:
    """What each axis may give; every layer keeps the recipe's floor."""
    found = []
    for axis in may_give:
        price, least = axis.price(model), recipe.shape.floor * axis.units
        steps = allowed_drops(model, axis, recipe.shape.width_step, "per_layer")
        drops = [d for d in steps if d == 0 or axis.units - d >= least]
        losses = knapsack.interpolate(curves[axis.layer, axis.kind], drops)
        found.append(knapsack.Choice(axis.layer, drops, [d * price for d in drops], losses))
    return found


def _weighed(
    choices: list[knapsack.Choice],
    found: list[Axis],
    saving: float | int,
    whole: Mapping[int, tuple[float | int, float]],
    gone_already: Collection[int],
) -> Plan:
    counts, gone = knapsack.solve(choices, saving, whole)
    if not any(counts) and not gone:
        raise BillhookError(
            "the budget is less than half of the smallest step: raise the ratio, or lower --multiple-of"
        )
    drops = {
        (axis.layer, axis.kind): count for axis, count in zip(found, counts, strict=True) if axis.layer not in gone
    }
    return Plan(drops, tuple(sorted({*gone, *gone_already})))
