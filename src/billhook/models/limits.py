"""How much of each axis a model can give up, and what its stock class can hold."""

from typing import Any

from transformers import PreTrainedModel

from billhook.choices import KINDS, MIXED, check_axes
from billhook.errors import BillhookError, ModelError
from billhook.models import proof
from billhook.models.axes import Axis, axes, refusal
from billhook.models.families import (
    FAMILIES,
    WIDTHS,
    attention,
    experts_per_token,
    layers,
    row_of,
    sizes,
    stock_type,
)
from billhook.models.layout import stock_holder
from billhook.models.multimodal import type_of, within
from billhook.models.sizes import decoder_parameters, total_parameters

EXPERT_STEP = 8  # widths of experts are multiples of it: transformers' grouped products want rows of 16 bytes


def anatomy(model: PreTrainedModel) -> dict[str, Any]:
    """Layers, sizes and axes of a model, and what each kind of axis could give up; weights are not needed."""
    decoder, rows = decoder_parameters(model), []
    for kind in KINDS:
        if kind in MIXED and not row_of(model).experts:
            continue
        row: dict[str, Any] = {"axis": kind, "units": None, "parameters_per_unit": None, "share_of_decoder": None}
        try:
            check_kinds(model, (kind,))
            axes_of_kind = axes(model, (kind,))
            price = axes_of_kind[0].price(model)
            share = sum(axis.units * axis.price(model) for axis in axes_of_kind) / decoder
            units = [axis.units for axis in axes_of_kind]
            row |= {"units": units[0] if len(set(units)) == 1 else units, "parameters_per_unit": price}
            row |= {"share_of_decoder": share, "refused": None}
        except BillhookError as error:
            row["refused"] = str(error)
        rows.append(row)
    return {
        "model_type": type_of(model),
        "layers": len(layers(model)),
        "hidden_size": model.config.hidden_size,
        "tied_embeddings": bool(model.config.tie_word_embeddings),
        "parameters": total_parameters(model),
        "decoder_parameters": decoder,
        "axes": rows,
        "row": proof.told(row_of(model), stock_type(model.config.model_type)),
    }


def check_kinds(model: PreTrainedModel, kinds: tuple[str, ...], layout: str = "uniform") -> None:
    """Raise BillhookError unless the model has the layout, and can give up every one of `kinds` in it."""
    if row_of(model).experts and (layout == "per_layer" or "value" in kinds):  # `value` needs that layout
        raise ModelError(
            f"{model.config.model_type} has no per_layer layout: experts of a layer are stored as one tensor"
        )
    if (stands := within(model)) and (layout == "per_layer" or "value" in kinds):
        raise ModelError(
            f"{stands.model_type} has no per_layer layout: its stock class has one size for all layers of its text decoder: "
            "leave out --layout"
        )
    if row_of(model).only_ffns and (layout == "per_layer" or "value" in kinds):
        raise ModelError(
            f"{model.config.model_type} has no per_layer layout: its row is of FFNs and whole layers alone, and the "
            "modelling file sizes attention, too: leave out --layout"
        )
    if layout == "per_layer" and stock_type(model.config.model_type) not in FAMILIES:
        raise ModelError(
            f"{model.config.model_type} is a family of another package, and the modelling file of the per_layer layout has "
            "billhook's own alone: leave out --layout"
        )
    if kinds:
        check_axes(kinds, layout)
    for kind in kinds:
        if why := refusal(model, kind, "per_layer"):
            raise ModelError(f"{model.config.model_type} cannot give up {kind!r}: {why}; name other --axes")
        if layout == "uniform" and (why := refusal(model, kind, "uniform")):
            raise ModelError(
                f"{model.config.model_type} cannot give up {kind!r} in a stock checkpoint: {why}; name other --axes, "
                "or use --layout per_layer"
            )


def allowed_drops(model: PreTrainedModel, axis: Axis, multiple_of: int, layout: str = "uniform") -> list[int]:
    """How many units of an axis may be dropped, ascending: 0 always, all of them never.

    Raises:
        BillhookError: no smaller width is allowed, or no unit can be dropped.
    """
    if axis.kind == "experts":
        least = least_experts(model, axis.blocks)
        if axis.units == least:
            raise ModelError(f"every token goes to all {least} experts of a layer: none can go")
        return list(range(0, axis.units - least + 1, axis.blocks))
    if axis.kind == "expert_ffn" and multiple_of % EXPERT_STEP:
        raise ModelError(f"--multiple-of {multiple_of}: widths of experts are multiples of {EXPERT_STEP}")
    if axis.kind in WIDTHS:
        drops = [0] + [d for d in range(1, axis.units) if (axis.units - d) % multiple_of == 0]
        if len(drops) == 1:
            raise ModelError(f"--multiple-of {multiple_of}: no width below {axis.units} is a multiple of it: lower it")
        return drops
    if axis.units == axis.blocks and axis.kind == "heads":
        raise ModelError(f"each KV group of this model has one query head ({axis.units} in all): use --axes groups")
    steps = range(0, axis.units, axis.blocks)
    return [d for d in steps if d == 0 or layout == "per_layer" or stock_holder(model, _heads_after(model, axis, d))]


def least_experts(model: PreTrainedModel, groups: int) -> int:
    """The fewest experts that a router can choose among.

    If it chooses groups first, a token's experts must fit in its groups, and each group needs two: it is judged by its
    two best.
    """
    if groups == 1:
        return experts_per_token(model)
    return groups * max(2, -(-experts_per_token(model) // getattr(model.config, row_of(model).keys["top_groups"])))


def limit_reason(model: PreTrainedModel, axis: Axis) -> str:
    """What would happen if more of an axis were cut than `allowed_drops` says."""
    if axis.kind == "experts":
        return f"a layer has fewer experts than the {least_experts(model, axis.blocks)} that its router needs"
    return "a layer loses all units"


def _heads_after(model: PreTrainedModel, axis: Axis, drop: int) -> dict[str, int]:
    keys, heads = row_of(model).keys, attention(model, 0)
    remaining = {"heads": heads.heads - drop}
    if axis.kind == "groups":
        remaining = {"heads": heads.heads - drop * heads.group, "kv_heads": heads.kv_heads - drop}
    return sizes(model, 0) | {keys[size]: count for size, count in remaining.items() if size in keys}
