"""Numbers as people write them: 100M parameters, 250MB."""

import math
import re
from typing import Any

from billhook.errors import BillhookError

COUNT = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9}
BYTES = {"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


def amount(value: Any, units: dict[str, int], name: str) -> Any:
    """`100M` or `250MB` as a number; what is no text is left as it is.

    Raises:
        BillhookError: it is no number with one of the units.
    """
    if not isinstance(value, str):
        return value
    found = re.fullmatch(
        r"\s*([0-9]*\.?[0-9]+(?:e[0-9]+)?)\s*([a-z]*)\s*", value.replace(",", "").replace("_", "").lower()
    )
    if not found or (found[2] or min(units, key=len)) not in units or math.isinf(float(found[1])):
        raise BillhookError(
            f"--{name} {value!r} is no amount: write a number, with one of {', '.join(filter(None, units))}"
        )
    return round(float(found[1]) * units.get(found[2], 1))
