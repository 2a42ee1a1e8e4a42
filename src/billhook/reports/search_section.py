"""The section of a report page about a search: what it found, how, and the samples that calibrate in the end."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from billhook.reports import charts, markup
from billhook.reports.charts import Axis, Point, Series
from billhook.reports.formatting import finite
from billhook.reports.search_tables import (
    STANDARD,
    choice_rows,
    chosen_words,
    finalist_header,
    finalist_rows,
    importance_rows,
    known_header,
    known_rows,
    outcome_words,
    part_header,
    part_rows,
    pool_words,
    samples,
    standard_metric,
    state_words,
)

HEADINGS = "How the samples and the metric were found", "How the metric was found"
TEXTS = 64  # the most samples that a page shows
FENCE = 1.5  # Tukey's: interquartile ranges above the upper quartile beyond which a loss is off the scale
TRIALS = Axis("trial", whole=True)


def search(record: Mapping[str, Any] | None) -> str:
    """How a search went, from its trials to the samples; parts without data are left out."""
    if not record:
        return ""
    return markup.section(
        HEADINGS[record.get("method") == "optishear"],
        f"<p>{markup.tight(outcome_words(record))}</p>\n",
        markup.note(pool_words(record)),
        _trace(record),
        _importance(record),
        _parts(record),
        _known(record),
        _finalists(record),
        _choice(record),
        _samples(record),
    )


def _trace(record: Mapping[str, Any]) -> str:
    """Every trial that was tried, and the best so far; the standard is dotted at 0, the winning finalist a star."""
    tried = [t for t in record["trials"] if t["state"] == "tried" and finite(t.get("worse"))]
    points = [Point(t["number"], t["worse"]) for t in tried]
    best = [Point(p.x, min(float(q.y or 0) for q in points[: n + 1])) for n, p in enumerate(points)]
    chosen = [Point(t["number"], t.get("worse")) for t in record["trials"] if t["number"] == record.get("chosen")]
    star = Series(f"number {record['chosen']}", chosen) if chosen and finite(chosen[0].y) else None
    most = _fence([float(p.y or 0) for p in points])
    lines = [Series("tried", points, 0.0, "points"), Series("best so far", best, drawn="steps")]
    title = "Trace of the search"
    y = Axis(f"nats a token behind {STANDARD}", most=most)
    drawing = charts.both(charts.curves, title, lines, TRIALS, y, star)
    words = [
        f"dotted at 0: {standard_metric(record)}{' on the whole pool' * bool(record.get('pool'))}; each trial is "
        "compared with "
        "it on windows of its own round"
    ]
    words += [f"star: number {record['chosen']}, the best of the finalists on more windows"] if star else []
    off = sum(float(p.y or 0) > most for p in points)
    words += [f"arrows: {off:,} off the scale, up to {max(float(p.y or 0) for p in points):.3g}"] if off else []
    words += [f"not drawn: {', '.join(left)}"] if (left := state_words(record)) else []
    return markup.figure(title, "; ".join(words), drawing)


def _fence(values: Sequence[float]) -> float:
    """The height above which few trials lie, far from all the others: they would press these together."""
    if len(values) < 2:
        return max([*values, 0.0])
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return max(high + FENCE * (high - low), 0.0)


def _importance(record: Mapping[str, Any]) -> str:
    rows = [markup.row(_first(row[0]), [markup.cell(row[1])]) for row in importance_rows(record)]
    caption = "Share of the losses' variance (fANOVA)"
    return _table("What decided", caption, ["dimension", "share"], rows, "few")


def _parts(record: Mapping[str, Any]) -> str:
    rows = [markup.row(_first(row[0]), map(markup.cell, row[1:])) for row in part_rows(record)]
    bare = "without restoration up to the last row" if record.get("restoration") else "without restoration"
    caption = f"Nats a token on the windows that decided, {bare}; ± one standard error"
    return _table("Where the gain comes from", caption, part_header(), rows)


def _known(record: Mapping[str, Any]) -> str:
    rows = []
    for best, meaning, row in known_rows(record):
        small = f" <small>{markup.say(meaning)}</small>" if meaning else ""
        rows.append(markup.row(f'<th scope="row">{markup.name(row[0])}{small}</th>', map(markup.cell, row[1:]), best))
    caption = "Nats a token, tried before the first trial; bold: the best, which the others are compared with"
    return _table("Known metrics on the whole pool", caption, known_header(), rows)


def _finalists(record: Mapping[str, Any]) -> str:
    rows = [markup.row(_first(row[0]), map(markup.cell, row[1:]), best) for best, row in finalist_rows(record)]
    zeros = "pruned as the result is" if record.get("method") == "optishear" else "without restoration"
    restored = "restored as the result is" if record.get("restoration") else zeros
    windows = "on windows that choose one of them, and on those that decide if it is taken"
    caption = f"Nats a token, {restored}: {windows}; bold: taken"
    return _table("Finalists", caption, finalist_header(), rows)


def _choice(record: Mapping[str, Any]) -> str:
    whose = chosen_words(record) if record.get("accepted") else str(record["standard"])
    return markup.part("What was chosen", markup.pairs(f"The solution of {whose}", choice_rows(record)))


def _samples(record: Mapping[str, Any]) -> str:
    every = samples(record)
    shown = "".join(
        f'<div><h4>{markup.tight(where)}</h4><blockquote dir="auto">{markup.say(text)}</blockquote></div>\n'
        for where, text in every[:TEXTS]
    )
    known = f"The {TEXTS} heaviest of {len(every):,} windows." if len(every) > TEXTS else ""
    return markup.details(
        "The samples, as text", markup.note(known), f'<div class="texts">\n{shown}</div>\n' if shown else ""
    )


def _table(title: str, caption: str, header: Sequence[str], rows: Sequence[str], kind: str = "") -> str:
    """A table under a heading, or nothing without rows."""
    body = f"<tbody>{''.join(rows)}</tbody>\n"
    return markup.part(title, markup.table(caption, markup.head(header), body, kind)) if rows else ""


def _first(text: str) -> str:
    return f'<th scope="row">{markup.name(text)}</th>'
