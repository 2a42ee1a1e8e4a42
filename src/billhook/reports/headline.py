"""The few large figures at the top of a report: size, speed, and what it cost."""

import math
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from billhook.reports.cut_tables import calibration_words
from billhook.reports.formatting import (
    NONE,
    count,
    figures,
    finite,
    mebibytes,
    megabytes,
    number,
    percent,
    places,
    ratio,
    signed,
    with_error,
)
from billhook.reports.quantized import errors, method_words
from billhook.reports.recovery_tables import (
    factor_words,
    judged,
    objective_words,
    passes_words,
    texts_words,
    trained_words,
)
from billhook.reports.tables import ordered, perplexity_of, same_tokens, score_of, texts_of, window_words


@dataclass(frozen=True)
class Figure:
    """A large number, its name, and the conditions that it holds under."""

    name: str
    value: str
    conditions: str


def figures_of(report: Mapping[str, Any]) -> list[Figure]:
    """What a reader should see first."""
    models, points = report.get("models") or [], report.get("points") or []
    if points:
        return [*_knee(report), *_best(points)][:4]
    if len(models) > 1:
        lost, kept = _perplexity(models), _accuracy(models[-1])
        return [*_size(models[0], models[-1]), *_speed(models), *lost[: 2 - len(kept)], *kept]
    if models:
        return _alone(models[0])
    if report.get("quantized"):
        return _quantized(report["quantized"])
    if report.get("healing"):
        return _recovered(report["healing"])
    return _cut(report["cut"]) if report.get("cut") else []


def how_to_measure(report: Mapping[str, Any]) -> str | None:
    """The command that measures what a prune or a recovery has not."""
    cut, healing, few = (report.get(part) or {} for part in ("cut", "healing", "quantized"))
    dense = few.get("parent") or cut.get("parent") or healing.get("teacher")
    if not dense or report.get("models"):
        return None
    out = "OUT2" if cut and healing else "OUT"  # the names that `commands.recover_command` gives them
    if few:
        out = "OUT/model.gguf" if few["format"] == "gguf" else "OUT"
    return f"billhook evaluate {out} --against {shlex.quote(str(dense))} --report report.html"


def _size(first: Mapping[str, Any], last: Mapping[str, Any]) -> list[Figure]:
    before, after = first["sizes"], last["sizes"]
    of_all, of_decoder = (_removed(before, after, key) for key in ("parameters", "decoder_parameters"))
    sizes = f"{count(before['parameters'])} → {count(after['parameters'])}"
    return [Figure("parameters", signed(of_all), f"{sizes}; {signed(of_decoder)} of the decoder")]


def _removed(before: Mapping[str, Any], after: Mapping[str, Any], key: str) -> float | None:
    return 1 - after[key] / before[key] if before.get(key) else None


def _speed(models: list[Mapping[str, Any]]) -> list[Figure]:
    """Prefill, at the first setting that both were timed at."""
    for speed in models[0].get("speeds") or ():
        where = (speed["batch"], speed["context"])
        other = next((s for s in models[-1].get("speeds") or () if (s["batch"], s["context"]) == where), None)
        if other:
            a, b = speed["prefill"], other["prefill"]
            values = f"{number(a, figures(a))} → {number(b, figures(b))} tokens/s"
            often = f", median of {speed['repeats']}" if speed.get("repeats") else ""
            conditions = f"{values}, context {where[1]}, batch {where[0]}{often}"
            return [Figure("prefill", ratio(b, a, 2), conditions)]
    return []


def _perplexity(models: list[Mapping[str, Any]]) -> list[Figure]:
    """What was lost on each of the first two texts."""
    shown = []
    for score in (models[0].get("perplexities") or [])[:2]:
        other = perplexity_of(models[-1], score["text"], score["seq_len"])
        if not other:
            continue
        a, b = (with_error(s.get("perplexity"), s.get("standard_error")) for s in (score, other))
        factor = ratio(other.get("perplexity"), score.get("perplexity"), 2) if same_tokens([score, other]) else NONE
        why = "" if factor != NONE else "; not finite" if NONE in (a, b) else "; tokens differ: see bits a byte"
        shown.append(Figure(f"perplexity on {score['text']}", factor, f"{a} → {b}{why}; {window_words(score)}"))
    return shown


def _accuracy(model: Mapping[str, Any]) -> list[Figure]:
    kept, tasks = model.get("retention") or {}, model.get("tasks") or []
    if not finite(kept.get("above_chance")):
        return []
    asked = f"{len(tasks)} tasks, {sum(t['samples'] for t in tasks):,} questions"
    return [Figure("accuracy kept, above chance", percent(kept["above_chance"], 0), asked)]


def _alone(model: Mapping[str, Any]) -> list[Figure]:
    size = model["sizes"]
    shown = [Figure("parameters", count(size["parameters"]), f"{count(size['decoder_parameters'])} in the decoder")]
    for score in (model.get("perplexities") or [])[:2]:
        value = number(score.get("perplexity"), places(score.get("perplexity")))
        error = f"± {number(score['standard_error'])}" if finite(score.get("standard_error")) else ""
        why = "not finite" if value == NONE else ""
        conditions = "; ".join(filter(None, (error, why, window_words(score))))
        shown.append(Figure(f"perplexity on {score['text']}", value, conditions))
    return shown


def _cut(cut: Mapping[str, Any]) -> list[Figure]:
    size = cut["sizes"]
    before, after = size["before"], size["after"]

    def sizes(key: str) -> str:
        return f"{count(before[key])} → {count(after[key])}"

    seconds = sum(s for s in cut["seconds"].values() if finite(s))
    spent = f"{mebibytes(cut.get('peak_growth_bytes'))} beyond the loaded model; {calibration_words(cut)}"
    return [
        Figure("parameters", signed(size["achieved_ratio_of_all"]), sizes("parameters")),
        Figure("of the decoder", signed(size["achieved_ratio"]), f"{sizes('decoder_parameters')}; {size['budget']}"),
        Figure("pruning took", _duration(seconds), spent),
    ]


def _recovered(recovery: Mapping[str, Any]) -> list[Figure]:
    """Perplexities on two texts, the training's own last, and what the training took."""
    perplexities = []
    for text in judged(recovery)[:2]:
        before = f"before: {number(text.before, places(text.before))}"
        why = "" if finite(text.after) else "not finite"
        conditions = filter(None, (why, before, factor_words(text, recovery["teacher"]), text.conditions))
        value = number(text.after, places(text.after))
        perplexities.append(Figure(f"perplexity on {text.text}", value, "; ".join(conditions)))
    planned, kept = recovery["tokens"], recovery.get("kept_tokens")
    tokens = planned if kept is None else kept
    share = f"kept of {planned:,} tokens" * (tokens != planned)
    source = f"{share} of {texts_words(recovery)}, {passes_words(recovery)}"
    trained = f"{source.strip()}; {objective_words(recovery)}"
    seconds = (recovery.get("seconds") or {}).get("training", math.nan)
    spent = f"{_duration(seconds)} in {recovery['precision']}" if finite(seconds) else f"in {recovery['precision']}"
    memory = f"{mebibytes(recovery.get('peak_growth_bytes'))} beyond the loaded model"
    return [
        *perplexities,
        Figure(
            "tokens of training",
            f"{tokens:,}" if tokens < 1e6 else count(tokens),
            f"{trained}; {trained_words(recovery)}",
        ),
        Figure("training tokens/s", number(recovery.get("tokens_per_second"), "{:,.0f}"), f"{spent}; {memory}"),
    ]


def _quantized(few: Mapping[str, Any]) -> list[Figure]:
    types = ", ".join(f"{count} of {name}" for name, count in few["types"].items())
    shown = [Figure("bits a weight", number(few["bits_per_weight"]), f"of the layers; {types}; by {method_words(few)}")]
    for name, part in few["containers"].items():
        shown.append(Figure(f"as {name}", megabytes(part["bytes"]), f"embedding and head {few['embedding']}"))
    if told := errors(few["operators"]):
        value, _, conditions = told.partition(" ")
        shown.append(Figure("error of the weights' outputs", value, conditions.strip("()")))
    return shown


def _duration(seconds: float | int) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def _knee(report: Mapping[str, Any]) -> list[Figure]:
    knee = report.get("knee")
    if not knee:
        return []
    interval = f"{percent(knee['low'], 0)} to {percent(knee['high'], 0)}"
    below, above = (_per_cent(knee.get(side)) for side in ("below", "above"))
    slopes = f"each further 1 % of the decoder costs {below} of perplexity on {knee['text']} below it, {above} above"
    return [Figure("knee of the curve", percent(knee["ratio"], 0), f"{interval}; {slopes}")]


def _per_cent(slope: Any) -> str:
    """What a slope of log perplexity over the share removed means for one per cent more."""
    return percent(math.expm1(slope / 100)) if finite(slope) and slope < 1e4 else NONE


def _best(points: list[Mapping[str, Any]]) -> list[Figure]:
    """The best method at each budget on the first text; with one method, what its smallest and largest cut cost."""
    text = (texts_of(points) or [""])[0]
    known = [p for p in ordered(points) if p.get("ratio") and finite(score_of(p, text).get("perplexity"))]
    budgets = sorted({p["ratio"] for p in known})
    several = len({p["series"] for p in known}) > 1
    shown = []
    for budget in budgets if several else sorted({*budgets[:1], *budgets[-1:]}):
        best, *rest = [p for p in known if p["ratio"] == budget]
        score = score_of(best, text)
        conditions = [f"perplexity {with_error(score['perplexity'], score.get('standard_error'))} on {text}"]
        if rest:
            conditions.append(f"next: {_name(rest[0])}, {_cost(score_of(rest[0], text))}")
        if where := window_words(score):
            conditions.append(where)
        asked = percent(budget, 0)
        name = f"best at {asked}: {_name(best)}" if several else f"perplexity at {asked} of the decoder"
        shown.append(Figure(name, _cost(score, 2), "; ".join(conditions)))
    return shown


def _name(point: Mapping[str, Any]) -> str:
    return str(point.get("settings") or point["series"])


def _cost(score: Mapping[str, Any], digits: int = 3) -> str:
    value = score.get("perplexity")
    return ratio(score["factor"], 1, digits) if finite(score.get("factor")) else number(value, places(value))
