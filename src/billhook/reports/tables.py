"""The rows of a report, as text for a terminal, a Markdown card and a page alike.

Every row says under which conditions its numbers were measured; what has no number is shown as a dash.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from billhook.reports.formatting import (
    NONE,
    count,
    figures,
    finite,
    mebibytes,
    megabytes,
    milliseconds,
    number,
    percent,
    ratio,
    with_error,
)


@dataclass(frozen=True)
class Measure:
    """One row of a comparison: a cell a model, and what became of the last model against the first."""

    group: str
    name: str
    conditions: str
    cells: Sequence[str]
    change: str = ""

    @property
    def label(self) -> str:
        return f"{self.name} ({self.conditions})" if self.conditions else self.name


def perplexity_of(model: Mapping[str, Any], text: str, seq_len: int) -> Mapping[str, Any]:
    """A model's score on a text in windows of one length; empty where it has none."""
    scores = [p for p in model.get("perplexities") or () if p["text"] == text and p.get("seq_len") == seq_len]
    return scores[0] if scores else {}


def same_tokens(scores: Iterable[Mapping[str, Any]]) -> bool:
    """Whether perplexities are over the same tokens; if not, only bits a byte can be compared."""
    return len({(p.get("tokens"), p.get("text_sha256")) for p in scores if p}) == 1


def window_words(score: Mapping[str, Any]) -> str:
    """The windows behind a perplexity, as far as they are recorded."""
    tokens = f"{score['tokens']:,} tokens" if score.get("tokens") else ""
    length = f"windows of {score['seq_len']}" if score.get("seq_len") else ""
    return ", ".join(filter(None, (tokens, length, begun_words(score))))


def begun_words(score: Mapping[str, Any]) -> str:
    """Which special tokens begin every window; '' where none do."""
    return f"each begins with {' '.join(map(str, score['begins_with']))}" if score.get("begins_with") else ""


def measures(models: Sequence[Mapping[str, Any]]) -> list[Measure]:
    """Everything that was measured, row by row; the first model is the reference."""
    return [*_sizes(models), *_quality(models), *_speeds(models), *_memory(models), *_tasks(models), *_texts(models)]


def comparison_header(models: Sequence[Mapping[str, Any]]) -> list[str]:
    change = ["change"] if len(models) == 2 else ["last / first"]
    return ["", *[m["name"] for m in models], *(change if len(models) > 1 else [])]


def comparison_rows(models: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Name with conditions, one cell a model, and with several models the last against the first."""
    return [[m.label, *m.cells, *([m.change] if len(models) > 1 else [])] for m in measures(models)]


def markdown(models: Sequence[Mapping[str, Any]]) -> str:
    """The comparison as a GitHub table, for a model card."""
    return github([comparison_header(models), *comparison_rows(models)]) if models else ""


def github(rows: Sequence[Sequence[str]]) -> str:
    """A header and rows as a GitHub table."""
    lines = ["| " + " | ".join(map(plain, row)) + " |" for row in rows]
    return "\n".join([lines[0], "|---|" + "---:|" * (len(rows[0]) - 1), *lines[1:]]) + "\n"


def plain(cell: str) -> str:
    """A cell that Markdown shows as it is: a name may hold anything."""
    for sign in "\\`*[]|":
        cell = cell.replace(sign, f"\\{sign}")
    return " ".join(cell.replace("&", "&amp;").replace("<", "&lt;").split())


def _bits(model: Mapping[str, Any]) -> float | None:
    """Bits that the files of a model take for each of its parameters."""
    parameters = (model.get("sizes") or {}).get("parameters")
    return 8 * model["disk_bytes"] / parameters if finite(model.get("disk_bytes")) and parameters else None


def _row(
    group: str,
    name: str,
    conditions: str,
    values: Sequence[Any],
    show: Callable[[Any], str],
    errors: Sequence[str] | None = None,
) -> list[Measure]:
    """A row with a ratio, or none if no model has a number there."""
    if all(value is None for value in values):
        return []
    cells = [show(v) + (errors[n] if errors and finite(v) else "") for n, v in enumerate(values)]
    return [Measure(group, name, conditions, cells, ratio(values[-1], values[0]) if len(values) > 1 else "")]


def _sizes(models: Sequence[Mapping[str, Any]]) -> list[Measure]:
    rows: list[Measure] = []
    sizes = [m.get("sizes") or {} for m in models]
    rows += _row("size", "parameters", "", [s.get("parameters") for s in sizes], count)
    rows += _row("size", "decoder parameters", "", [s.get("decoder_parameters") for s in sizes], count)
    embeddings = [s.get("embedding_parameters") for s in sizes]
    if len(set(embeddings)) > 1:  # equal unless the vocabulary was trimmed
        rows += _row("size", "embedding parameters", "", embeddings, count)
    rows += _row("size", "multiply–adds a token", "", [m.get("macs_per_token") for m in models], count)
    rows += _row("size", "size on disk", "", [m.get("disk_bytes") for m in models], megabytes)
    return rows + _row("size", "bits a parameter on disk", "", [_bits(m) for m in models], number)


def _quality(models: Sequence[Mapping[str, Any]]) -> list[Measure]:
    rows: list[Measure] = []
    texts = dict.fromkeys((p["text"], p.get("seq_len")) for m in models for p in m.get("perplexities") or ())
    for text, seq_len in texts:
        scores = [perplexity_of(m, text, seq_len) for m in models]
        alike = same_tokens(scores)
        tokens = " / ".join(dict.fromkeys(number(p.get("tokens"), "{:,.0f}") for p in scores if p))
        begun = [words for words in dict.fromkeys(begun_words(p) for p in scores) if words]
        conditions = ", ".join([f"{tokens} tokens", f"windows of {seq_len}", *begun])
        cells = [with_error(p.get("perplexity"), p.get("standard_error")) for p in scores]
        change = ratio(scores[-1].get("perplexity"), scores[0].get("perplexity")) if alike else NONE
        rows.append(Measure("quality", f"perplexity on {text}", conditions, cells, change if len(scores) > 1 else ""))
        bits = [p.get("bits_per_byte") for p in scores]
        rows += _row("quality", f"bits a byte of {text}", "", bits, lambda v: number(v, "{:.3f}"))
        against = [p.get("against") or {} for p in scores]
        reference = models[0]["name"]
        if any(against):
            far = [with_error(a.get("kl"), a.get("kl_standard_error"), "{:.3f}") if a else "" for a in against]
            near = [percent(a.get("agreement")) if a else "" for a in against]
            rows.append(Measure("quality", f"KL from {reference} on {text}", "nats a token", far))
            rows.append(Measure("quality", f"top-1 agreement with {reference} on {text}", "", near))
    return rows


def _speeds(models: Sequence[Mapping[str, Any]]) -> list[Measure]:
    rows: list[Measure] = []
    settings = dict.fromkeys((s["batch"], s["context"]) for m in models for s in m.get("speeds") or ())
    for setting in settings:
        timings = [
            next((s for s in m.get("speeds") or () if (s["batch"], s["context"]) == setting), {}) for m in models
        ]
        first_timing = next(filter(None, timings))
        where = f"context {setting[1]}, batch {setting[0]}"
        often = f"median of {first_timing['repeats']}" if first_timing.get("repeats") else ""
        for key, name in (("prefill", "prefill tokens/s"), ("decode", "decode tokens/s")):
            ranges = [_range(s.get(f"{key}_range")) for s in timings]
            conditions = ", ".join(filter(None, (where, often)))
            rows += _row(
                "speed", name, conditions, [s.get(key) for s in timings], lambda v: number(v, figures(v)), ranges
            )
        first, rest = [s.get("first_token_seconds") for s in timings], [s.get("token_seconds") for s in timings]
        rows += _row("speed", "time to first token", where, first, milliseconds)
        rows += _row("speed", "time per token after it", where, rest, milliseconds)
    return rows


def _memory(models: Sequence[Mapping[str, Any]]) -> list[Measure]:
    memories = [m.get("memory") or {} for m in models]
    first_memory = next(filter(None, memories), {})
    where = (
        f"context {first_memory['context']}, batch {first_memory.get('batch', 1)}"
        if first_memory.get("context")
        else ""
    )
    rows = _row("memory", "weights in memory", "", [m.get("weights_bytes") for m in memories], mebibytes)
    rows += _row("memory", "KV cache", where, [m.get("kv_cache_bytes") for m in memories], mebibytes)
    return rows + _row("memory", "peak of a prefill", where, [m.get("peak_bytes") for m in memories], mebibytes)


def _tasks(models: Sequence[Mapping[str, Any]]) -> list[Measure]:
    rows: list[Measure] = []
    for task in dict.fromkeys(t["task"] for m in models for t in m.get("tasks") or ()):
        results = [next((t for t in m.get("tasks") or () if t["task"] == task), {}) for m in models]
        first_result = next(filter(None, results))
        chance = (
            f"chance {percent(first_result['chance'])}"
            if finite(first_result.get("chance"))
            else "chance level not known"
        )
        conditions = f"{first_result['samples']:,} questions, {chance}"
        for key, error, name in (
            ("accuracy", "standard_error", task),
            ("acc_norm", "acc_norm_standard_error", f"{task}, length-normalised"),
        ):
            values = [t.get(key) for t in results]
            if any(v is not None for v in values):
                cells = [with_error(t.get(key), t.get(error), "{:.1f}", 100) for t in results]
                cells = [c if c == NONE else f"{c} %" for c in cells]
                rows.append(Measure("accuracy", name, conditions, cells, _points(values)))
    for key, name in (("above_chance", "accuracy kept, above chance"), ("plain", "accuracy kept, plain")):
        kept = [(m.get("retention") or {}).get(key) for m in models]
        if any(v is not None for v in kept):
            cells = ["" if n == 0 and v is None else percent(v) for n, v in enumerate(kept)]
            rows.append(Measure("accuracy", name, "mean over the tasks", cells))
    return rows


def _texts(models: Sequence[Mapping[str, Any]]) -> list[Measure]:
    generations = [m.get("generation") or {} for m in models]
    if not any(generations):
        return []
    conditions = f"{len(models[0].get('prompts') or ())} prompts"
    distinct = [" / ".join(number(g.get(f"distinct_{n}")) for n in (1, 2, 3)) for g in generations]
    return [
        Measure("greedy texts", "repetition", conditions, [number(g.get("repetition")) for g in generations]),
        Measure("greedy texts", "distinct 1-, 2-, 3-grams", conditions, distinct),
    ]


def _points(values: Sequence[Any]) -> str:
    """What an accuracy lost, in points: a ratio of accuracies says little where chance is near."""
    if len(values) < 2:
        return ""
    if not (finite(values[0]) and finite(values[-1])):
        return NONE
    return f"{(values[-1] - values[0]) * 100:+.1f} points".replace("-", "−")


def _range(ends: Sequence[Any] | None) -> str:
    return f" ({number(ends[0], figures(ends[0]))}–{number(ends[1], figures(ends[0]))})" if ends else ""


def point_header(points: Sequence[Mapping[str, Any]]) -> list[str]:
    texts = [f"perplexity on {text}" for text in texts_of(points)]
    return ["method", "decoder removed", *texts, "parameters", "seconds", *["note"] * _noted(points)]


def _noted(points: Sequence[Mapping[str, Any]]) -> bool:
    return any(point.get("error") or point.get("note") for point in points)


def texts_of(points: Sequence[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(p["text"] for point in points for p in point.get("perplexities") or ()))


def score_of(point: Mapping[str, Any], text: str) -> Mapping[str, Any]:
    return next((p for p in point.get("perplexities") or () if p["text"] == text), {})


def ordered(points: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The unpruned model first, then by budget and perplexity; points without a number come last."""
    first = (texts_of(points) or [""])[0]

    def place(point: Mapping[str, Any]) -> tuple[float, float]:
        value = score_of(point, first).get("perplexity")
        return float(point.get("ratio") or 0), float(value) if value is not None and finite(value) else math.inf

    return sorted(points, key=place)


def point_rows(points: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """One row a point of a sweep or leaderboard, in the order of `ordered`, under `point_header`."""
    rows = []
    for point in ordered(points):
        scores = [score_of(point, text) for text in texts_of(points)]
        cells = [
            with_error(s.get("perplexity"), s.get("standard_error"))
            + (f" ({ratio(s['factor'], 1)})" if finite(s.get("factor")) and point.get("ratio") else "")
            for s in scores
        ]
        asked = f" (asked {number(point['ratio'], '{:.4g} %', 100)})" if point.get("ratio") else ""
        rows.append(
            [
                str(point.get("settings") or point["series"]),
                percent(point.get("achieved_ratio"), 2) + asked,
                *cells,
                count(point.get("parameters")),
                number(point.get("seconds"), "{:,.0f}"),
                *["; ".join(str(point[key]) for key in ("error", "note") if point.get(key))] * _noted(points),
            ]
        )
    return rows
