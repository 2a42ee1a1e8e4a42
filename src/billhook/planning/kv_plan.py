"""Widths of value heads, and of key heads with them, by a budget: how much of each layer stays in the KV cache."""

from collections.abc import Mapping
from functools import partial
from math import prod

from transformers import PreTrainedModel

from billhook.math.condition import condition, depths
from billhook.math.rotary_pairs import best
from billhook.models.axes import axes
from billhook.models.families import layers, module_path, row_of, weight_of
from billhook.models.plan import Plan
from billhook.models.sizes import saved_by
from billhook.planning.budget import Planner
from billhook.planning.rank_plan import fitting
from billhook.tensors import PairScores


def kv_planner(model: PreTrainedModel, least: float, pairs: Mapping[int, PairScores]) -> Planner:
    """From parameters to save to widths that fall with depth by condition numbers (LoRC).

    Args:
        least: channels of the last layer, as a share of the first one's; 1: all layers alike.
        pairs: what each rotary pair is worth, by layer, where keys get as narrow as values; else nothing.
    """
    found = axes(model, ("value",))
    at = depths([_condition(model, n) for n in range(len(layers(model)))]) if least < 1 else [0.0] * len(layers(model))

    def plan_of(scale: float) -> Plan:
        drops, kept = {}, {}
        for axis in found:
            each = axis.units // axis.blocks
            width = each * min(1.0, scale / least * (1 - at[axis.layer] * (1 - least)))
            width = 2 * max(1, round(width / 2)) if pairs else max(1, round(width))
            drops[axis.layer, "value"] = (each - width) * axis.blocks
            if pairs:
                kept[axis.layer] = best(pairs[axis.layer], width // 2)
        return Plan(drops, pairs=kept)

    step = found[0].blocks * found[0].price(model)
    return Planner(partial(fitting, model, plan_of), saved_by(model, plan_of(0.0)), step)


def _condition(model: PreTrainedModel, layer: int) -> float:
    row = row_of(model)
    return prod(
        condition(weight_of(model, module_path(model, layer, f"{row.attention}.{name}"))) for name in (row.k, row.v)
    )
