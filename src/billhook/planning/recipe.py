"""A recipe: a method with its settings, how much goes, from where, by which text,
and on what it is computed.  Loads no torch."""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from billhook.choices import ALLOCATIONS, AXES, CLIENTS, DTYPES, FAMILY_ROW, LAYOUTS, check_axes
from billhook.errors import SettingsError
from billhook.math.pattern import block_side
from billhook.planning.allocation import Allocation, parse
from billhook.runtime.options import Part, extra, option

SIZES = ("ratio", "params", "memory", "speedup")  # budgets of cuts that make a model smaller
SAMPLES = 64  # windows of calibration text, where the user says no number
ZEROS = ("sparsity", "pattern")  # budgets of zeros
EXAMPLES = {
    **{"ratio": "--ratio 0.2", "params": "--params 100M", "memory": "--memory 250MB", "speedup": "--speedup 1.3"},
    **{"sparsity": "--sparsity 0.5", "pattern": "--pattern 2:4"},
}


class Budget(Part):
    """How much goes: one of a share, parameters, bytes, speed, or zeros; and the vocabulary."""

    ratio: float | None = option(
        None, "share of the decoder layers' parameters to remove, between 0 and 1", gt=0, lt=1, budget=True
    )
    params: int | None = option(
        None, "or: parameters the whole model may have, like 100M", ge=1, unit="count", budget=True
    )
    memory: int | None = option(
        None, "or: bytes of its weights and KV cache, like 250MB", ge=1, unit="bytes", budget=True
    )
    speedup: float | None = option(None, "or: how many times faster a prefill is on this machine", gt=1, budget=True)
    context: int = option(2048, "tokens in the KV cache that --memory counts", ge=1)
    batch: int = option(1, "sequences in the KV cache that --memory counts", ge=1)
    sparsity: float | None = option(None, "for zeros: their share of the targeted weights", gt=0, lt=1, budget=True)
    pattern: str = option("", "or N of every M of a row, like 2:4; or where the share lies: block16", budget=True)
    vocab_from: tuple[str, ...] = option((), "keep the tokens of this text, drop the rest; may be repeated")
    vocab_size: int = option(0, "with --vocab-from: keep at least so many tokens", ge=0, shown="")


class Shape(Part):
    """Which axes give it, and which layers give how much."""

    axes: tuple[str, ...] = option((), "what to prune, with commas; empty: the method's own", names=AXES)
    layout: str = option("uniform", "uniform: stock checkpoints; per_layer: widths differ by layer", names=LAYOUTS)
    allocation: str = option(
        "equal", "which layers give how much: equal, sensitivity, global, …, or a file", completes=ALLOCATIONS
    )
    floor: float = option(0.3, "share that every layer keeps, where layers differ", gt=0, le=1)
    clients: tuple[str, ...] = option(
        ("transformers",),
        f"who will load it, which decides widths: {', '.join(CLIENTS)}",
        names=CLIENTS,
        flag="for",
    )
    multiple_of: int | None = option(None, "round widths to multiples of this", ge=1, shown="what --for wants")

    @cached_property
    def spread(self) -> Allocation:
        """The allocation; its file is read once."""
        return parse(self.allocation)

    @property
    def width_step(self) -> int:
        """What FFN widths are a multiple of."""
        return self.multiple_of or math.lcm(*(CLIENTS[name][0] for name in self.clients))


class Calibration(Part):
    """The text that is looked at, in windows of tokens."""

    source: str = option(
        "mixed",
        "text: a file, a folder, a hub data set name[:config[:split]], mixed, or demo",
        flag="calibration",
    )
    samples: int | None = option(
        None,
        "windows of calibration text",
        ge=1,
        shown=f"{SAMPLES}; auto takes up to 192, where the text has them",
    )
    probes: int = option(8, "further windows, by which sensitivity and auto judge", ge=1)
    seq_len: int = option(512, "tokens in a window", ge=2)
    seed: int = option(0, "which windows are drawn", ge=0, lt=2**63)

    @property
    def has_prose(self) -> bool:
        """Whether it holds the technical prose by which other texts' cuts are judged, too."""
        return "mixed" in self.source.split("+")


class Compute(Part):
    """What it is computed on, and by which row."""

    device: str = option("auto", "auto (an accelerator if there is one), cpu, cuda, mps, …")
    dtype: str = option("auto", f"to compute in: auto, {', '.join(DTYPES)}", names=("auto", *DTYPES))
    family_row: str = option("", FAMILY_ROW, shown="derived")
    look: bool = option(True, "end with a look: another kind of text, repetition, small tasks; about a minute")


PARTS = {"budget": Budget, "shape": Shape, "calibration": Calibration, "compute": Compute}
FLAT = {"calibration": "source"}  # settings that are called otherwise in their part than where all stand together


@dataclass(frozen=True)
class Recipe:
    """How to prune: everything that decides the result but the model itself.

    Raises:
        BillhookError: its parts cannot go together.
    """

    method: Any  # a `Method`
    settings: Any  # a `MethodSettings`: the method's own
    budget: Budget
    shape: Shape
    calibration: Calibration
    compute: Compute

    def __post_init__(self) -> None:
        self._check_budget()
        self._check_shape()
        self.method.fits(self)

    @property
    def kinds(self) -> tuple[str, ...]:
        """The axes to prune."""
        return self.shape.axes or self.method.default_kinds

    @property
    def unit_kinds(self) -> tuple[str, ...]:
        """Those of `kinds` that are axes of a layer, not layers themselves."""
        return tuple(kind for kind in self.kinds if kind != "layers")

    @property
    def given(self) -> dict[str, Any]:
        """The budgets that are given, by name."""
        parts = {**_budgets(self.budget), **_budgets(self.settings)}
        found = {name: value for name, value in parts.items() if value not in (None, "")}
        if found.get("sparsity") and block_side(found.get("pattern", "")):
            del found["pattern"]  # it says where the zeros of the share lie
        return found

    @property
    def samples(self) -> int:
        """Windows to calibrate on, if the text has them."""
        return self.calibration.samples or self.method.samples(self)

    @property
    def reads(self) -> bool:
        """Whether anything is measured on text."""
        return bool(self.budget.vocab_from) or self.method.reads(self)

    @property
    def sized(self) -> bool:
        """Whether a budget is given that a plan is solved for."""
        return any(getattr(self.budget, name) is not None for name in SIZES)

    @property
    def words(self) -> str:
        """The budget as the user would say it."""
        for name, value in self.given.items():
            if isinstance(value, str):
                return f"{name} {value}"
            return f"{name} {value:,}" if isinstance(value, int) else f"{name} {value:g}"
        return "an allocation file" if self.shape.spread.name == "file" else "vocabulary alone"

    def parts(self) -> dict[str, Part]:
        """The settings by part."""
        return {"method": self.settings, **{name: getattr(self, name) for name in PARTS}}

    def flat(self) -> dict[str, Any]:
        """All settings together, as plain data: what records hold."""
        called = {inner: name for name, inner in FLAT.items()}
        settings = {
            called.get(name, name): value
            for part in self.parts().values()
            for name, value in part.model_dump(mode="json").items()
        }
        return {"method": self.method.name, **settings}

    def nested(self) -> dict[str, Any]:
        """The settings that differ from their defaults, by part: what a recipe file holds."""
        parts = {name: part.model_dump(mode="json", exclude_defaults=True) for name, part in self.parts().items()}
        return {name: part for name, part in parts.items() if part} | {
            "method": {"name": self.method.name, **parts["method"]}
        }

    def _check_budget(self) -> None:
        method, given = self.method, list(self.given)
        flags = [f"--{name.replace('_', '-')}" for name in given]
        taken = [EXAMPLES[name] for name in method.budgets]
        if alien := [name for name in given if name in EXAMPLES and name not in method.budgets]:
            raise SettingsError(f"--{alien[0]} is no budget of {method.name}: give {' or '.join(taken)}")
        if len(given) > 1:
            raise SettingsError(f"{' and '.join(flags)} are two budgets: give one")
        if self.budget.vocab_size and not self.budget.vocab_from:
            raise SettingsError("--vocab-size says how many tokens --vocab-from keeps at least: give a text with it")
        by_file = self.shape.spread.name == "file"
        if by_file and given:
            raise SettingsError(f"{flags[0]} and an allocation file both say how much goes: give one")
        if not given and not by_file and not (self.budget.vocab_from and method.trims):
            raise SettingsError(f"no budget: give {' or '.join(filter(None, (', '.join(taken[:-1]), taken[-1])))}")

    def _check_shape(self) -> None:
        method, shape = self.method, self.shape
        if shape.allocation != "equal" and not method.allocates:
            raise SettingsError(f"{method.name} has no allocation: leave out --allocation {shape.allocation}")
        if method.layouts == ("per_layer",) and shape.layout != "per_layer":
            raise SettingsError(f"{method.name} makes what no stock checkpoint holds: use --layout per_layer")
        if shape.layout not in method.layouts:
            raise SettingsError(f"{method.name} keeps the shape of every layer: leave out --layout {shape.layout}")
        if shape.layout == "uniform" and shape.spread.uneven:
            raise SettingsError(
                f"allocation {shape.allocation} makes layers differ, which the uniform layout cannot hold: use --layout per_layer"
            )
        if shape.axes and not method.kinds:
            raise SettingsError(f"{method.name} cuts no axis: leave out --axes")
        if self.kinds:
            check_axes(self.kinds, "per_layer" if method.own_shapes else shape.layout)
        if alien := [kind for kind in self.kinds if kind not in method.kinds]:
            own = ", ".join(method.kinds)
            raise SettingsError(f"{method.name} does not prune {alien[0]!r}: leave out --axes, or name some of {own}")


def _budgets(part: Part) -> dict[str, Any]:
    return {name: getattr(part, name) for name, field in type(part).model_fields.items() if extra(field, "budget")}
