"""What few bits came to, in rows."""

import statistics
from collections.abc import Mapping
from typing import Any

from billhook.reports.formatting import number


def quantized_rows(said: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Bits, bytes and errors of a quantised model, as (name, value)."""
    types = ", ".join(f"{count} of {name}" for name, count in said["types"].items())
    rows = [
        ("weights of the layers", f"{number(said['bits_per_weight'])} bits each ({types}), by {said['method']}"),
        ("embedding and head", str(said["embedding"])),
    ]
    for name, part in (said.get("containers") or {}).items():
        rows.append((f"bytes as {name}", f"{part['bytes']:,}"))
    if told := errors(said["operators"]):
        rows.append(("error of the weights' outputs", told))
    if choice := said["choice"]:
        rows.append(("bits by layer", _choice(choice)))
    return rows


def errors(operators: list[Mapping[str, Any]]) -> str:
    """Mean relative errors over all weights; '' where no text was read."""
    known = [one for one in operators if one["error"] is not None]
    if not known:
        return ""
    own, nearest = (statistics.fmean(one[key] for one in known) for key in ("error", "error_nearest"))
    unseen = [one["error_held_out"] for one in known if one["error_held_out"] is not None]
    last = f", {statistics.fmean(unseen):.4f} on windows it did not see" if unseen else ""
    return f"{own:.4f} (rounded to nearest {nearest:.4f}{last})"


def _choice(choice: Mapping[str, Any]) -> str:
    own = f"KL to the model before {number(choice['kl'], '{:.4f}')} nats a token on windows that nothing has seen"
    if choice["uniform"] is None:
        return f"{own}; no single type is as small"
    other = f"{choice['uniform']} in all layers {number(choice['uniform_kl'], '{:.4f}')}"
    taken = "taken" if choice["taken"] == "mixed" else f"not taken: {choice['taken']} is"
    return f"{own}, {other}: {taken}"
