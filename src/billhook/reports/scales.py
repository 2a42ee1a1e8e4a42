"""Where a number lies on an axis, and which round numbers are written beside it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

Number = float | int
FINEST = ((1, 1.5, 2, 3, 5, 7), (1, 2, 5), (1, 3), (1,))  # ticks of a decade, finest first
SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclass(frozen=True)
class Axis:
    """What an axis is called, whether it is logarithmic, whether its numbers are shares to be written in percent.

    What lies above `most` is put at the upper edge with an arrow: one broken model would press all others together.
    """

    label: str
    log: bool = False
    percent: bool = False
    most: Number = math.inf
    whole: bool = False  # counts: no ticks between

    def tick(self, value: Number) -> str:
        return f"{written(float(f'{value * 100:.10g}'))} %" if self.percent else written(value)

    def exact(self, value: Number) -> str:
        return f"{value * 100:.3g} %" if self.percent else f"{value:,.0f}" if self.whole else f"{value:,.4g}"


@dataclass(frozen=True)
class Scale:
    """A linear or logarithmic map of [low, high] to [start, end] on the page."""

    low: Number
    high: Number
    start: Number
    end: Number
    log: bool = False

    def at(self, value: Number) -> float:
        """The place of a value; what lies beyond the axis is put at its end."""
        low, high, inside = (self._read(v) for v in (self.low, self.high, min(max(value, self.low), self.high)))
        return self.start + (self.end - self.start) * (inside - low) / (high - low)

    def ticks(self, most: int) -> list[float]:
        return log_ticks(self.low, self.high, most) if self.log else linear_ticks(self.low, self.high, most)

    def _read(self, value: Number) -> float:
        return math.log(value) if self.log else float(value)


def fit(values: Sequence[Number], start: Number, end: Number, log: bool = False, room: float = 0.05) -> Scale:
    """A scale that holds all values, with some room at both ends; one value alone stands in the middle."""
    low, high = min(values), max(values)
    if log:
        share = max((high / low) ** room if high / low < math.inf else 10.0, 1.25 if high < low * 1.01 else 1.0)
        return Scale(max(low / share, 5e-324), min(high * share, 1e308), start, end, True)
    spread = (high - low) * room or abs(high) * 0.1 or 1.0
    return Scale(low - spread, high + spread, start, end)


def linear_ticks(low: Number, high: Number, most: int) -> list[float]:
    """At most `most` multiples of 1, 2 or 5 times a power of ten, from low to high."""
    least = (high - low) / max(most - 1, 1)
    power = 10.0 ** math.floor(math.log10(least)) if least > 0 else 1.0
    for step in (power, 2 * power, 5 * power, 10 * power, 20 * power):
        first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
        if last - first < most:
            return [float(f"{n * step:.10g}") for n in range(first, last + 1)]
    return []


def log_ticks(low: Number, high: Number, most: int) -> list[float]:
    """At most `most` readable ticks of a logarithmic axis: 30, 50, 100, …; plain steps where it spans too little."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for digits in FINEST:
        ticks = [digit * 10.0**n for n in decades for digit in digits if -308 < n < 308]
        inside = [float(f"{tick:.10g}") for tick in ticks if low <= tick <= high]
        if len(inside) <= most:
            return inside if len(inside) > 2 else linear_ticks(low, high, most)
    stride = math.ceil(len(decades) / most)
    return [10.0**n for n in decades[:: max(stride, 1)] if -308 < n < 308 and low <= 10.0**n <= high]


def written(value: Number) -> str:
    """A tick as people read it: 0.05, 20, 1,000, 10 k, 2 M, 10⁹."""
    size = abs(value)
    if size >= 1e9 or 0 < size < 1e-4:
        digit, power = f"{value:.3e}".split("e")
        digit = f"{float(digit):g}"
        return ("" if digit == "1" else f"{digit}·") + "10" + str(int(power)).translate(SUPERSCRIPT)
    for unit, name in ((1e6, " M"), (1e3, " k")):
        if size >= max(unit, 1e4):
            return f"{value / unit:.10g}{name}"
    return f"{value:,.10g}"
