"""What a search may choose, dimension by dimension, and what a choice means: a solution, and a shape of the cut over depth."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from billhook.errors import BillhookError, one_of
from billhook.models.axes import axes
from billhook.models.families import layers
from billhook.models.limits import allowed_drops
from billhook.models.plan import Plan
from billhook.models.sizes import layer_parameters, saved_by
from billhook.search.layer_blocks import Block
from billhook.search.metrics import FEW, LLM_PRUNER, REDUCTIONS, TERMS, Solution, fixed

GROUPS = {
    "samples": "which clusters of the pool weigh how much, how many of their windows, which draw",
    "metric": "a coefficient for each importance metric, a power, the reduction over a unit's slots, how terms are scaled",
    "budgets": "how much each layer gives: a smooth profile over depth, and how many at either end stay whole (per_layer layout); a "
    "block of layers that goes whole (uniform layout)",
    "attention": "how many KV groups or query heads go, of what the budget takes (where --axes names them beside ffn)",
}
SPACES = {
    "full": "samples, metric and budgets, attention where the axes have it",
    "paper": "samples, and one of LLM-Pruner's metrics: what AdaPruner's abstract names; nothing is restored",
}
DRAWS = 8
FEWEST = 8  # windows of a draw
# layers at the start and at the end, at most, as LLM-Pruner spares them; and no more than an eighth of all
SPARED = (4, 2)


@dataclass(frozen=True)
class Dimension:
    """Numbers from `low` to `high` in steps of `step`, whole ones if that is whole; or one of `choices`."""

    low: float | int = 0
    high: float | int = 1
    step: float | int = 0.1
    choices: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Shape:
    """How a cut is spread over the layers: shares exp(slope x + bend (2 x^2 - 1)), x from -1 at the first to 1 at the last."""

    first: int = 0  # layers that stay whole
    last: int = 0
    slope: float = 0.0
    bend: float = 0.0


@dataclass(frozen=True)
class Candidate:
    """A point of the space."""

    solution: Solution | None = None  # None: FASP's own score, which stands where kept weights are repaired
    shape: Shape | None = None  # None: as the allocation says
    attention: int | None = None  # units of the attention axis that go from every layer; None: likewise
    block: Block | None = None


@dataclass(frozen=True)
class Space:
    """The groups of dimensions that are open, over a pool of `windows` windows in `clusters` clusters."""

    groups: tuple[str, ...]
    paper: bool
    clusters: int
    windows: int
    reductions: tuple[str, ...]
    spared: tuple[int, int]  # layers at either end that may stay whole, in the per_layer layout
    blocks: tuple[Block, ...]  # of layers that may go whole, in the uniform layout: one of each length
    attention: tuple[int, ...]  # counts that may go; the first is what the allocation says

    @property
    def known(self) -> dict[str, Solution]:
        """The fixed metrics that a search starts from."""
        return fixed(self.clusters, LLM_PRUNER if self.paper else tuple(TERMS))

    def dimensions(self) -> dict[str, Dimension]:
        """By name; Optuna's and the report's words for them."""
        found: dict[str, Dimension] = {}
        if "samples" in self.groups:
            if self.clusters > 1:
                found |= {
                    f"cluster {n}": Dimension(0, 2 if self.clusters <= FEW else 1, 1) for n in range(self.clusters)
                }
            if self.windows > FEWEST:
                found |= {"windows": Dimension(FEWEST, self.windows, 1), "draw": Dimension(0, DRAWS - 1, 1)}
        if "metric" in self.groups:
            if self.paper:
                found["metric"] = Dimension(choices=LLM_PRUNER)
            else:
                found |= {name: Dimension() for name in TERMS}
                found |= {"power": Dimension(choices=(0.5, 1.0, 2.0)), "within": Dimension(choices=(True, False))}
            if len(self.reductions) > 1:
                found["reduction"] = Dimension(choices=self.reductions)
        if "budgets" in self.groups and self.blocks:
            found["block"] = Dimension(0, self.blocks[-1][1], self.blocks[0][1])  # by their lengths
        elif "budgets" in self.groups:
            found |= {"first": Dimension(0, self.spared[0], 1), "last": Dimension(0, self.spared[1], 1)}
            found |= {"slope": Dimension(-0.8, 0.8, 0.1), "bend": Dimension(-0.8, 0.8, 0.1)}
        if "attention" in self.groups and len(self.attention) > 1:
            found["attention"] = Dimension(choices=self.attention)
        return found

    def decode(self, given: Mapping[str, Any], standard: Solution) -> Candidate:
        """The candidate that values of the dimensions stand for; what is not open is as in `standard`."""
        levels = tuple(int(given.get(f"cluster {n}", standard.levels[n])) for n in range(self.clusters))
        shape, block = None, next((one for one in self.blocks if one[1] == given.get("block")), None)
        if "slope" in given:
            shape = Shape(given["first"], given["last"], given["slope"], given["bend"])
        count = int(given.get("windows", standard.count))
        coefficients: Mapping[str, float] = standard.coefficients
        if "metric" in given:
            coefficients = {given["metric"]: 1.0}
        elif "metric" in self.groups:
            coefficients = {name: given[name] for name in TERMS if given[name]} or standard.coefficients
        return Candidate(
            Solution(
                lowest(levels),
                0 if count == self.windows else count,
                int(given.get("draw", 0)) if count and count != self.windows else 0,
                coefficients,
                given.get("power", standard.power),
                given.get("reduction", standard.reduction),
                given.get("within", standard.within),
            ),
            shape,
            given.get("attention"),
            block,
        )

    def encode(self, solution: Solution) -> dict[str, Any]:
        """Values of the dimensions that stand for a solution, cut evenly; `decode` gives it back."""
        every: dict[str, Any] = {f"cluster {n}": level for n, level in enumerate(solution.levels)}
        every |= {name: solution.coefficients.get(name, 0.0) for name in TERMS}
        every |= {
            "metric": next(iter(solution.coefficients)),
            "windows": solution.count or self.windows,
            "draw": solution.draw,
        }
        every |= {name: getattr(solution, name) for name in ("power", "reduction", "within")}
        every |= {"first": 0, "last": 0, "slope": 0.0, "bend": 0.0, "attention": next(iter(self.attention), 0)}
        every["block"] = 0
        return {name: every[name] for name in self.dimensions()}


def lowest(levels: Sequence[int]) -> tuple[int, ...]:
    """The same mixture of clusters in lowest terms; none at all is all of them."""
    if not any(levels):
        return (1,) * len(levels)
    return tuple(levels) if 1 in levels else tuple(level // 2 for level in levels)


def groups_of(text: str) -> tuple[str, ...]:
    """The groups that `full`, `paper`, or names of groups with commas open.

    Raises:
        BillhookError: an unknown name.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        one_of("space", name, (*SPACES, *GROUPS))
    return tuple(GROUPS) if text == "full" else ("samples", "metric") if text == "paper" else tuple(names)


def space(
    text: str,
    layout: str,
    clusters: int,
    windows: int,
    model: PreTrainedModel,
    base: Plan,
    multiple_of: int,
    blocks: tuple[Block, ...] = (),
) -> Space:
    """What `text` opens, for a cut that saves what `base` does; `blocks`: that may go whole, each longer than the one before.

    Raises:
        BillhookError: an unknown name, or nothing is open.
    """
    groups, total = groups_of(text), len(layers(model))
    if "ffn" not in base.kinds or (layout == "uniform" and not blocks):
        groups = tuple(name for name in groups if name != "budgets")
    slots = max(len(axis.slots) for axis in axes(model, base.kinds))
    found = Space(
        groups,
        text == "paper",
        clusters,
        windows,
        tuple(REDUCTIONS) if slots > 1 else ("sum",),  # of one slot there is nothing to reduce
        (min(SPARED[0], total // 8), min(SPARED[1], total // 8)),
        blocks if "budgets" in groups else (),
        attention_counts(model, base, multiple_of, layout),
    )
    if not found.dimensions():
        raise BillhookError(
            f"--space {text} leaves nothing to choose here: budgets need a cut as large as a layer, or --layout per_layer, samples a pool of several clusters or "
            f"more than {FEWEST} windows, attention --axes like ffn,groups"
        )
    return found


def attention_kind(base: Plan) -> str | None:
    """The kind of attention axis that a plan cuts beside FFN channels."""
    found = [kind for _, kind in base.drops if kind != "ffn"]
    return found[0] if found and "ffn" in {kind for _, kind in base.drops} else None


def attention_counts(model: PreTrainedModel, base: Plan, multiple_of: int, layout: str) -> tuple[int, ...]:
    """How many units of the attention axis may go where FFN channels make up for it; what `base` says comes first."""
    if (kind := attention_kind(base)) is None:
        return ()
    own, found = max(count for (_, k), count in base.drops.items() if k == kind), []
    for count in allowed_drops(model, axes(model, (kind,))[0], multiple_of, layout):
        try:
            exchanged(model, base, multiple_of, layout, attention=count)
        except BillhookError:
            continue
        found.append(count)
    return tuple(sorted(found, key=lambda count: (count != own, count)))


def longest_block(model: PreTrainedModel, base: Plan) -> int:
    """How many layers may go whole where FFN channels make up for them: no more than save what `base` does, never the first or last."""
    if base.layers or "ffn" not in base.kinds:
        return 0
    whole = max(layer_parameters(model, n) for n in range(len(layers(model))))
    return max(min(saved_by(model, base) // whole, len(layers(model)) - 2), 0)


def exchanged(
    model: PreTrainedModel,
    base: Plan,
    multiple_of: int,
    layout: str,
    *,
    attention: int | None = None,
    block: Block | None = None,
) -> Plan:
    """`base` with other things gone: `attention` units of its attention axis from every layer, a block of whole layers.  The FFN
    channels that go with them leave a model that is no larger than by `base`, and smaller by less than one step of their width.

    Raises:
        BillhookError: no number of channels does.
    """
    gone = tuple(range(block[0], sum(block))) if block else base.layers
    places = [place for place in base.drops if place[0] not in gone]
    every = [axis for axis in axes(model, tuple({kind for _, kind in places})) if (axis.layer, axis.kind) in places]
    ffn = [axis for axis in every if axis.kind == "ffn"]
    drops = {
        (axis.layer, axis.kind): base.drops[axis.layer, axis.kind] if attention is None else attention
        for axis in every
        if axis.kind != "ffn"
    }
    rest, price = saved_by(model, base) - saved_by(model, Plan(drops, gone)), sum(axis.price(model) for axis in ffn)
    narrowest = min(ffn, key=lambda axis: axis.units)
    each = next((drop for drop in allowed_drops(model, narrowest, multiple_of, layout) if drop * price >= rest), None)
    if rest < 0 or each is None:
        raise BillhookError("no number of FFN channels makes up for that")
    return Plan({**drops, **{(axis.layer, "ffn"): each for axis in ffn}}, gone)


def shaped(model: PreTrainedModel, base: Plan, shape: Shape, multiple_of: int, floor: float) -> Plan:
    """`base` with the same parameters saved in FFN channels, spread by a shape; every layer keeps the share `floor` at least.

    Raises:
        BillhookError: layers that may give are too few for what is to be saved.
    """
    total = len(layers(model))
    ffn = [axis for axis in axes(model, ("ffn",)) if shape.first <= axis.layer < total - shape.last]
    prices = {axis.layer: axis.price(model) for axis in ffn}
    target = saved_by(model, Plan({place: count for place, count in base.drops.items() if place[1] == "ffn"}))
    counts = {
        a.layer: [d for d in allowed_drops(model, a, multiple_of, "per_layer") if a.units - d >= floor * a.units]
        for a in ffn
    }
    wish = {axis.layer: axis.units * _share(axis.layer, total, shape) for axis in ffn}

    def saving(scale: float) -> float:
        return float(sum(prices[n] * min(scale * wish[n], counts[n][-1]) for n in counts))

    if saving(math.inf) < target * (1 - 1e-9) or not counts:
        raise BillhookError("a shape that spares too many layers cannot save that much")
    low, high = 0.0, max((counts[n][-1] + 1) / wish[n] for n in counts)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if saving(middle) < target else (low, middle)
    drops = {n: min(counts[n], key=lambda d, n=n: abs(d - min(high * wish[n], counts[n][-1]))) for n in counts}
    _settle(drops, {n: min(high * wish[n], counts[n][-1]) for n in counts}, counts, prices, target)
    every = {(n, "ffn"): drops.get(n, 0) for n in range(total)}
    return Plan({**base.drops, **every}, base.layers)


def _share(layer: int, total: int, shape: Shape) -> float:
    x = 2 * layer / max(total - 1, 1) - 1
    return math.exp(shape.slope * x + shape.bend * (2 * x * x - 1))


def _settle(
    drops: dict[int, int],
    wish: Mapping[int, float | int],
    counts: Mapping[int, Sequence[int]],
    prices: Mapping[int, int],
    target: int,
) -> None:
    """Move widths by single steps, those nearest to the next one first, until what is saved is nearest to `target`."""
    while True:
        off = target - sum(prices[n] * drops[n] for n in drops)
        moves = []
        for n, now in drops.items():
            at = counts[n].index(now) + (1 if off > 0 else -1)
            if 0 <= at < len(counts[n]) and prices[n] * abs(counts[n][at] - now) < 2 * abs(off):
                moves.append((abs(counts[n][at] - wish[n]), n, counts[n][at]))
        if not moves:
            return
        _, n, count = min(moves)
        drops[n] = count
