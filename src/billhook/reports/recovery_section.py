"""The sections of a report page about training after a cut: how it went, and candidates judged after a short one."""

import math
from collections.abc import Mapping
from typing import Any

from billhook.reports import charts, markup
from billhook.reports.charts import Axis, Band, Point, Series
from billhook.reports.formatting import finite, number, places
from billhook.reports.recovery_tables import (
    dropped_after,
    evaluation_header,
    evaluation_rows,
    judged,
    objective_words,
    rate_rows,
    selection_header,
    selection_order,
    selection_rows,
    setting_words,
    share_header,
    share_rows,
    step_tokens,
    texts_judged,
)

DRAWN = 60  # points of the training loss in a chart; with more steps each point is the mean of several
TOKENS = Axis("tokens of training", whole=True)


def training(recovery: Mapping[str, Any] | None) -> str:
    """How a recovery went: held-out perplexities, the training loss, and every number of them."""
    if not recovery:
        return ""
    dropped = dropped_after(recovery)
    stopped = recovery.get("stopped") or (f"the model of {dropped[0]:,} tokens is kept" if dropped else "")
    ended = f"{'Stopped early: ' if recovery.get('stopped') else ''}{stopped}."
    return markup.section(
        "Healing",
        f"<p>{markup.say(ended[:1].upper() + ended[1:])}</p>\n" if stopped else "",
        markup.note(setting_words(recovery)),
        _perplexities(recovery),
        _losses(recovery),
        markup.details("All perplexities", _evaluations(recovery)),
        markup.details("Shares of the training texts", _text_shares(recovery)),
        markup.details("Rates tried", _rates(recovery)),
    )


def selection(record: Mapping[str, Any] | None) -> str:
    """Candidates side by side, before and after the short training that decided between them."""
    if not record or not record["candidates"]:
        return ""
    body = ""
    for candidate, row in zip(selection_order(record), selection_rows(record), strict=True):
        first = f'<th scope="row">{markup.name(row[0])}</th>'
        body += markup.row(first, map(markup.cell, row[1:]), best=candidate["name"] == record["chosen"])
    tokens = f"{record['heal_tokens']:,} tokens of training"
    caption = f"Perplexity and rank before → after {tokens}; bold: the one chosen"
    table = markup.table(caption, markup.head(selection_header(record)), f"<tbody>{body}</tbody>\n")
    took = f" {number(record.get('seconds'), '{:,.0f}')} s for all of them." if finite(record.get("seconds")) else ""
    words = f"Each candidate was cut and trained for {record['heal_tokens']:,} tokens; {record['by']} decided.{took}"
    return markup.section("Judged after a short heal", markup.note(words), table)


def _perplexities(recovery: Mapping[str, Any]) -> str:
    """One line a text in tokens of training, the teacher's perplexity dotted, what was trained in vain shaded."""
    steps, teacher = recovery.get("evaluations") or [], recovery.get("teacher_perplexities") or {}
    lines = [
        Series(text, [Point(s["tokens"], s["perplexities"].get(text)) for s in steps], teacher.get(text))
        for text in texts_judged(recovery)
    ]
    dropped = dropped_after(recovery)
    band = Band(dropped[0], dropped[0], dropped[1], "kept at") if dropped else None
    title = "Perplexity on held-out text"
    drawing = charts.both(charts.curves, title, lines, TOKENS, Axis("perplexity", log=True), None, band)
    words = [f"{text.text}: {text.conditions}" for text in judged(recovery) if text.conditions]
    known = [f"{text} {number(value, places(value))}" for text, value in teacher.items() if finite(value)]
    words += [f"level dotted lines: {recovery['teacher']}, {', '.join(known)}"] if known else []
    words += ["shaded: training after the model that was kept"] if band else []
    return markup.figure(title, "; ".join(words), drawing)


def _losses(recovery: Mapping[str, Any]) -> str:
    losses = recovery.get("losses") or []
    size = math.ceil(len(losses) / DRAWN) or 1
    points = [_mean(losses, start, size, step_tokens(recovery)) for start in range(0, len(losses), size)]
    title = "Training loss"
    drawing = charts.both(charts.curves, title, [Series("training loss", points)], TOKENS, Axis("loss, nats a token"))
    words = [objective_words(recovery), f"each point is the mean of {size} steps" if size > 1 else "at every step"]
    odd = sum(not finite(loss) for loss in losses)
    words += [f"{odd:,} of {len(losses):,} steps have no finite loss"] if odd else []
    return markup.figure(title, "; ".join(words), drawing)


def _mean(losses: list[Any], start: int, size: int, tokens: float) -> Point:
    """The mean loss of some steps, at the middle of the tokens that they end at; what is not finite is left out."""
    chunk = losses[start : start + size]
    finite_losses = [loss for loss in chunk if finite(loss)]
    return Point(
        (start + (len(chunk) + 1) / 2) * tokens, sum(finite_losses) / len(finite_losses) if finite_losses else None
    )


def _evaluations(recovery: Mapping[str, Any]) -> str:
    rows = evaluation_rows(recovery)
    if not texts_judged(recovery):
        return ""
    kept = f"{recovery['kept_tokens']:,}" if recovery.get("kept_tokens") is not None else ""
    body = "".join(markup.row(_first(row[0]), map(markup.cell, row[1:]), best=row[0] == kept) for row in rows)
    caption = "Perplexity after so many tokens; bold: the model that was kept"
    if recovery.get("teacher_perplexities"):
        caption += f"; in brackets: as a factor of the teacher's; the teacher: {recovery['teacher']}"
    return markup.table(caption, markup.head(evaluation_header(recovery)), f"<tbody>{body}</tbody>\n", "numbers")


def _text_shares(recovery: Mapping[str, Any]) -> str:
    body = "".join(markup.row(_first(row[0]), map(markup.cell, row[1:])) for row in share_rows(recovery))
    caption = "Share of each text in the windows up to the next judgement"
    header = markup.head(share_header(recovery))
    return markup.table(caption, header, f"<tbody>{body}</tbody>\n", "numbers few") if body else ""


def _rates(recovery: Mapping[str, Any]) -> str:
    body = ""
    for tried, row in zip(recovery.get("rates") or (), rate_rows(recovery), strict=True):
        body += markup.row(_first(row[0]), map(markup.cell, row[1:]), best=tried["lr"] == recovery["lr"])
    caption = "Loss on held-out windows of the training text after a short trial of each rate; bold: the one used"
    header = markup.head(["rate", "loss, nats a token"])
    return markup.table(caption, header, f"<tbody>{body}</tbody>\n", "numbers few") if body else ""


def _first(text: str) -> str:
    return f'<th scope="row">{markup.say(text)}</th>'
