"""Amounts as people write them: 100M parameters, 250MB."""

import math
import re
from typing import Any

from billhook.errors import SettingsError

COUNT = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9}
BYTES = {"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


def amount(value: Any, units: dict[str, int], name: str) -> Any:
    """`100M` or `250MB` as a number; a value that is not a text is returned unchanged.

    Raises:
        BillhookError: the text is not a number with one of the units.
    """
    if not isinstance(value, str):
        return value
    match = re.fullmatch(
        r"\s*([0-9]*\.?[0-9]+(?:e[0-9]+)?)\s*([a-z]*)\s*", value.replace(",", "").replace("_", "").lower()
    )
    if not match or (match[2] or min(units, key=len)) not in units or math.isinf(float(match[1])):
        raise SettingsError(
            f"--{name} {value!r} is no amount: write a number, with one of {', '.join(filter(None, units))}"
        )
    return round(float(match[1]) * units.get(match[2], 1))
