"""What a search has found, in words and rows for a terminal, a Markdown card and a page alike.

A search is the record `search` in billhook.json: its trials, the fixed metrics that were known before, and what was chosen.
Losses and gains are in nats a token; a gain has its standard error over windows, and is positive where it is better.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from billhook.reports.formatting import NONE, finite, number, percent, ranges
from billhook.reports.tables import begun_words

STANDARD = "the best fixed metric"
SHOWN = 10  # dimensions that are named one by one
LOSS, GAIN = "{:.4f}", "{:+.4f}"
FAR = 100.0  # nats a token: what is that much worse is broken, and exp soon has no number for it
DIMENSIONS = {  # those whose names do not say what they are; the others are clusters, and terms of the metric
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
OF_FASP = " (FASP)"  # a standard that calibrates as FASP does, without the pool
BY_FASP = " with FASP's own score"
STATES = {
    "dropped": "dropped untried by the proxy",
    "repeated": "repeated what was known",
    "failed": "failed",
}


def outcome_words(search: Mapping[str, Any]) -> str:
    """What a search has found, in a sentence or two."""
    by_fasp = str(search["standard"]).endswith(OF_FASP)
    standard = f"{search['standard']}{' on the whole pool' * (bool(search.get('pool')) and not by_fasp)}"
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


def _needed(search: Mapping[str, Any]) -> str:
    """What a gain must exceed; searches of before the record said so took one standard error."""
    needed = search.get("needed")
    return f"{number(needed, '{:.1f}')} standard errors" if finite(needed) else "its standard error"


def chosen_words(search: Mapping[str, Any]) -> str:
    """The best of the finalists."""
    return f"number {search['chosen']}{BY_FASP if search.get('by_fasp') else ''}"


def _gained(search: Mapping[str, Any]) -> str:
    """The gain that decided; as a share of perplexity too where that is what the loss is the logarithm of."""
    gain: Any = search.get("gain")
    error = search.get("standard_error")
    known = f" ± {number(error, LOSS)}" if finite(error) else ""
    plain = search.get("restoration") or search.get("objective", "nll") == "nll"
    near = gain if plain and finite(gain) and abs(gain) < FAR else None
    share = f" ({percent(-math.expm1(-near), 2)} of perplexity)" if near is not None else ""
    return f"{_minus(number(gain, LOSS))}{known} nats a token{_minus(share)}"


def yardstick_of(search: Mapping[str, Any]) -> str:
    """The metric that trials were compared with: the best before the first of them."""
    own = str(search["standard"]) if search.get("method") == "optishear" else STANDARD
    return next((str(one["metric"]) for one in search.get("known") or () if one.get("standard")), own)


def pool_words(search: Mapping[str, Any]) -> str:
    """Where the samples come from, and which windows judged, in two sentences."""
    pool, shapes = search.get("pool") or {}, search.get("validation") or {}
    said = []
    if pool:
        out = f"; {pool['left_out']:,} more left out, repeated or of little information" if pool.get("left_out") else ""
        clusters = len(set(pool["clusters"]))
        groups = f", sorted into {clusters} clusters" if clusters > 1 else ""
        texts = " and ".join(map(str, pool["sources"]))
        begun = f", {begun_words(pool)}" if begun_words(pool) else ""
        said.append(
            f"A pool of {len(pool['source']):,} windows of {pool['seq_len']:,} tokens of {texts}{begun}{groups}{out}."
        )
    if shapes:
        of = {"proxy": "for the proxy", "rungs": "in turn for trials", "final": "to decide in the end"}
        parts = [f"{_windows(shapes[part])} {what}" for part, what in of.items() if part in shapes]
        said.append(f"Judged on {' and '.join(map(str, search.get('judges') or ()))}: {', '.join(parts)}.")
        if "rungs" in shapes and (search.get("rung_windows") or 0) > shapes["rungs"][0]:
            said.append(
                f"The text is short for so many trials: they took {search['rung_windows']:,} windows in turn, and began "
                f"again after {shapes['rungs'][0]:,}."
            )
    if search.get("objective", "nll") != "nll":
        said.append(f"Objective of the trials: {search['objective']}.")
    return " ".join(said)


def _windows(shape: Sequence[int]) -> str:
    return f"{shape[0]:,} windows of {shape[1]:,} tokens"


def state_words(search: Mapping[str, Any]) -> list[str]:
    """How many trials have no point of their own, and why."""
    states = Counter(trial["state"] for trial in search["trials"])
    return [f"{states[state]:,} {words}" for state, words in STATES.items() if states[state]]


def importance_rows(search: Mapping[str, Any]) -> list[list[str]]:
    """Dimensions, the most important first; what follows after `SHOWN` rows is summed in one."""
    known = [(str(name), share) for name, share in (search.get("importance") or {}).items() if finite(share)]
    known.sort(key=lambda one: -one[1])
    rows = [[DIMENSIONS.get(name, name), percent(share)] for name, share in known[:SHOWN]]
    rest = known[SHOWN:]
    return [*rows, *([[f"{len(rest)} others together", percent(sum(share for _, share in rest))]] if rest else [])]


def part_header() -> list[str]:
    return ["step", "loss", "gain"]


def part_rows(search: Mapping[str, Any]) -> list[list[str]]:
    """What samples, metric and budgets bring; the first row is what the others are compared with."""
    parts = search.get("parts") or []
    return [[str(one["what"]), number(one["loss"], LOSS), _gain(one) if n else ""] for n, one in enumerate(parts)]


def known_header() -> list[str]:
    return ["metric", "loss", "gain"]


def known_rows(search: Mapping[str, Any]) -> list[tuple[bool, str, list[str]]]:
    """One row a fixed metric: whether it is the best, what it means, and its cells."""
    return [
        (
            bool(one.get("standard")),
            str(one.get("meaning") or ""),
            [str(one["metric"]), number(one["loss"], LOSS), "" if one.get("standard") else _gain(one)],
        )
        for one in search.get("known") or ()
    ]


def finalist_header() -> list[str]:
    return ["candidate", "loss, promotion", "loss, decision", "gain, decision"]


def finalist_rows(search: Mapping[str, Any]) -> list[tuple[bool, list[str]]]:
    """One row a candidate of the end: whether it was taken, and its cells."""
    taken = search.get("chosen"), bool(search.get("by_fasp"))
    accepted, standard = bool(search.get("accepted")), search.get("standard")
    return [
        (
            (one["name"], bool(one.get("by_fasp"))) == taken if accepted else one["name"] == standard,
            [
                f"number {one['name']}{BY_FASP * bool(one.get('by_fasp'))}"
                if isinstance(one["name"], int)
                else str(one["name"]),
                *[number(one.get(key), LOSS) for key in ("rung", "final")],
                "" if one["name"] == standard else _gain(one),
            ],
        )
        for one in search.get("finalists") or ()
    ]


def choice_rows(search: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The samples, the metric and the budgets that were taken, as (name, value)."""
    winner = search.get("winner") or {}
    own, shape = winner.get("solution"), winner.get("shape")
    rows = []
    if own:
        rows += [("clusters", level_words(own["levels"])), ("windows", drawn_words(search))]
        rows.append(("metric", metric_words(own["coefficients"])))
        rows.append(("power of each term", number(own["power"], "{:g}")))
        rows.append(("over a unit's slots", str(own["reduction"])))
        rows.append(("terms are scaled", "in each layer" if own["within"] else "over the whole model"))
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
    own, shape = winner.get("solution"), winner.get("shape")
    how = "" if search.get("accepted") else f"; {STANDARD}: no trial was better beyond {_needed(search)}"
    said = [] if own else [str(winner["metric"])] if winner.get("metric") else ["FASP's own score"]
    said += [f"{name} {_shift(winner[name])}" for name in ("slope", "bend") if winner.get(name)]
    if own:
        clusters = f" ({level_words(own['levels'])})" if len(set(own["levels"])) > 1 else ""
        metric = (
            f"{metric_words(own['coefficients'])}, power {number(own['power'], '{:g}')}, {own['reduction']} over slots"
        )
        said += [f"{drawn_words(search)}{clusters}"]
        said += [f"{metric}, scaled {'in each layer' if own['within'] else 'over the model'}"]
    if block := winner.get("block"):
        said.append(f"without layers {ranges(range(block[0], sum(block)))}")
    if shape and any(shape.values()):
        said.append(
            f"{shape['first']} + {shape['last']} layers spared, slope {_shift(shape['slope'])}, bend {_shift(shape['bend'])}"
        )
    return "; ".join(said) + how


def level_words(levels: Sequence[int]) -> str:
    """Which clusters weigh how much, the heaviest first."""
    if len(set(levels)) == 1:
        return "all alike"
    said = []
    for level in sorted(set(levels), reverse=True):
        of = [n for n, one in enumerate(levels) if one == level]
        said.append(f"cluster{'s' * (len(of) > 1)} {ranges(of)} {f'×{level}' if level else 'left out'}")
    return "; ".join(said)


def drawn_words(search: Mapping[str, Any]) -> str:
    """How many windows of the pool calibrate."""
    own, shares = search["winner"]["solution"], (search.get("pool") or {}).get("shares") or []
    used = sum(finite(share) and share > 0 for share in shares)
    drawn = f", draw {own['draw']}" if own["count"] else ""
    return f"{used:,} of {len(shares):,} windows of the pool{drawn}"


def metric_words(coefficients: Mapping[str, Any]) -> str:
    """Terms with their coefficients, the heaviest first; one alone without."""
    known = sorted(((name, c) for name, c in coefficients.items() if finite(c) and c), key=lambda one: -one[1])
    if len(known) == 1:
        return f"{known[0][0]} alone"
    return " + ".join(f"{number(c, '{:g}')} {name}" for name, c in known) or NONE


def samples(search: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Every window that calibrates, the heaviest first, as (where it is from and what it weighs, its text)."""
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


def _gain(one: Mapping[str, Any]) -> str:
    """A gain with its sign and its standard error."""
    value, error = one.get("gain"), one.get("standard_error")
    return _minus(number(value, GAIN) + (f" ± {number(error, LOSS)}" if finite(value) and finite(error) else ""))


def _shift(value: Any) -> str:
    return "0" if value == 0 else _minus(number(value, "{:+.2g}"))


def _minus(text: str) -> str:
    return text.replace("-", "−")
