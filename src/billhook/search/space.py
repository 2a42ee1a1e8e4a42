"""What a search may choose, dimension by dimension, and the candidate that a choice stands for."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from billhook.choices import GROUPS, SPACES
from billhook.errors import BillhookError, one_of
from billhook.models.axes import axes
from billhook.models.families import layers
from billhook.search.budgets import BaseCut, Shape, attention_counts
from billhook.search.layer_blocks import Block
from billhook.search.metrics import FEW, LLM_PRUNER, REDUCTIONS, TERMS, Solution, known_metrics

DRAWS = 8  # how many draws of windows there are to choose from
FEWEST = 8  # the least windows in a draw
# the most layers that stay whole at the start and at the end (LLM-Pruner's), but no more than an eighth of all
SPARED = (4, 2)


@dataclass(frozen=True)
class Dimension:
    """Numbers from `low` to `high` in steps of `step`, integers if `step` is one; or one of `choices`."""

    low: float | int = 0
    high: float | int = 1
    step: float | int = 0.1
    choices: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Candidate:
    """A point of the space."""

    solution: Solution | None = None  # None: FASP's own score, where kept weights are restored
    shape: Shape | None = None  # None: as the allocation says
    attention: int | None = None  # units of the attention axis that go from every layer; None: as the allocation says
    block: Block | None = None  # layers that go whole

    def describe(self) -> dict[str, Any]:
        return {
            "solution": self.solution and self.solution.describe(),
            "shape": self.shape and asdict(self.shape),
            "attention": self.attention,
            "block": self.block,
        }


@dataclass(frozen=True)
class Space:
    """The groups of dimensions that are open, over a pool of `windows` windows in `clusters` clusters."""

    groups: tuple[str, ...]
    paper: bool  # whether metrics are LLM-Pruner's, one at a time
    clusters: int
    windows: int
    reductions: tuple[str, ...]
    spared: tuple[int, int]  # the most layers that stay whole at the start and at the end, in the per_layer layout
    blocks: tuple[Block, ...]  # layers that may go whole, in the uniform layout: one block of each length
    attention: tuple[int, ...]  # how many attention units may go; the first is what the allocation says

    @property
    def known(self) -> dict[str, Solution]:
        """The known metrics that a search starts from."""
        return known_metrics(self.clusters, LLM_PRUNER if self.paper else tuple(TERMS))

    def dimensions(self) -> dict[str, Dimension]:
        """The open dimensions, under the names that Optuna and the report use."""
        dimensions: dict[str, Dimension] = {}
        if "samples" in self.groups:
            if self.clusters > 1:
                level = Dimension(0, 2 if self.clusters <= FEW else 1, 1)
                dimensions |= {f"cluster {n}": level for n in range(self.clusters)}
            if self.windows > FEWEST:
                dimensions |= {"windows": Dimension(FEWEST, self.windows, 1), "draw": Dimension(0, DRAWS - 1, 1)}
        if "metric" in self.groups:
            if self.paper:
                dimensions["metric"] = Dimension(choices=LLM_PRUNER)
            else:
                dimensions |= {name: Dimension() for name in TERMS}
                dimensions["power"] = Dimension(choices=(0.5, 1.0, 2.0))
                dimensions["within"] = Dimension(choices=(True, False))
            if len(self.reductions) > 1:
                dimensions["reduction"] = Dimension(choices=self.reductions)
        if "budgets" in self.groups and self.blocks:
            dimensions["block"] = Dimension(0, self.blocks[-1][1], self.blocks[0][1])  # blocks by their lengths
        elif "budgets" in self.groups:
            dimensions |= {"first": Dimension(0, self.spared[0], 1), "last": Dimension(0, self.spared[1], 1)}
            dimensions |= {"slope": Dimension(-0.8, 0.8, 0.1), "bend": Dimension(-0.8, 0.8, 0.1)}
        if "attention" in self.groups and len(self.attention) > 1:
            dimensions["attention"] = Dimension(choices=self.attention)
        return dimensions

    def decode(self, values: Mapping[str, Any], standard: Solution) -> Candidate:
        """The candidate that values of the dimensions stand for; what is not open is as in `standard`."""
        levels = tuple(int(values.get(f"cluster {n}", standard.levels[n])) for n in range(self.clusters))
        count = int(values.get("windows", standard.count))
        coefficients: Mapping[str, float] = standard.coefficients
        if "metric" in values:
            coefficients = {values["metric"]: 1.0}
        elif "metric" in self.groups:
            coefficients = {name: values[name] for name in TERMS if values[name]} or standard.coefficients
        solution = Solution(
            levels=lowest(levels),
            count=0 if count == self.windows else count,
            draw=int(values.get("draw", 0)) if count and count != self.windows else 0,
            coefficients=coefficients,
            power=values.get("power", standard.power),
            reduction=values.get("reduction", standard.reduction),
            within=values.get("within", standard.within),
        )
        shape = None
        if "slope" in values:
            shape = Shape(values["first"], values["last"], values["slope"], values["bend"])
        block = next((block for block in self.blocks if block[1] == values.get("block")), None)
        return Candidate(solution, shape, values.get("attention"), block)

    def encode(self, solution: Solution) -> dict[str, Any]:
        """Values of the dimensions that stand for a solution, cut evenly; `decode` gives it back."""
        values: dict[str, Any] = {f"cluster {n}": level for n, level in enumerate(solution.levels)}
        values |= {name: solution.coefficients.get(name, 0.0) for name in TERMS}
        values["metric"] = next(iter(solution.coefficients))
        values |= {"windows": solution.count or self.windows, "draw": solution.draw}
        values |= {name: getattr(solution, name) for name in ("power", "reduction", "within")}
        values |= {"first": 0, "last": 0, "slope": 0.0, "bend": 0.0, "block": 0}
        values["attention"] = next(iter(self.attention), 0)
        return {name: values[name] for name in self.dimensions()}


def lowest(levels: Sequence[int]) -> tuple[int, ...]:
    """The same mixture of clusters in lowest terms; levels that are all 0 stand for all clusters alike."""
    if not any(levels):
        return (1,) * len(levels)
    return tuple(levels) if 1 in levels else tuple(level // 2 for level in levels)


def groups_of(text: str) -> tuple[str, ...]:
    """The groups of dimensions that `full`, `paper`, or comma-separated names of groups open.

    Raises:
        BillhookError: an unknown name.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        one_of("space", name, (*SPACES, *GROUPS))
    return tuple(GROUPS) if text == "full" else ("samples", "metric") if text == "paper" else tuple(names)


def space(text: str, base: BaseCut, clusters: int, windows: int, blocks: tuple[Block, ...] = ()) -> Space:
    """The space that `text` opens.

    Args:
        blocks: layers that may go whole, each block longer than the one before.

    Raises:
        BillhookError: an unknown name, or nothing is open.
    """
    groups, total = groups_of(text), len(layers(base.model))
    if "ffn" not in base.plan.kinds or (base.layout == "uniform" and not blocks):
        groups = tuple(name for name in groups if name != "budgets")
    slots = max(len(axis.slots) for axis in axes(base.model, base.plan.kinds))
    opened = Space(
        groups=groups,
        paper=text == "paper",
        clusters=clusters,
        windows=windows,
        reductions=tuple(REDUCTIONS) if slots > 1 else ("sum",),  # with one slot there is nothing to reduce
        spared=(min(SPARED[0], total // 8), min(SPARED[1], total // 8)),
        blocks=blocks if "budgets" in groups else (),
        attention=attention_counts(base),
    )
    if not opened.dimensions():
        raise BillhookError(
            f"--space {text} leaves nothing to choose here: budgets need a cut as large as a layer, or --layout "
            "per_layer; "
            f"samples need a pool of several clusters, or of more than {FEWEST} windows; attention needs --axes like "
            "ffn,groups"
        )
    return opened
