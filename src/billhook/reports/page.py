"""report.html: one file, made for a person, from report.json and nothing else.

No script, no request: what is not in the report is not on the page.  Names and texts come from strangers and are
escaped.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from billhook.reports import (
    charts,
    markup,
    quantized_section,
    recovery_section,
    recovery_tables,
    search_section,
    tables,
)
from billhook.reports.charts import Axis, Band, Point, Series
from billhook.reports.cut_tables import (
    calibration_words,
    cut_rows,
    layer_header,
    layer_rows,
    missed_by_layer,
    missed_header,
    widths,
)
from billhook.reports.formatting import KINDS, NONE, finite, number, places
from billhook.reports.headline import Figure, figures_of, how_to_measure
from billhook.reports.records import to_json
from billhook.reports.style import STYLE
from billhook.reports.tables import Measure, score_of, texts_of, window_words
from billhook.runtime.atomic import write_text

KIND = {
    "prune": "What was pruned",
    "evaluate": "Models side by side",
    "compare": "Methods compared",
    "sweep": "Sizes swept",
    "recover": "What training recovered",
    "quantize": "What fewer bits came to",
}
UNMEASURED = {
    "prune": "Speed and quality have not been measured. To measure both models on held-out text:",
    "recover": "Only perplexity has been measured. To measure speed, memory and texts beside the unpruned model:",
    "quantize": "Speed and quality have not been measured. To measure it beside the model that it was:",
}
SCALE = 20  # a chart of perplexities ends at this multiple of the lowest: models beyond it are all broken
POLICY = "default-src 'none'; style-src 'unsafe-inline'"
UNPRINTABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


def render(report: Mapping[str, Any]) -> str:
    """The whole page.  Sections without data are left out."""
    sections = [
        _points(report),
        _measures(report),
        recovery_section.training(report.get("healing")),
        quantized_section.section(report.get("quantized")),
        _texts(report.get("models") or []),
        recovery_section.selection((report.get("cut") or {}).get("selection")),
        search_section.search((report.get("cut") or {}).get("search")),
        _cut(report.get("cut")),
        _missed((report.get("cut") or {}).get("mope")),
        _layers(report.get("cut")),
        _conditions(report),
    ]
    title, kind = markup.say(report["title"]), markup.say(KIND.get(report.get("kind", ""), ""))
    body = (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{title}</title>\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        f'<meta name="color-scheme" content="light dark">\n<style>{STYLE}</style>\n</head>\n<body>\n'
        f'<header>\n<p class="kind">{kind}</p>\n<h1>{title}</h1>\n'
        f"{_headline(report)}</header>\n<main>\n{''.join(filter(None, sections))}</main>\n"
        "<footer>Made by billhook. Every number on this page is in report.json.</footer>\n</body>\n</html>\n"
    )
    return UNPRINTABLE.sub("\ufffd", body)


def _headline(report: Mapping[str, Any]) -> str:
    out = _figures(figures_of(report))
    if command := how_to_measure(report):
        advice = UNMEASURED["quantize" if report.get("quantized") else "recover" if report.get("healing") else "prune"]
        out += f'<p class="todo">{advice}<code>{markup.say(command)}</code></p>\n'
    return out


def _figures(figures: Sequence[Figure]) -> str:
    shown = "".join(
        f'<div><dt>{markup.say(f.name)}</dt>\n<dd class="value">{markup.say(f.value)}</dd>\n'
        f'<dd class="conditions">{markup.tight(f.conditions)}</dd></div>\n'
        for f in figures
    )
    return f'<dl class="figures">\n{shown}</dl>\n' if shown else ""


def _measures(report: Mapping[str, Any]) -> str:
    models = report.get("models") or []
    rows = tables.measures(models) if models else []
    if not rows:
        return ""
    header, bodies = tables.comparison_header(models), ""
    for group in dict.fromkeys(row.group for row in rows):
        rows_of_group = [_measure_row(row, len(models)) for row in rows if row.group == group]
        title = f'<tr class="group"><th scope="rowgroup" colspan="{len(header)}">{markup.say(group)}</th></tr>\n'
        bodies += f"<tbody>{title}{''.join(rows_of_group)}</tbody>\n"
    caption = "All that was measured" if len(models) == 1 else "Measured side by side"
    notes = ["± is one standard error, of the windows or the questions."]
    if any(row.name.startswith("KL from") for row in rows):
        notes.append("KL: how far the next-token probabilities moved, 0 if not at all.")
        notes.append("Top-1 agreement: how often both models like the same next token best.")
    if any(row.group == "greedy texts" for row in rows):
        notes.append("Repetition is better low, distinct n-grams are better high, where the unpruned model's are.")
    if any(NONE in (*row.cells, row.change) for row in rows):
        notes.append(f"{NONE}: not measured, not finite, or not over the same tokens.")
    name = "Against the unpruned model" if report.get("reference") and len(models) > 1 else "Measured"
    return markup.section(name, markup.table(caption, markup.head(header), bodies), markup.note(" ".join(notes)))


def _measure_row(row: Measure, models: int) -> str:
    small = f" <small>{markup.tight(row.conditions)}</small>" if row.conditions else ""
    first = f'<th scope="row">{markup.name(row.name)}{small}</th>'
    return markup.row(first, [markup.cell(cell) for cell in (*row.cells, *([row.change] if models > 1 else []))])


def _points(report: Mapping[str, Any]) -> str:
    points = report.get("points") or []
    if not points:
        return ""
    drawn = "".join(_curve(report, points, text) for text in texts_of(points))
    title = "What each size costs" if report.get("kind") == "sweep" else "Leaderboard"
    verdict = (report.get("knee") or {}).get("verdict") or ""
    return markup.section(title, f"<p>{markup.say(verdict)}</p>\n" if verdict else "", drawn, _point_table(points))


def _curve(report: Mapping[str, Any], points: Sequence[Mapping[str, Any]], text: str) -> str:
    """Log perplexity against what was really removed, one line a method, the unpruned model marked."""
    by_name: dict[str, list[Point]] = {}
    dense = next((p for p in points if not p.get("ratio")), None)
    pruned = [p for p in points if p.get("ratio")]
    twice = len({(p["series"], p["ratio"]) for p in pruned}) < len(pruned)  # a method with several settings
    for point in pruned:
        name = str((point.get("settings") if twice else None) or point["series"])
        if finite(point.get("achieved_ratio")):
            by_name.setdefault(name, []).append(_place(point, text))
    mark = Series("unpruned", [_place(dense, text)]) if dense else None
    if mark and len(by_name) == 1:
        by_name = {name: [*mark.points, *places] for name, places in by_name.items()}
    knee = report.get("knee")
    band = Band(knee["low"], knee["ratio"], knee["high"], "knee") if knee and knee.get("text") == text else None
    lines = [Series(name, places) for name, places in by_name.items()]
    heights = [
        float(p.y)
        for line in [*lines, *([mark] if mark else [])]
        for p in line.points
        if p.y is not None and finite(p.y)
    ]
    most = SCALE * min(heights, default=1.0) if len(lines) > 1 else math.inf
    axes = Axis("removed from the decoder", percent=True), Axis(f"perplexity on {text}", log=True, most=most)
    title = f"Perplexity on {text} against size"
    drawing = charts.both(charts.curves, title, lines, *axes, mark, band)
    missing = [n for n, line in enumerate(lines) if not any(finite(p.y) for p in line.points)]
    words = [window_words(_window_of(report, text)), "bars are one standard error"]
    words += ["shaded: where the knee may lie"] if band else []
    words += [f"no number for {lines[n].name}: see the table" for n in missing]
    far = [
        f"{s.name} at {p.x * 100:.3g} %: {number(p.y, places(p.y))}"
        for s in lines
        for p in s.points
        if (p.y or 0) > most
    ]
    words += [f"arrows, off the scale: {', '.join(far)}"] if far else []
    return markup.figure(title, "; ".join(filter(None, words)), drawing)


def _place(point: Mapping[str, Any], text: str) -> Point:
    score = score_of(point, text)
    return Point(point.get("achieved_ratio") or 0.0, score.get("perplexity"), score.get("standard_error"))


def _window_of(report: Mapping[str, Any], text: str) -> Mapping[str, Any]:
    """The window length and tokens of a text, from the points if they have them, else from the models."""
    records = [*(report.get("points") or []), *(report.get("models") or [])]
    return next((score for record in records if (score := score_of(record, text)).get("seq_len")), {})


def _point_table(points: Sequence[Mapping[str, Any]]) -> str:
    header, first = tables.point_header(points), (texts_of(points) or [""])[0]
    order = tables.ordered(points)
    several = len({p["series"] for p in points if p.get("ratio")}) > 1
    noted = header[-1] == "note"  # goes below the name, since a column of its own would be wide and mostly empty
    seen: set[Any] = set()
    body = ""
    for point, row in zip(order, tables.point_rows(points), strict=True):
        ratio = point.get("ratio")
        best = several and bool(ratio) and ratio not in seen and finite(score_of(point, first).get("perplexity"))
        seen.add(ratio)
        small = f" <small>{markup.say(row[-1])}</small>" if noted and row[-1] else ""
        cells = row[1:-1] if noted else row[1:]
        body += markup.row(f'<th scope="row">{markup.name(row[0])}{small}</th>', map(markup.cell, cells), best)
    caption = "Every run: perplexity ± one standard error, and as a factor of the unpruned model's"
    caption += f"; bold: the best on {first} at its size" if several else ""
    return markup.table(caption, markup.head(header[:-1] if noted else header), f"<tbody>{body}</tbody>\n")


def _texts(models: Sequence[Mapping[str, Any]]) -> str:
    prompts = (models[0].get("prompts") or []) if models else []
    out = ""
    for n, prompt in enumerate(prompts):
        shown = "".join(
            f"<div><h4>{markup.say(m['name'])}</h4>"
            f'<blockquote dir="auto">{markup.say(m["continuations"][n].strip())}</blockquote></div>\n'
            for m in models
            if n < len(m.get("continuations") or [])
        )
        out += f'<article><h3 dir="auto">{markup.say(prompt)} …</h3><div class="texts">\n{shown}</div></article>\n'
    return (
        markup.section("What they write", markup.note("Greedy: always the likeliest next token."), out) if out else ""
    )


def _cut(cut: Mapping[str, Any] | None) -> str:
    if not cut:
        return ""
    recipe = cut.get("recipe") or {}
    lines = "\n".join(f"{key}: {json.dumps(value, ensure_ascii=False, default=str)}" for key, value in recipe.items())
    caption = f"{cut['parent']}, pruned by {recipe.get('method', 'billhook')} ({cut.get('paper') or 'no paper'})"
    return markup.section(
        "What was cut",
        markup.pairs(caption, cut_rows(cut)),
        markup.details("The whole recipe", f"<pre>{markup.say(lines)}</pre>\n") if lines else "",
    )


def _missed(mope: Mapping[str, Any] | None) -> str:
    """What the cut of each layer was foretold to cost, and what it costs."""
    if not (found := missed_by_layer(mope)) or mope is None:
        return ""
    rows = [markup.row(f'<th scope="row">{markup.say(row[0])}</th>', map(markup.cell, row[1:])) for row in found]
    caption = f"The cut of each layer alone, nothing restored, by {mope['metric']}"
    table = markup.table(caption, markup.head(missed_header()), f"<tbody>{''.join(rows)}</tbody>\n", "numbers")
    words = "Predicted: the sum of what each module costs alone; losses of modules that go together do not add up."
    return markup.section("Predicted and measured", markup.note(words), table)


def _layers(cut: Mapping[str, Any] | None) -> str:
    """Errors, widths and scores by layer, one set of charts for each kind of axis."""
    if not cut:
        return ""
    touched = {c["kind"] for c in cut.get("cuts") or () if c["dropped"]}
    cuts = [c for c in cut.get("cuts") or () if c["kind"] in touched]
    if not cuts:
        return ""
    dropped = cut.get("dropped_layers") or []
    count = 1 + max([*(c["layer"] for c in cuts), *dropped])
    out = ""
    for kind in dict.fromkeys(c["kind"] for c in cuts):
        cuts_of_kind, name = [c for c in cuts if c["kind"] == kind], KINDS.get(kind, kind)
        out += _layer_charts(cuts_of_kind, str(name), count, dropped, calibration_words(cut))
        rows = [
            markup.row(f'<th scope="row">{markup.say(r[0])}</th>', map(markup.cell, r[1:]))
            for r in layer_rows(cuts_of_kind)
        ]
        table = markup.table(
            f"{name} by layer: units, relative errors",
            markup.head(layer_header()),
            f"<tbody>{''.join(rows)}</tbody>\n",
            "numbers",
        )
        out += markup.details(f"All numbers of the {name}", table)
    return markup.section("Layer by layer", out)


def _layer_charts(
    cuts: Sequence[Mapping[str, Any]], name: str, count: int, dropped: Sequence[int], calibration: str
) -> str:
    def row(key: str) -> list[Any]:
        by_layer = {c["layer"]: c.get(key) for c in cuts}
        return [by_layer.get(n) for n in range(count)]

    def drawn(title: str, words: str, rows: Mapping[str, Sequence[Any]], y: Axis) -> str:
        return markup.figure(title, words, charts.both(charts.layers, f"{title}, layer by layer", rows, y, dropped))

    kept = [c["units"] - c["dropped"] for c in cuts]
    errors = {
        "without restoration": row("error_without"),
        "on held-out windows": row("error_held_out"),
        "restored": row("error"),
    }
    explained = f"How far each layer's output moved, 0 if not at all, 1 if all is lost; on {calibration}."
    out = drawn(f"Error from cutting {name}", explained, errors, Axis("relative error"))
    if len(set(kept)) > 1:
        by_layer = {c["layer"]: k for c, k in zip(cuts, kept, strict=True)}
        left = {"before": row("units"), "kept": [by_layer.get(n) for n in range(count)]}
        out += drawn(f"{name[:1].upper()}{name[1:]} kept", widths(cuts), left, Axis(name, whole=True))
    explained = "The share of the layer's importance that went with them: low where what went mattered little."
    shares = {"score that went": row("score_dropped")}
    return out + drawn(f"Score of the {name} that went", explained, shares, Axis("share of the score", percent=True))


def _conditions(report: Mapping[str, Any]) -> str:
    conditions, cut = report.get("conditions") or {}, report.get("cut") or {}
    rows = [
        (key, conditions[key]) for key in ("command", "machine", "device", "dtype", "threads") if conditions.get(key)
    ]
    if finite(conditions.get("seconds")):
        rows.append(("took", f"{conditions['seconds']:,.1f} s"))
    rows += [("versions", _versions(conditions["versions"]))] if conditions.get("versions") else []
    scores = [score for m in (report.get("models") or [])[:1] for score in m.get("perplexities") or ()]
    for score in scores:
        size = f" ({score['bytes']:,} bytes)" if score.get("bytes") else ""
        sums = f", sha256 {score['text_sha256']}" if score.get("text_sha256") else ""
        rows.append((f"text {score['text']}", f"{window_words(score)}{size}{sums}"))
    trained = report.get("healing")
    rows += recovery_tables.condition_rows(trained) if trained else []
    if cut:
        text = cut["calibration"]
        sums = f", sha256 {text['text_sha256']}" if text.get("text_sha256") else ""
        rows.append(("calibrated on", calibration_words(cut) + sums))
        if cut.get("versions") and cut["versions"] != conditions.get("versions"):
            rows.append(("pruned with", _versions(cut["versions"])))
    if scores or trained:
        rows.append(("perplexity", "exp of the mean token loss over windows that do not overlap"))
    return markup.section("Conditions", markup.pairs("How these numbers came about", [(a, str(b)) for a, b in rows]))


def _versions(versions: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def save(path: Path, report: dict[str, Any]) -> None:
    """Write the page and, beside it under the same name, the JSON of every number that it shows."""
    write_text(path.with_suffix(".json"), to_json(report))
    write_text(path, render(report))
