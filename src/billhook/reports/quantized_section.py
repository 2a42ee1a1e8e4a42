"""What fewer bits came to, as a section of a page: bytes, errors and bits layer by layer, and how bits were chosen."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from billhook.reports import charts, markup
from billhook.reports.charts import Axis
from billhook.reports.formatting import finite, number
from billhook.reports.quantized import (
    bits_of,
    method_words,
    operator_header,
    operator_rows,
    quantized_rows,
    tried_header,
    tried_rows,
)

ERRORS = {
    "rounded to nearest": "error_nearest",
    "on windows it did not see": "error_held_out",
    "as packed": "error",
}


def section(said: Mapping[str, Any] | None) -> str:
    """The section; '' where nothing was quantised."""
    if not said:
        return ""
    caption = f"{said['parent']}, {said['bits_per_weight']:.2f} bits a weight by {method_words(said)}"
    return markup.section(
        "Fewer bits",
        markup.pairs(caption, quantized_rows(said)),
        _errors(said["operators"]),
        _bits(said["operators"]),
        _tried(said["choice"]),
        _operators(said["operators"]),
    )


def _by_layer(operators: Sequence[Mapping[str, Any]], key: str) -> list[float | None]:
    """The mean over each layer's weights; None where one has no number."""
    found = []
    for n in range(1 + max(one["layer"] for one in operators)):
        values = [one[key] for one in operators if one["layer"] == n]
        found.append(statistics.fmean(values) if values and all(map(finite, values)) else None)
    return found


def _errors(operators: Sequence[Mapping[str, Any]]) -> str:
    rows = {name: _by_layer(operators, key) for name, key in ERRORS.items()}
    rows = {name: values for name, values in rows.items() if any(value is not None for value in values)}
    if not rows:
        return ""
    title = "Error of the weights' outputs"
    drawn = charts.both(charts.layers, f"{title}, layer by layer", rows, Axis("relative error"), [])
    return markup.figure(title, "How far the outputs of a layer's weights moved, their mean: 0 if not at all.", drawn)


def _bits(operators: Sequence[Mapping[str, Any]]) -> str:
    """The bits of each layer, where they differ."""
    bits = _by_layer([{**one, "bits": bits_of(one["grid"])} for one in operators], "bits")
    if len(set(bits)) < 2:
        return ""
    title = "Bits a weight"
    drawn = charts.both(charts.layers, f"{title}, layer by layer", {"bits": bits}, Axis("bits a weight"), [])
    return markup.figure(title, "Scales included; the mean over a layer's weights.", drawn)


def _tried(choice: Mapping[str, Any]) -> str:
    rows = [markup.row(markup.cell(row[0]), map(markup.cell, row[1:])) for row in tried_rows(choice)]
    if not rows:
        return ""
    caption = "Types of layers that were tried, rounded to nearest, in order of the loss"
    table = markup.table(caption, markup.head(tried_header()), f"<tbody>{''.join(rows)}</tbody>\n", "numbers")
    return markup.details(f"All {number(len(rows), '{:,.0f}')} trials", table)


def _operators(operators: Sequence[Mapping[str, Any]]) -> str:
    rows = [
        markup.row(f'<th scope="row">{markup.name(row[0])}</th>', map(markup.cell, row[1:]))
        for row in operator_rows(operators)
    ]
    body = f"<tbody>{''.join(rows)}</tbody>\n"
    table = markup.table("Every weight: type, relative errors", markup.head(operator_header()), body, "numbers")
    return markup.details("All weights", table)
