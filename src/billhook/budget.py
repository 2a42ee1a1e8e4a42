"""What a model weighs, and what each axis may give up in a layout."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from billhook.axes import Axis
from billhook.errors import BillhookError, one_of
from billhook.families import KINDS, WIDTHS, attention, axes, experts_per_token, layers, mixture, refusal, row_of, sizes
from billhook.layout import stock_holder
from billhook.modeling_per_layer import MIXED
from billhook.plan import Plan
from billhook.residual import saved

AXES = {
    **KINDS,
    "layers": "whole decoder layers",
    "residual": "channels of the residual stream, through the whole model",
}
EXPERT_STEP = 8  # of experts' widths: transformers' grouped products want rows of 16 bytes, in two bytes a number
TOLERANCE = 0.005  # a goal so little below what can be had is met by it


def decoder_parameters(model: PreTrainedModel) -> int:
    """Parameters of the decoder layers: embeddings, final norm and head excluded."""
    return sum(p.numel() for p in layers(model).parameters())


def parameters(model: PreTrainedModel) -> dict[str, int]:
    """All parameters, those of the decoder layers, and those of embeddings and head (a tied one counted once)."""
    ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    held = {id(p): p.numel() for end in ends for p in end.parameters()}
    return {
        "parameters": total_parameters(model),
        "decoder_parameters": decoder_parameters(model),
        "embedding_parameters": sum(held.values()),
    }


def macs_per_token(model: PreTrainedModel, context: int) -> int:
    """Multiply-accumulates of one token that attends to `context` others: every linear weight once, scores and values."""
    linear = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear | Conv1D))
    for axis in axes(model, ("experts",)):  # of which a token sees a few, and the router's rows, all of them
        rows, hidden = model.get_parameter(axis.reader.param).shape
        linear += rows * hidden - (rows - experts_per_token(model)) * (axis.price(model) - hidden)
        experts: Any = mixture(model, axis.layer)
        if not isinstance(experts, nn.ModuleList):  # together: neither linear nor of the price
            linear += experts_per_token(model) * sum(p.numel() for p in experts.parameters()) // rows
    found = [attention(model, n) for n in range(len(layers(model)))]
    return linear + context * sum(2 * one.heads * one.head_dim for one in found)


def total_parameters(model: PreTrainedModel) -> int:
    """Parameters of the whole model, a tied head counted once: what the checkpoint holds."""
    return sum(p.numel() for p in model.parameters())


def anatomy(model: PreTrainedModel) -> dict[str, Any]:
    """What a model is made of and what each kind of axis could give up; weights are not needed."""
    decoder, rows = decoder_parameters(model), []
    for kind in KINDS:
        if kind in MIXED and not row_of(model).experts:
            continue
        row: dict[str, Any] = {"axis": kind, "units": None, "parameters_per_unit": None, "share_of_decoder": None}
        try:
            check_kinds(model, (kind,))
            found = axes(model, (kind,))
            price = found[0].price(model)
            share = sum(axis.units * axis.price(model) for axis in found) / decoder
            units = [axis.units for axis in found]
            row |= {"units": units[0] if len(set(units)) == 1 else units, "parameters_per_unit": price}
            row |= {"share_of_decoder": share, "refused": None}
        except BillhookError as error:
            row["refused"] = str(error)
        rows.append(row)
    return {
        "model_type": model.config.model_type,
        "layers": len(layers(model)),
        "hidden_size": model.config.hidden_size,
        "tied_embeddings": bool(model.config.tie_word_embeddings),
        "parameters": total_parameters(model),
        "decoder_parameters": decoder,
        "axes": rows,
    }


def check_kinds(model: PreTrainedModel, kinds: tuple[str, ...], layout: str = "uniform") -> None:
    """Raise BillhookError unless the model can give up every one of `kinds` in the layout."""
    if row_of(model).experts and (layout == "per_layer" or "value" in kinds):  # which that layout alone can hold
        raise BillhookError(
            f"{model.config.model_type} has no per_layer layout: experts of a layer are stored as one tensor"
        )
    check_names(kinds, layout)
    for kind in kinds:
        if why := refusal(model, kind, "per_layer"):
            raise BillhookError(f"{model.config.model_type} cannot give up {kind!r}: {why}; name other --axes")
        if layout == "uniform" and (why := refusal(model, kind, "uniform")):
            raise BillhookError(
                f"{model.config.model_type} cannot give up {kind!r} in a stock checkpoint: {why}; name other --axes, or use "
                "--layout per_layer"
            )


def check_names(kinds: tuple[str, ...], layout: str = "uniform") -> None:
    """Raise BillhookError for axes that no family can give up together in the layout."""
    if not kinds:
        raise BillhookError(f"no axis named: valid: {', '.join(AXES)}")
    for kind in kinds:
        one_of("axis", kind, AXES)
    if "value" in kinds and layout == "uniform":
        raise BillhookError(
            "axis 'value' (FASP's V/O channels) needs another attention shape than stock classes have: use --layout per_layer, "
            "or name others of ffn, heads, groups"
        )
    if "residual" in kinds and layout != "uniform":
        raise BillhookError(
            f"axis 'residual' is one size for the whole model, which the uniform layout says: leave out --layout {layout}"
        )
    if len(found := [kind for kind in ("heads", "groups", "value") if kind in kinds]) > 1:
        raise BillhookError(f"axes {' and '.join(map(repr, found))} cut the same columns: name one of them")


def allowed(model: PreTrainedModel, axis: Axis, multiple_of: int, layout: str = "uniform") -> list[int]:
    """Counts that may go from an axis, ascending; 0 is always one, all units never.

    Raises:
        BillhookError: no width fits, or there is nothing to take.
    """
    if axis.kind == "experts":
        least = least_experts(model, axis.blocks)
        if axis.units == least:
            raise BillhookError(f"every token goes to all {least} experts of a layer: none can go")
        return list(range(0, axis.units - least + 1, axis.blocks))
    if axis.kind == "expert_ffn" and multiple_of % EXPERT_STEP:
        raise BillhookError(f"--multiple-of {multiple_of}: widths of experts are multiples of {EXPERT_STEP}")
    if axis.kind in WIDTHS:
        drops = [0] + [d for d in range(1, axis.units) if (axis.units - d) % multiple_of == 0]
        if len(drops) == 1:
            raise BillhookError(
                f"--multiple-of {multiple_of}: no width below {axis.units} is a multiple of it: lower it"
            )
        return drops
    if axis.units == axis.blocks and axis.kind == "heads":
        raise BillhookError(f"each KV group of this model has one query head ({axis.units} in all): use --axes groups")
    steps = range(0, axis.units, axis.blocks)
    return [d for d in steps if d == 0 or layout == "per_layer" or stock_holder(model, _heads_after(model, axis, d))]


def least_experts(model: PreTrainedModel, groups: int) -> int:
    """The fewest that a router can choose among: what a token goes to must fit in the groups that it is sent to.

    Such a router judges a group by its two best.
    """
    if groups == 1:
        return experts_per_token(model)
    return groups * max(2, -(-experts_per_token(model) // getattr(model.config, row_of(model).keys["top_groups"])))


def limit(model: PreTrainedModel, axis: Axis) -> str:
    """What cutting more of an axis than `allowed` would come to."""
    if axis.kind == "experts":
        return f"a layer has fewer experts than the {least_experts(model, axis.blocks)} that its router needs"
    return "a layer loses all units"


def _heads_after(model: PreTrainedModel, axis: Axis, drop: int) -> dict[str, int]:
    keys, now = row_of(model).keys, attention(model, 0)
    left = {"heads": now.heads - drop}
    if axis.kind == "groups":
        left = {"heads": now.heads - drop * now.group, "kv_heads": now.kv_heads - drop}
    return sizes(model, 0) | {keys[size]: count for size, count in left.items() if size in keys}


@dataclass(frozen=True)
class Planner:
    """How an allocation turns parameters to save into a plan, the most that it can save, and the smallest difference."""

    make: Callable[[float], Plan]
    most: float | int
    step: float | int


def saved_by(model: PreTrainedModel, plan: Plan) -> int:
    """Parameters that a plan takes away."""
    if plan.residual:
        return saved(model, plan.residual, plan.rotate)  # no method cuts anything beside
    units = sum(plan.drops.get((axis.layer, axis.kind), 0) * axis.price(model) for axis in axes(model, plan.kinds))
    return units + sum(layer_parameters(model, n) for n in plan.layers)


def layer_parameters(model: PreTrainedModel, number: int) -> int:
    """Parameters of one decoder layer, norms included."""
    return sum(p.numel() for p in layers(model)[number].parameters())


def kv_cache_entries(model: PreTrainedModel, plan: Plan, context: int, batch: int) -> int:
    """Numbers in the KV cache once `plan` is carried out: keys and values of every position in every layer that stays.

    Value heads that lost channels are filled up with zeros before the cache (modeling_per_layer.NarrowValues).
    """
    total, window = 0, getattr(model.config, "sliding_window", None)
    types = getattr(model.config, "layer_types", None) or ["sliding_attention"] * len(layers(model))
    for n in range(len(layers(model))):
        if n not in plan.layers:
            now, seen = attention(model, n), context
            if window and types[n] == "sliding_attention":
                seen = min(context, window - 1)
            total += 2 * (now.kv_heads - plan.drops.get((n, "groups"), 0)) * now.head_dim * seen * batch
    return total


def reach(
    planner: Planner,
    cost: Callable[[Plan], float],
    goal: float | int,
    say: Callable[[Any], str],
    parameters: bool = False,
) -> Plan:
    """The plan that brings `cost`, which falls as more is saved, down to `goal`: nearest to it, by bisection.

    A plan can take the solver seconds: the search ends where it cannot tell two savings apart, and there is none where the
    cost is counted in `parameters`.

    Raises:
        BillhookError: the model costs less already, or more than that whatever is cut; says what is possible.
    """
    whole, least = cost(Plan()), cost(planner.make(planner.most))
    if goal >= whole:
        raise BillhookError(f"{say(goal)} is no less than the model's own {say(whole)}: nothing is left to cut")
    if goal < least * (1 - TOLERANCE):
        raise BillhookError(
            f"{say(goal)} is below the smallest possible here, {say(least)}: ask for a smaller cut, or name more axes"
        )
    if parameters:
        return planner.make(min(whole - goal, planner.most))
    low, high, best, nearest = 0.0, planner.most, Plan(), whole - goal
    while high - low > planner.step / 4:
        middle = (low + high) / 2
        try:
            plan = planner.make(middle)
        except BillhookError:  # less than half of a step
            low = middle
            continue
        if abs((found := cost(plan)) - goal) < nearest:
            best, nearest = plan, abs(found - goal)
        low, high = (middle, high) if found > goal else (low, middle)
    if best == Plan():
        raise BillhookError(
            f"{say(goal)} is less than half of the smallest step below the model's own {say(whole)}: ask for a larger cut"
        )
    return best
