"""Ways to spread a cut that save equally much: over layers, between attention and FFN channels, in whole layers."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel

from billhook.errors import BillhookError
from billhook.models.axes import axes
from billhook.models.families import layers
from billhook.models.limits import allowed_drops
from billhook.models.plan import Plan
from billhook.models.sizes import layer_parameters, saved_by
from billhook.search.layer_blocks import Block


@dataclass(frozen=True)
class BaseCut:
    """The cut that the allocation asks for; every candidate saves as many parameters."""

    model: PreTrainedModel
    plan: Plan
    width_step: int  # widths are multiples of this
    layout: str  # uniform or per_layer


@dataclass(frozen=True)
class Shape:
    """How a cut is spread over the layers.

    Shares are exp(slope x + bend (2 x^2 - 1)), x from -1 at the first layer to 1 at the last.
    """

    first: int = 0  # layers at the start that stay whole
    last: int = 0  # layers at the end that stay whole
    slope: float = 0.0
    bend: float = 0.0

    def share(self, layer: int, total: int) -> float:
        """The share of one layer of `total`, up to a common factor."""
        x = 2 * layer / max(total - 1, 1) - 1
        return math.exp(self.slope * x + self.bend * (2 * x * x - 1))


def attention_kind(plan: Plan) -> str | None:
    """The kind of attention axis that a plan cuts beside FFN channels."""
    kinds = [kind for _, kind in plan.drops if kind != "ffn"]
    return kinds[0] if kinds and "ffn" in {kind for _, kind in plan.drops} else None


def attention_counts(base: BaseCut) -> tuple[int, ...]:
    """How many attention units may go where FFN channels make up for it; the plan's own count comes first."""
    if (kind := attention_kind(base.plan)) is None:
        return ()
    planned = max(count for (_, k), count in base.plan.drops.items() if k == kind)
    counts = []
    for count in allowed_drops(base.model, axes(base.model, (kind,))[0], base.width_step, base.layout):
        try:
            exchanged(base, attention=count)
        except BillhookError:
            continue
        counts.append(count)
    return tuple(sorted(counts, key=lambda count: (count != planned, count)))


def longest_block(model: PreTrainedModel, plan: Plan) -> int:
    """How many layers may go whole where FFN channels make up for them.

    They save no more than `plan`, and the first and the last layer always stay.
    """
    if plan.layers or "ffn" not in plan.kinds:
        return 0
    largest = max(layer_parameters(model, n) for n in range(len(layers(model))))
    return max(min(saved_by(model, plan) // largest, len(layers(model)) - 2), 0)


def exchanged(base: BaseCut, *, attention: int | None = None, block: Block | None = None) -> Plan:
    """The base plan with `attention` attention units gone from every layer, or with a block of whole layers gone.

    FFN channels make up for the difference: the model is no larger than by the base plan, and smaller by less than one
    step of their width.

    Raises:
        BillhookError: no number of channels makes up for it.
    """
    model, planned = base.model, base.plan.drops
    dropped = tuple(range(block[0], sum(block))) if block else base.plan.layers
    places = [place for place in planned if place[0] not in dropped]
    every = [axis for axis in axes(model, tuple({kind for _, kind in places})) if (axis.layer, axis.kind) in places]
    ffn = [axis for axis in every if axis.kind == "ffn"]
    drops = {
        (axis.layer, axis.kind): planned[axis.layer, axis.kind] if attention is None else attention
        for axis in every
        if axis.kind != "ffn"
    }
    remaining = saved_by(model, base.plan) - saved_by(model, Plan(drops, dropped))
    price = sum(axis.price(model) for axis in ffn)
    narrowest = min(ffn, key=lambda axis: axis.units)
    counts = allowed_drops(model, narrowest, base.width_step, base.layout)
    channels = next((count for count in counts if count * price >= remaining), None)
    if remaining < 0 or channels is None:
        raise BillhookError("no number of FFN channels makes up for that")
    return Plan({**drops, **{(axis.layer, "ffn"): channels for axis in ffn}}, dropped)


def shaped(base: BaseCut, shape: Shape, floor: float) -> Plan:
    """The base plan with its FFN channels spread by a shape; it saves the same parameters.

    Args:
        floor: share of its channels that every layer keeps at least.

    Raises:
        BillhookError: too few layers may give channels.
    """
    model, planned = base.model, base.plan.drops
    total = len(layers(model))
    ffn = [axis for axis in axes(model, ("ffn",)) if shape.first <= axis.layer < total - shape.last]
    prices = {axis.layer: axis.price(model) for axis in ffn}
    target = saved_by(model, Plan({place: count for place, count in planned.items() if place[1] == "ffn"}))
    counts = {
        axis.layer: [
            count
            for count in allowed_drops(model, axis, base.width_step, "per_layer")
            if axis.units - count >= floor * axis.units
        ]
        for axis in ffn
    }
    wish = {axis.layer: axis.units * shape.share(axis.layer, total) for axis in ffn}

    def saving(scale: float) -> float:
        return float(sum(prices[n] * min(scale * wish[n], counts[n][-1]) for n in counts))

    if saving(math.inf) < target * (1 - 1e-9) or not counts:
        raise BillhookError("a shape that spares too many layers cannot save that much")
    low, high = 0.0, max((counts[n][-1] + 1) / wish[n] for n in counts)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if saving(middle) < target else (low, middle)
    exact = {n: min(high * wish[n], counts[n][-1]) for n in counts}
    drops = {n: min(counts[n], key=lambda count, n=n: abs(count - exact[n])) for n in counts}
    _settle(drops, exact, counts, prices, target)
    ffn_drops = {(n, "ffn"): drops.get(n, 0) for n in range(total)}
    return Plan({**planned, **ffn_drops}, base.plan.layers)


def _settle(
    drops: dict[int, int],
    wish: Mapping[int, float | int],
    counts: Mapping[int, Sequence[int]],
    prices: Mapping[int, int],
    target: int,
) -> None:
    """Move widths by single steps until the saving is nearest to `target`; the nearest to its wish moves first."""
    while True:
        missing = target - sum(prices[n] * drops[n] for n in drops)
        moves = []
        for n, drop in drops.items():
            i = counts[n].index(drop) + (1 if missing > 0 else -1)
            if 0 <= i < len(counts[n]) and prices[n] * abs(counts[n][i] - drop) < 2 * abs(missing):
                moves.append((abs(counts[n][i] - wish[n]), n, counts[n][i]))
        if not moves:
            return
        _, n, count = min(moves)
        drops[n] = count
