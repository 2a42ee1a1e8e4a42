"""What training after a cut did, in words and rows for a terminal, a Markdown card and a page alike.

A recovery is one record of the list `recovery` in billhook.json, a selection its `selection`: candidates that were
judged after a short training each.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from billhook.reports.formatting import count, finite, mebibytes, number, percent, places, ranges, rate, ratio
from billhook.reports.tables import begun_words, window_words

TRAINED = {
    "all": "all parameters",
    "decoder": "all parameters but embeddings and head",
    "lora": "low-rank adapters",
    "spp": "multipliers of rows and columns (SPP)",
    "head+last3": "the head and the last three layers",
    "seam": "the layers beside the cut",
}
HELD_OUT = ", held out"  # follows a training text's name where the windows are held out of it


@dataclass(frozen=True)
class Judged:
    """What became of the perplexity on one text; None where it was not measured."""

    text: str
    before: Any
    after: Any
    teacher: Any
    conditions: str


def judged(recovery: Mapping[str, Any]) -> list[Judged]:
    """Every text that was evaluated; `after` belongs to the model that was kept."""
    steps = recovery.get("evaluations") or []
    start = next((step["perplexities"] for step in steps if not step["tokens"]), {})
    kept = next((step["perplexities"] for step in steps if step["tokens"] == recovery.get("kept_tokens")), {})
    teacher, by = recovery.get("teacher_perplexities") or {}, recovery.get("judged_by") or {}
    return [
        Judged(text, start.get(text), kept.get(text), teacher.get(text), window_words(by.get(text) or {}))
        for text in texts_judged(recovery)
    ]


def texts_judged(recovery: Mapping[str, Any]) -> list[str]:
    """The texts that were evaluated; those held out of the training texts come last."""
    trained = {f"{text}{HELD_OUT}" for text in recovery["texts"]}
    texts = dict.fromkeys(text for step in recovery.get("evaluations") or () for text in step["perplexities"])
    return sorted(texts, key=lambda text: text in trained)


def step_tokens(recovery: Mapping[str, Any]) -> float:
    """Tokens in a step as counted: in whole windows, so not always the batch that was asked for."""
    counted = [step["tokens"] / step["step"] for step in recovery.get("evaluations") or () if step["step"]]
    return counted[-1] if counted else float(recovery["batch_tokens"])


def dropped_after(recovery: Mapping[str, Any]) -> tuple[int, int] | None:
    """From which to which token training went on beyond the model that was kept; None if it did not."""
    last = max((step["tokens"] for step in recovery.get("evaluations") or ()), default=0)
    kept = recovery.get("kept_tokens")
    return (kept, last) if kept is not None and kept < last else None


def objective_words(recovery: Mapping[str, Any]) -> str:
    if recovery["objective"] == "ce":
        return "continued pretraining"
    aligned = " with hidden states and embeddings" if recovery.get("states") else ""
    contrast = recovery.get("contrast")
    told = f", and {number(contrast, '{:g}')} of token-level contrast" if contrast else ""
    text = " and continued pretraining" if recovery["objective"] == "both" else ""
    return f"distillation from {recovery['teacher']}{aligned}{told}{text}"


def trained_words(recovery: Mapping[str, Any]) -> str:
    """Which parameters were trained, and how many of how many."""
    name = _trained(recovery)
    trained, total = recovery.get("trained_parameters"), recovery.get("parameters")
    if not (finite(trained) and finite(total) and total):
        return name
    counted = count(total) if trained == total else f"{count(trained)} of {count(total)}, {percent(trained / total)}"
    return f"{name} ({counted})"


def _trained(recovery: Mapping[str, Any]) -> str:
    name, bits = TRAINED.get(recovery["trainable"], str(recovery["trainable"])), recovery.get("bits")
    if recovery.get("masks"):
        name += f", under masks of {recovery.get('pattern')} that move, by {recovery.get('mask_score')}"
    return f"{name}, weights on the levels of {bits} bits, a scale for each {recovery.get('scales')}" if bits else name


def tokens_words(recovery: Mapping[str, Any]) -> str:
    """How many tokens the model that was kept was trained on, of how many planned, and of which texts."""
    planned, kept = recovery["tokens"], recovery.get("kept_tokens")
    number_of = f"{planned:,}" if kept in (None, planned) else f"{kept:,} of {planned:,}"
    return f"{number_of} tokens of {texts_words(recovery)}{kept_words(recovery)}"


def trained_tokens(recovery: Mapping[str, Any]) -> int:
    """Tokens of all steps that were run, and of those by which windows were chosen."""
    planned, done = recovery["steps"], len(recovery.get("losses") or ())
    return recovery["tokens"] * (done or planned) // planned + (recovery.get("choosing") or {}).get("tokens", 0)


def kept_words(recovery: Mapping[str, Any]) -> str:
    """Which windows of the text it was trained on, in brackets; '' if on any."""
    if chosen := recovery.get("choosing"):
        number_of = f"{recovery['windows_available']:,} of {chosen['windows']:,}"
        return f" ({number_of} windows, chosen in {chosen['tokens']:,} tokens before)"
    return f" (the windows listed in {recovery['keep_data']})" if recovery.get("keep_data") else ""


def passes_words(recovery: Mapping[str, Any]) -> str:
    return f"{number(recovery.get('passes'), '{:.3g}')} passes over {'them' if len(recovery['texts']) > 1 else 'it'}"


def texts_words(recovery: Mapping[str, Any]) -> str:
    return " and ".join(map(str, recovery["texts"]))


def recovered_words(recovery: Mapping[str, Any]) -> str:
    """One recovery in one line."""
    trained = _trained(recovery)
    return f"{objective_words(recovery)}, {tokens_words(recovery)} at {rate(recovery['lr'])}, {trained}"


def setting_words(recovery: Mapping[str, Any]) -> str:
    """All the conditions of a training run, in two sentences."""
    planned, done = recovery["steps"], len(recovery.get("losses") or ())
    steps = f"{planned:,}" if done in (0, planned) else f"{done:,} of {planned:,}"
    likeliest = f"; the teacher's {recovery['top_k']:,} likeliest tokens" if recovery["objective"] != "ce" else ""
    warming = round((recovery.get("warmup") or 0) * planned)
    warmup = f", warmed up over {percent(recovery['warmup'], 0)} of them" if warming else ""
    several = f", {recovery['processes']} processes" if (recovery.get("processes") or 1) > 1 else ""
    what = f"{objective_words(recovery)}{likeliest}"
    how_much = f"{tokens_words(recovery)} ({passes_words(recovery)})"
    return (
        f"{what[:1].upper()}{what[1:]}; trained: {trained_words(recovery)}; {how_much}. "
        f"{steps} steps of {step_tokens(recovery):,.0f} tokens, windows of {recovery['seq_len']:,}, rate "
        f"{rate(recovery['lr'])}{warmup}, in {recovery['precision']}{several}: {speed_words(recovery)}."
    )


def flips_words(recovery: Mapping[str, Any]) -> str:
    """How much masks moved, '' where none could."""
    moves = [move["flips"] for move in recovery.get("flips") or ()]
    if not moves:
        return ""
    return (
        f"{sum(moves):,} entries changed in {len(moves):,} moves: {moves[0]:,} in the first, {moves[-1]:,} in the last"
    )


def speed_words(recovery: Mapping[str, Any]) -> str:
    return f"{number(recovery.get('tokens_per_second'), '{:,.0f}')} tokens/s"


def factor_words(text: Judged, teacher: Any) -> str:
    """How far a recovered model is from its teacher on a text; '' where no teacher was judged."""
    if not finite(text.teacher):
        return ""
    factor = f"{ratio(text.after, text.teacher, 2)} of " if finite(text.after) else ""
    return f"{factor}{teacher}'s {number(text.teacher, places(text.teacher))}"


def recovery_rows(recoveries: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """What was trained, for how long, and what it gave, as (name, value); oldest first."""
    rows = []
    for n, recovery in enumerate(recoveries, 1):
        which = f", {n} of {len(recoveries)}" if len(recoveries) > 1 else ""
        rows.append((f"recovered{which}", recovered_words(recovery)))
        if shares := share_words(recovery):
            rows.append(("shares in the end", shares))
        if recovery.get("stopped"):
            rows.append(("stopped early", str(recovery["stopped"])))
        if moved := flips_words(recovery):
            rows.append(("masks", moved))
        for text in judged(recovery):
            change = f"{number(text.before, places(text.before))} → {number(text.after, places(text.after))}"
            words = filter(None, (change, factor_words(text, recovery["teacher"]), text.conditions))
            rows.append((f"perplexity on {text.text}", "; ".join(words)))
        took = f"{number(_seconds(recovery), '{:,.0f}')} s in all, {speed_words(recovery)} in {recovery['precision']}"
        rows.append(("training", f"{took}, {mebibytes(recovery.get('peak_growth_bytes'))} beyond the loaded model"))
    return rows


def condition_rows(recovery: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Where the numbers of a recovery come from: texts with their hashes, time and memory."""
    windows = f"{recovery['windows']:,} of {recovery['windows_available']:,} windows of {recovery['seq_len']:,} tokens"
    digests = [f"sha256 {digest}" for digest in recovery.get("text_sha256") or ()]
    words = [f"{windows} of {texts_words(recovery)}", begun_words(recovery), f"seed {recovery['seed']}", *digests]
    rows = [("trained on", ", ".join(filter(None, words)))]
    rows += [(f"text {text}", window_words(score)) for text, score in (recovery.get("judged_by") or {}).items()]
    took = [f"{stage} {number(s, '{:,.1f}')}" for stage, s in (recovery.get("seconds") or {}).items()]
    rows += [("seconds", ", ".join(took))] if took else []
    return [*rows, ("peak memory", f"{mebibytes(recovery.get('peak_growth_bytes'))} beyond the loaded model")]


def evaluation_header(recovery: Mapping[str, Any]) -> list[str]:
    return ["tokens", *texts_judged(recovery)]


def evaluation_rows(recovery: Mapping[str, Any]) -> list[list[str]]:
    """One row an evaluation, with factors of the teacher's perplexities; the teacher's own come last, if it has any."""
    teacher, texts = recovery.get("teacher_perplexities") or {}, texts_judged(recovery)

    def cells(scores: Mapping[str, Any]) -> list[str]:
        shown = []
        for text in texts:
            value, best = scores.get(text), teacher.get(text)
            factor = f" ({ratio(value, best, 2)})" if finite(value) and finite(best) and scores is not teacher else ""
            shown.append(number(value, places(value)) + factor)
        return shown

    rows = [[f"{step['tokens']:,}", *cells(step["perplexities"])] for step in recovery.get("evaluations") or ()]
    return [*rows, *([["teacher", *cells(teacher)]] if teacher else [])]


def share_header(recovery: Mapping[str, Any]) -> list[str]:
    """The training texts whose shares were set as training went; '' where they were not."""
    return ["from token", *dict.fromkeys(text for shares in _shares(recovery) for text in shares)]


def share_rows(recovery: Mapping[str, Any]) -> list[list[str]]:
    """One row a judgement that set shares."""
    texts = share_header(recovery)[1:]
    steps = [step for step in recovery.get("evaluations") or () if step.get("shares")]
    return [[f"{step['tokens']:,}", *(percent(step["shares"].get(text)) for text in texts)] for step in steps]


def share_words(recovery: Mapping[str, Any]) -> str:
    """The last shares of the training texts; '' where none were set."""
    *_, last = {}, *_shares(recovery)
    return ", ".join(f"{text} {percent(share)}" for text, share in last.items())


def _shares(recovery: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [step["shares"] for step in recovery.get("evaluations") or () if step.get("shares")]


def rate_rows(recovery: Mapping[str, Any]) -> list[list[str]]:
    return [[rate(tried["lr"]), number(tried["loss"], "{:.3f}")] for tried in recovery.get("rates") or ()]


def selection_header(selection: Mapping[str, Any]) -> list[str]:
    return ["candidate", "layers dropped", *_selection_texts(selection), "rank"]


def selection_order(selection: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Candidates by their rank after the training; those without one come last."""
    ranks = [candidate["rank_after"] for candidate in selection["candidates"]]
    order = sorted(range(len(ranks)), key=lambda n: (not finite(ranks[n]), ranks[n] if finite(ranks[n]) else 0))
    return [selection["candidates"][n] for n in order]


def selection_rows(selection: Mapping[str, Any]) -> list[list[str]]:
    """One row a candidate, in the order of `selection_order`, before → after the training."""
    rows = []
    for candidate in selection_order(selection):
        pairs = [[candidate[when].get(text) for when in ("before", "after")] for text in _selection_texts(selection)]
        changes = [" → ".join(number(value, places(value)) for value in pair) for pair in pairs]
        ranks = " → ".join(number(candidate[f"rank_{when}"], "{:.0f}") for when in ("before", "after"))
        rows.append([str(candidate["name"]), ranges(sorted(candidate["dropped"])) or "none", *changes, ranks])
    return rows


def selection_words(selection: Mapping[str, Any]) -> str:
    """How the layers that went were chosen, in one line."""
    among = f"{selection['chosen']}, of {len(selection['candidates'])} candidates"
    by = f"perplexity on {selection['by']} after {selection['heal_tokens']:,} tokens of training each"
    return f"{among}, by {by}"


def _selection_texts(selection: Mapping[str, Any]) -> list[str]:
    """The texts with perplexities; the one that decided comes first."""
    texts = [text for candidate in selection["candidates"] for when in ("before", "after") for text in candidate[when]]
    return list(dict.fromkeys([selection["by"], *texts]))


def _seconds(recovery: Mapping[str, Any]) -> float:
    return sum(float(s) for s in (recovery.get("seconds") or {}).values() if finite(s))
