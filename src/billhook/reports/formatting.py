"""Numbers as people read them; a dash where there is none."""

import math
from collections.abc import Iterable
from typing import Any

NONE = "—"  # what stands for a number that was not measured or is not finite
KINDS = {"ffn": "FFN channels", "heads": "query heads", "groups": "KV groups", "value": "value channels"}


def finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def number(value: Any, form: str = "{:,.2f}", scale: float | int = 1) -> str:
    return form.format(value * scale) if finite(value) else NONE


def percent(value: Any, digits: int = 1) -> str:
    return number(value, f"{{:,.{digits}f}} %", 100)


def signed(removed: Any, digits: int = 1) -> str:
    """A share removed, as a change: −16.0 %."""
    return number(0 - removed, f"{{:+,.{digits}f}} %", 100).replace("-", "−") if finite(removed) else NONE


def with_error(value: Any, error: Any, form: str = "", scale: float | int = 1) -> str:
    """A value with its standard error, where both are known."""
    form = form or places(value)
    margin = f" ± {number(error, form, scale)}" if finite(value) and finite(error) else ""
    return number(value, form, scale) + margin


def places(value: Any) -> str:
    """A format with two decimals, or fewer for large numbers, where they say nothing."""
    size = abs(value) if finite(value) else 0
    return "{:,.2f}" if size < 1e3 else "{:,.0f}" if size < 1e7 else "{:.3g}"


def ratio(last: Any, first: Any, digits: int = 3) -> str:
    if not (finite(last) and finite(first) and first):
        return NONE
    change = last / first
    return f"×{change:,.{digits if change < 10 else 1 if change < 1e3 else 0}f}"


def count(value: Any) -> str:
    """A number of parameters to three or four figures, for any size."""
    for unit, name in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if finite(value) and abs(value) >= unit:
            return f"{value / unit:.2f} {name}"
    return number(value, "{:,.0f}")


def figures(value: Any) -> str:
    return "{:,.0f}" if finite(value) and value >= 100 else "{:,.1f}"


def milliseconds(value: Any) -> str:
    return number(value, "{:,.0f} ms" if finite(value) and value >= 0.1 else "{:,.1f} ms", 1e3)


def megabytes(value: Any) -> str:
    return number(value, "{:,.1f} MB", 1e-6)


def mebibytes(value: Any) -> str:
    return number(value, "{:,.0f} MiB" if finite(value) and value >= 2**24 else "{:,.1f} MiB", 2**-20)


def rate(value: Any) -> str:
    """A learning rate as people type it: 6e-4."""
    if not finite(value) or value == 0 or abs(value) >= 0.01:
        return number(value, "{:.3g}")
    digits, power = f"{value:.2e}".split("e")
    return f"{float(digits):g}e{int(power)}"


def ranges(numbers: Iterable[int]) -> str:
    """Ascending whole numbers, with consecutive ones as a range: 0-12, 19-29."""
    spans: list[list[int]] = []
    for n in numbers:
        if spans and n == spans[-1][1] + 1:
            spans[-1][1] = n
        else:
            spans.append([n, n])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)
