"""What a search has found, in words and rows for a terminal, a Markdown card and a page alike.

A search is the record `search` in billhook.json: its trials, the fixed metrics that were known before, and what was
chosen. Losses and gains are in nats a token; a gain has its standard error over windows, and is positive where it is
better.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from billhook.reports.formatting import NONE, finite, number, percent, ranges
from billhook.reports.tables import begun_words

STANDARD = "the best fixed metric"
SHOWN = 10  # the most dimensions that are named one by one
LOSS, GAIN = "{:.4f}", "{:+.4f}"
FAR = 100.0  # nats a token; a model that is this much worse is broken, and exp of it soon overflows
DIMENSIONS = {  # dimensions whose names do not say what they are; the others are clusters, and terms of the metric
    "windows": "how many windows",
    "draw": "which windows",
    "reduction": "reduction over a unit's slots",
    "within": "scaling in a layer or over the model",
    "first": "layers spared at the start",
    "last": "layers spared at the end",
    "slope": "slope over depth",
    "bend": "bend over depth",
    "attention": "attention units that go",
    "block": "layers that go whole",
    "alpha": "alpha, over |W|",
    "f1": "F1, of |W|",
    "beta": "beta, over norms",
    "f2": "F2, of norms",
}
BY_FASP = " with FASP's own score"
STATES = {
    "dropped": "dropped untried by the proxy",
    "repeated": "repeated what was known",
    "failed": "failed",
}


def outcome_words(search: Mapping[str, Any]) -> str:
    """What a search has found, in a sentence or two."""
    on_pool = bool(search.get("pool")) and not _standard_is_fasps(search)
    standard = f"{search['standard']}{' on the whole pool' * on_pool}"
    states = Counter(trial["state"] for trial in search["trials"])
    became = f" ({', '.join(f'{n} {state}' for state, n in states.items())})" if states else ""
    tried = f"{len(search['trials'])} trials by {search['sampler']}{became}"
    if search.get("chosen") is None:
        return f"{tried}: none differs from what was known, and the best of that, {standard}, is taken."
    gain = f"{_gained(search)} on windows that no trial saw"
    if search.get("accepted"):
        odds = search.get("odds")
        equal = f"; one that is no better would pass one time in {1 / odds:.0f}" if finite(odds) and odds else ""
        return f"{tried}: {chosen_words(search)} beats {STANDARD}, {standard}, by {gain}{equal}."
    return (
        f"{tried}: the best, {chosen_words(search)}, gains {gain}, no more than {_needed(search)}: {standard} is taken."
    )


def _standard_is_fasps(search: Mapping[str, Any]) -> bool:
    """Whether the standard calibrates as FASP does, without the pool."""
    rows = search.get("finalists") or ()
    return any(bool(row.get("by_fasp")) for row in rows if row["name"] == search["standard"])


def _needed(search: Mapping[str, Any]) -> str:
    """What a gain must exceed; older records do not say so, and took one standard error."""
    needed = search.get("needed")
    return f"{number(needed, '{:.1f}')} standard errors" if finite(needed) else "its standard error"


def chosen_words(search: Mapping[str, Any]) -> str:
    """The best of the finalists."""
    return f"number {search['chosen']}{BY_FASP if search.get('by_fasp') else ''}"


def _gained(search: Mapping[str, Any]) -> str:
    """The gain that decided, in nats; where the loss is the logarithm of perplexity, as a share of that, too."""
    gain: Any = search.get("gain")
    error = search.get("standard_error")
    margin = f" ± {number(error, LOSS)}" if finite(error) else ""
    plain = search.get("restoration") or search.get("objective", "nll") == "nll"
    near = gain if plain and finite(gain) and abs(gain) < FAR else None
    share = f" ({percent(-math.expm1(-near), 2)} of perplexity)" if near is not None else ""
    return f"{_minus(number(gain, LOSS))}{margin} nats a token{_minus(share)}"


def standard_metric(search: Mapping[str, Any]) -> str:
    """The metric that trials were compared with: the best of the known ones."""
    default = str(search["standard"]) if search.get("method") == "optishear" else STANDARD
    return next((str(row["metric"]) for row in search.get("known") or () if row.get("standard")), default)


def pool_words(search: Mapping[str, Any]) -> str:
    """Where the samples come from, and on which windows trials were compared, in two sentences."""
    pool, shapes = search.get("pool") or {}, search.get("validation") or {}
    sentences = []
    if pool:
        out = f"; {pool['left_out']:,} more left out, repeated or of little information" if pool.get("left_out") else ""
        clusters = len(set(pool["clusters"]))
        groups = f", sorted into {clusters} clusters" if clusters > 1 else ""
        texts = " and ".join(map(str, pool["sources"]))
        begun = f", {begun_words(pool)}" if begun_words(pool) else ""
        sentences.append(
            f"A pool of {len(pool['source']):,} windows of {pool['seq_len']:,} tokens of {texts}{begun}{groups}{out}."
        )
    if shapes:
        uses = {"proxy": "for the proxy", "rungs": "in turn for trials", "final": "to decide in the end"}
        parts = [f"{_windows(shapes[part])} {use}" for part, use in uses.items() if part in shapes]
        sentences.append(f"Judged on {' and '.join(map(str, search.get('judges') or ()))}: {', '.join(parts)}.")
        if "rungs" in shapes and (search.get("rung_windows") or 0) > shapes["rungs"][0]:
            sentences.append(
                f"The text is short for so many trials: they took {search['rung_windows']:,} windows in turn, and "
                "began "
                f"again after {shapes['rungs'][0]:,}."
            )
    if search.get("objective", "nll") != "nll":
        sentences.append(f"Objective of the trials: {search['objective']}.")
    return " ".join(sentences)


def _windows(shape: Sequence[int]) -> str:
    return f"{shape[0]:,} windows of {shape[1]:,} tokens"


def state_words(search: Mapping[str, Any]) -> list[str]:
    """How many trials are not drawn, and why."""
    states = Counter(trial["state"] for trial in search["trials"])
    return [f"{states[state]:,} {words}" for state, words in STATES.items() if states[state]]


def importance_rows(search: Mapping[str, Any]) -> list[list[str]]:
    """Dimensions, the most important first; those after the first `SHOWN` are summed in one row."""
    shares = [(str(name), share) for name, share in (search.get("importance") or {}).items() if finite(share)]
    shares.sort(key=lambda pair: -pair[1])
    rows = [[DIMENSIONS.get(name, name), percent(share)] for name, share in shares[:SHOWN]]
    rest = shares[SHOWN:]
    return [*rows, *([[f"{len(rest)} others together", percent(sum(share for _, share in rest))]] if rest else [])]


def part_header() -> list[str]:
    return ["step", "loss", "gain"]


def part_rows(search: Mapping[str, Any]) -> list[list[str]]:
    """What samples, metric and budgets bring; the first row is what the others are compared with."""
    parts = search.get("parts") or []
    return [[str(row["what"]), number(row["loss"], LOSS), _gain(row) if n else ""] for n, row in enumerate(parts)]


def known_header() -> list[str]:
    return ["metric", "loss", "gain"]


def known_rows(search: Mapping[str, Any]) -> list[tuple[bool, str, list[str]]]:
    """One row a known metric: whether it is the best, what it means, and its cells."""
    return [
        (
            bool(row.get("standard")),
            str(row.get("meaning") or ""),
            [str(row["metric"]), number(row["loss"], LOSS), "" if row.get("standard") else _gain(row)],
        )
        for row in search.get("known") or ()
    ]


def finalist_header() -> list[str]:
    return ["candidate", "loss, promotion", "loss, decision", "gain, decision"]


def finalist_rows(search: Mapping[str, Any]) -> list[tuple[bool, list[str]]]:
    """One row a finalist: whether it was taken, and its cells."""
    taken = search.get("chosen"), bool(search.get("by_fasp"))
    accepted, standard = bool(search.get("accepted")), search.get("standard")
    return [
        (
            (row["name"], bool(row.get("by_fasp"))) == taken if accepted else row["name"] == standard,
            [
                f"number {row['name']}{BY_FASP * bool(row.get('by_fasp'))}"
                if isinstance(row["name"], int)
                else str(row["name"]),
                *[number(row.get(key), LOSS) for key in ("rung", "final")],
                "" if row["name"] == standard else _gain(row),
            ],
        )
        for row in search.get("finalists") or ()
    ]


def choice_rows(search: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The samples, the metric and the budgets that were taken, as (name, value)."""
    winner = search.get("winner") or {}
    solution, shape = winner.get("solution"), winner.get("shape")
    rows = []
    if solution:
        rows += [("clusters", level_words(solution["levels"])), ("windows", drawn_words(search))]
        rows.append(("metric", metric_words(solution["coefficients"])))
        rows.append(("power of each term", number(solution["power"], "{:g}")))
        rows.append(("over a unit's slots", str(solution["reduction"])))
        rows.append(("terms are scaled", "in each layer" if solution["within"] else "over the whole model"))
    elif metric := winner.get("metric"):
        rows.append(("metric (alpha, F1, beta, F2)", str(metric)))
        rows += [(f"{name} over depth, in shares of zeros", _shift(winner[name])) for name in ("slope", "bend")]
    elif winner:
        rows.append(("metric", "FASP's own score"))
    if winner.get("attention") is not None:
        rows.append(("attention units that go from each layer", str(winner["attention"])))
    if block := winner.get("block"):
        rows.append(("layers that go whole", ranges(range(block[0], sum(block)))))
    if shape:
        rows.append(("layers spared", f"{shape['first']} at the start, {shape['last']} at the end"))
        rows.append(
            ("slope over depth", f"{_shift(shape['slope'])} (above 0 the last layers give more than the first)")
        )
        rows.append(("bend over depth", f"{_shift(shape['bend'])} (above 0 both ends give more than the middle)"))
    return rows


def choice_words(search: Mapping[str, Any]) -> str:
    """What was chosen, in one line."""
    winner = search.get("winner") or {}
    solution, shape = winner.get("solution"), winner.get("shape")
    instead = "" if search.get("accepted") else f"; {STANDARD}: no trial was better beyond {_needed(search)}"
    words = [] if solution else [str(winner["metric"])] if winner.get("metric") else ["FASP's own score"]
    words += [f"{name} {_shift(winner[name])}" for name in ("slope", "bend") if winner.get(name)]
    if solution:
        clusters = f" ({level_words(solution['levels'])})" if len(set(solution["levels"])) > 1 else ""
        power = number(solution["power"], "{:g}")
        metric = f"{metric_words(solution['coefficients'])}, power {power}, {solution['reduction']} over slots"
        words += [f"{drawn_words(search)}{clusters}"]
        words += [f"{metric}, scaled {'in each layer' if solution['within'] else 'over the model'}"]
    if block := winner.get("block"):
        words.append(f"without layers {ranges(range(block[0], sum(block)))}")
    if shape and any(shape.values()):
        words.append(
            f"{shape['first']} + {shape['last']} layers spared, slope {_shift(shape['slope'])}, bend "
            f"{_shift(shape['bend'])}"
        )
    return "; ".join(words) + instead


def level_words(levels: Sequence[int]) -> str:
    """Which clusters weigh how much, the heaviest first."""
    if len(set(levels)) == 1:
        return "all alike"
    words = []
    for level in sorted(set(levels), reverse=True):
        clusters = [n for n, other in enumerate(levels) if other == level]
        weight = f"×{level}" if level else "left out"
        words.append(f"cluster{'s' * (len(clusters) > 1)} {ranges(clusters)} {weight}")
    return "; ".join(words)


def drawn_words(search: Mapping[str, Any]) -> str:
    """How many windows of the pool calibrate."""
    solution, shares = search["winner"]["solution"], (search.get("pool") or {}).get("shares") or []
    used = sum(finite(share) and share > 0 for share in shares)
    drawn = f", draw {solution['draw']}" if solution["count"] else ""
    return f"{used:,} of {len(shares):,} windows of the pool{drawn}"


def metric_words(coefficients: Mapping[str, Any]) -> str:
    """Terms with their coefficients, the heaviest first; a single term without its coefficient."""
    terms = sorted(((name, c) for name, c in coefficients.items() if finite(c) and c), key=lambda pair: -pair[1])
    if len(terms) == 1:
        return f"{terms[0][0]} alone"
    return " + ".join(f"{number(c, '{:g}')} {name}" for name, c in terms) or NONE


def samples(search: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Every window that calibrates, the heaviest first, as (its source and weight, its text)."""
    pool = search.get("pool") or {}
    used = [n for n, share in enumerate(pool.get("shares") or ()) if finite(share) and share > 0]
    used.sort(key=lambda n: -pool["shares"][n])
    return [
        (
            f"{pool['sources'][pool['source'][n]]}, cluster {pool['clusters'][n]}, {percent(pool['shares'][n])}",
            str(pool["samples"][n]),
        )
        for n in used
    ]


def _gain(row: Mapping[str, Any]) -> str:
    """A gain with its sign and its standard error."""
    value, error = row.get("gain"), row.get("standard_error")
    return _minus(number(value, GAIN) + (f" ± {number(error, LOSS)}" if finite(value) and finite(error) else ""))


def _shift(value: Any) -> str:
    return "0" if value == 0 else _minus(number(value, "{:+.2g}"))


def _minus(text: str) -> str:
    return text.replace("-", "−")
