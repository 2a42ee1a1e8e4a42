"""What few bits came to, in rows."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from billhook.choices import BITS_A_WEIGHT
from billhook.reports.formatting import finite, number

KEPT = "the codes that training left"
POINT = ("information", "slope", "bend")  # of a search's trial


def quantized_rows(said: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Bits, bytes and errors of a quantised model, as (name, value)."""
    types = ", ".join(f"{count} of {name}" for name, count in said["types"].items())
    rows = [
        ("weights of the layers", f"{number(said['bits_per_weight'])} bits each ({types}), by {method_words(said)}"),
        ("embedding and head", str(said["embedding"])),
    ]
    for name, part in (said.get("containers") or {}).items():
        rows.append((f"bytes as {name}", f"{part['bytes']:,}"))
    if told := errors(said["operators"]):
        rows.append(("error of the weights' outputs", told))
    if choice := said["choice"]:
        rows.append(("bits by layer", _choice(choice)))
        if tried := choice.get("tried"):
            rows.append(("searched", _tried(tried)))
    return rows


def method_words(said: Mapping[str, Any]) -> str:
    """How the codes came about."""
    return KEPT if said["method"] == "kept" else str(said["method"])


def operator_header() -> list[str]:
    return ["weight", "type", "bits a weight", "error", "on unseen windows", "rounded to nearest"]


def operator_rows(operators: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """One row a weight."""
    keys = ("error", "error_held_out", "error_nearest")
    return [
        [one["path"], one["grid"], number(bits_of(one["grid"])), *(number(one[key], "{:.4f}") for key in keys)]
        for one in operators
    ]


def bits_of(grid: str) -> float:
    """Bits that a weight of a type takes, its share of the block's scales included."""
    return BITS_A_WEIGHT[grid]


def tried_header() -> list[str]:
    return ["start", "KL, nats a token", *POINT]


def tried_rows(choice: Mapping[str, Any]) -> list[list[str]]:
    """One row for each types of layers that a search tried, the best first."""
    tried = sorted(choice.get("tried") or [], key=lambda one: one["kl"] if finite(one["kl"]) else math.inf)
    return [
        [one["start"] or "", number(one["kl"], "{:.5f}"), *(number(one.get(key)) for key in POINT)] for one in tried
    ]


def errors(operators: list[Mapping[str, Any]]) -> str:
    """Mean relative errors over all weights; '' where no text was read."""
    known = [one for one in operators if finite(one["error"]) and finite(one["error_nearest"])]
    if not known:
        return ""
    own, nearest = (statistics.fmean(one[key] for one in known) for key in ("error", "error_nearest"))
    unseen = [one["error_held_out"] for one in known if finite(one["error_held_out"])]
    last = f", {statistics.fmean(unseen):.4f} on windows it did not see" if unseen else ""
    return f"{own:.4f} (rounded to nearest {nearest:.4f}{last})"


def _tried(tried: list[Mapping[str, Any]]) -> str:
    """The starts of a search and its best trial, rounded to nearest, on the windows that it chose by."""
    starts = ", ".join(f"{one['start']} {number(one['kl'], '{:.4f}')}" for one in tried if one["start"])
    trials = [one["kl"] for one in tried if not one["start"]]
    best = min(filter(finite, trials), default=None)
    return f"{starts}; best of {len(trials)} trials {number(best, '{:.4f}')} nats a token, rounded to nearest"


def _choice(choice: Mapping[str, Any]) -> str:
    own = f"KL to the model before {number(choice['kl'], '{:.4f}')} nats a token on windows that nothing has seen"
    if choice["uniform"] is None:
        return f"{own}; no single type is as small"
    other = f"{choice['uniform']} in all layers {number(choice['uniform_kl'], '{:.4f}')}"
    taken = "taken" if choice["taken"] == "mixed" else f"not taken: {choice['taken']} is"
    return f"{own}, {other}: {taken}"
