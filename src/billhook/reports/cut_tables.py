"""The rows that say what a prune did: to the whole model, and layer by layer."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from billhook.reports.formatting import KINDS, finite, mebibytes, number, percent, ranges, signed, with_error
from billhook.reports.gate_tables import all_tokens_rows, learned_rows
from billhook.reports.recovery_tables import recovery_rows, selection_words
from billhook.reports.search_tables import choice_words
from billhook.reports.tables import begun_words

MANY = 8  # the most layers that are named one by one
FITS = {"Q4_0, Q8_0": 32, "Marlin": 128, "K-quants": 256}  # the number that FFN widths must be multiples of


def layer_header() -> list[str]:
    return ["layer", "kept", "without restoration", "restored", "held out", "score gone"]


def layer_rows(cuts: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """One row a layer, of cuts of one kind, under `layer_header`."""
    return [
        [
            str(cut["layer"]),
            f"{cut['units'] - cut['dropped']:,} of {cut['units']:,}",
            *[number(cut.get(key), "{:.4f}") for key in ("error_without", "error", "error_held_out")],
            percent(cut.get("score_dropped"), 2),
        ]
        for cut in cuts
    ]


def zero_rows(zeros: Mapping[str, Any]) -> list[tuple[str, str]]:
    """How many weights are zero, and what that costs each kind of operator, as (name, value)."""
    shares = percent(zeros["sparsity"], 2)
    rows = [
        (
            "zeros",
            f"{zeros['zeros']:,} of {zeros['weights']:,} weights ({shares}, {zeros['pattern']}; "
            f"{', '.join(zeros['targets'])}): alone they make nothing smaller or faster",
        )
    ]
    if means := _means_by_role(zeros["operators"], ("error",), "error_held_out"):
        rows.append(("error of each operator", means))
    return rows


def _means_by_role(found: Sequence[Mapping[str, Any]], before_after: Sequence[str], held_out: str) -> str:
    """Mean relative errors of linear weights over the layers, role by role."""
    said, brackets = [], ""
    for role in dict.fromkeys(one["role"] for one in found):
        of_role = [one for one in found if one["role"] == role]
        *errors, unseen = ([one[key] for one in of_role if finite(one[key])] for key in (*before_after, held_out))
        brackets = "; in brackets: on held-out windows" if unseen else brackets
        last = f" ({statistics.fmean(unseen):.3f})" if unseen else ""
        if all(errors):
            said.append(f"{role} {' → '.join(f'{statistics.fmean(each):.3f}' for each in errors)}{last}")
    return f"{', '.join(said)} (mean of layers, relative{brackets})" if said else ""


def approximated_rows(approximated: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    """How far modules were from their unpruned outputs, and how alike the heads were that went, as (name, value)."""
    if not approximated:
        return []
    rows = []
    if means := _means_by_role(approximated["rebuilt"], ("before", "after"), "held_out"):
        rows.append(("modules refitted", means))
    if taus := [tau for one in approximated["thresholds"] for tau in one["tau"] if finite(tau)]:
        rows.append(
            ("threshold of heads", f"tau from {min(taus):.3f} to {max(taus):.3f} nats, by layer, gives as many")
        )
    return rows


def low_rank_rows(found: Sequence[Mapping[str, Any]] | None) -> list[tuple[str, str]]:
    """Which weights became two thin ones, of what ranks, and how far they are from their outputs, as (name, value)."""
    if not found:
        return []
    ranks, numbers = sorted({one["rank"] for one in found}), ranges(sorted({one["layer"] for one in found}))
    span = f"{ranks[0]:,}" if len(ranks) == 1 else f"{ranks[0]:,} to {ranks[-1]:,}"
    rows = [("low rank", f"{len(found)} weights of layers {numbers}, ranks {span}")]
    if means := _means_by_role(found, ("error",), "error_held_out"):
        rows.append(("error of factors", means))
    return rows


def pairs_rows(found: Mapping[str, Sequence[Sequence[int]]] | None) -> list[tuple[str, str]]:
    """Which rotary pairs heads keep, as (name, value)."""
    if not found:
        return []
    kept = {tuple(one) for of_layer in found.values() for one in of_layer}
    if len(kept) == 1:
        (common,) = kept
        return [("rotary pairs", f"{len(common)} of every head stay: {ranges(common)}")]
    counts = sorted({len(one) for one in kept})
    span = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    return [("rotary pairs", f"{span} of every head stay, each KV head its own")]


def shares_rows(found: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    """What share of its entries each kind of weight was to keep, beside the others, and what that gains."""
    if not found:
        return []
    told = ", ".join(f"{kind} {share:g}" for kind, share in found["shares"].items())
    words = f"{told}, to scale; {len(found['trials'])} trials; on windows that none saw {found['searched']:.4f} nats a token"
    return [
        ("shares", f"{words} against {found['equal']:.4f} of equal ones{'' if found['taken'] else ', which are taken'}")
    ]


def cut_rows(cut: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What was cut, what it took, and what was trained afterwards, as (name, value); a cut may be missing."""
    rows = [*_pruned_rows(cut), *look_rows(cut.get("look"))] if "cuts" in cut else []
    rows += recovery_rows(cut.get("recovery") or [])
    rows += all_tokens_rows(cut)
    for client in cut.get("loads") or ():
        rows.append(("loads in", " ".join(str(client[key]) for key in ("client", "version") if client.get(key))))
    return rows


def _pruned_rows(cut: Mapping[str, Any]) -> list[tuple[str, str]]:
    size, cuts = cut["sizes"], cut.get("cuts") or []
    before, after = size["before"], size["after"]
    rows: list[tuple[str, str]] = [
        (name, f"{before[key]:,} → {after[key]:,} ({signed(size[share], digits)}{asked})")
        for name, key, share, digits, asked in (
            ("parameters", "parameters", "achieved_ratio_of_all", 1, ""),
            ("decoder", "decoder_parameters", "achieved_ratio", 2, f", asked for {size['budget']}"),
        )
    ]
    if zeros := cut.get("zeros"):
        rows += zero_rows(zeros)
    rows += residual_rows(cut.get("residual"))
    rows += [*approximated_rows(cut.get("approximated")), *low_rank_rows(cut.get("low_rank"))]
    rows += [*shares_rows(cut.get("bolaco")), *pairs_rows(cut.get("rotary_pairs"))]
    if words := cut.get("vocabulary"):
        grows = f"the calibration text takes {percent(words['calibration_grows'])} more of them"
        rows.append(("vocabulary", f"{words['before']:,} → {words['kept']:,} tokens; {grows}"))
    if dropped := cut.get("dropped_layers"):
        kept = f"; kept: {ranges(cut['kept_layers'])}" if cut.get("kept_layers") else ""
        rows.append(("layers", f"dropped: {ranges(dropped)}{kept} (numbered from 0)"))
    rows += [*auto_rows(cut), *missed_rows(cut.get("mope")), *policy_rows(cut.get("policy"))]
    rows += learned_rows(cut)
    if selection := cut.get("selection"):
        rows.append(("layers chosen", selection_words(selection)))
    if search := cut.get("search"):
        rows.append(("samples and metric" if search.get("pool") else "metric", choice_words(search)))
    touched = dict.fromkeys(c["kind"] for c in cuts if c["dropped"])
    for kind in touched:
        cuts_of_kind = [c for c in cuts if c["kind"] == kind]
        name = str(KINDS.get(kind, kind))
        rows.append((name, widths(cuts_of_kind)))
        if errors := _errors(cuts_of_kind):
            rows.append((f"{name}, error", errors))
    if patched := _patched([c for c in cuts if c["kind"] not in touched], dropped or ()):
        rows.append(("patched", patched))
    if kept := [c["units"] - c["dropped"] for c in cuts if c["kind"] == "ffn" and "ffn" in touched]:
        fits = [f"{name} ({step}) in {sum(w % step == 0 for w in kept)}" for name, step in FITS.items()]
        rows.append(("widths fit", f"{', '.join(fits)} of {len(kept)} layers"))
    rows.append(("calibration", calibration_words(cut)))
    rows.append(("seconds", ", ".join(f"{stage} {number(s, '{:,.1f}')}" for stage, s in cut["seconds"].items())))
    rows.append(("peak memory", f"{mebibytes(cut.get('peak_growth_bytes'))} beyond the loaded model"))
    return rows


def auto_rows(cut: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What the method `auto` has tried and taken, and what refining it came to, as (name, value)."""
    if not (auto := cut.get("auto")):
        return []
    tried = ", ".join(f"{name} {number(loss, '{:.3f}')}" for name, loss in auto["tried"].items())
    windows = f"nats a token on held-out windows, fitted on {auto['trial_windows']}"
    rows = [("chosen", f"{auto['chosen']}; tried: {tried} ({windows})" if tried else auto["chosen"])]
    if trials := auto.get("trials"):
        rows += [("why", _why(auto["chosen"], trials)), ("trials", _trials(trials, auto["tried"]))]
    if auto["refused"]:
        rows.append(("cannot be had", "; ".join(f"{name}: {why}" for name, why in auto["refused"].items())))
    if minutes := (cut.get("recipe") or {}).get("minutes"):
        took = sum(filter(finite, cut["seconds"].values())) / 60
        rows.append(
            ("minutes", f"{number(took, '{:.1f}')} of {number(minutes, '{:g}')}, before it was written and verified")
        )
    if refined := cut.get("refined"):
        errors = [
            f"layers {one['first']}-{one['last']}: error {number(one['before'], '{:.3f}')} → {number(one['after'], '{:.3f}')}"
            + ("" if one["kept"] else ", left as it was")
            for one in refined
        ]
        rows.append(("refined", f"{', '.join(errors)} (as numbered after the cut, on held-out windows)"))
    return rows


def _why(chosen: str, trials: Mapping[str, Mapping[str, Any]]) -> str:
    """What speaks for the cut that was taken."""

    def apart(name: str) -> str:
        return with_error(trials[name]["behind"], trials[name]["behind_standard_error"], "{:.3f}")

    def far(name: str) -> float:
        return trials[name]["behind"] if finite(trials[name]["behind"]) else math.inf

    nearest, *others = sorted(trials, key=far)
    if chosen == nearest:
        return f"nearest to the unpruned model; {others[0]} is {apart(others[0])} behind"
    return f"of less depth than {nearest}, which is {apart(chosen)} nearer: windows do not tell them apart"


def _trials(trials: Mapping[str, Mapping[str, Any]], tried: Mapping[str, float]) -> str:
    """What each trial came to, and how long it took."""
    refines = any(one["refined"] for one in trials.values())
    words = []
    for name, one in trials.items():
        then = f", {number(tried[name], '{:.3f}')} refined" if one["refined"] else ", too far behind to be refined"
        words.append(
            f"{name}: {number(one['closed'], '{:.3f}')} in closed form{then if refines else ''}, {number(one['seconds'], '{:,.0f}')} s"
        )
    return "; ".join(words)


def missed_rows(mope: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    """What the method `mope` foretold of its cut, and what it measured, as (name, value)."""
    if not mope:
        return []
    whole, modules = mope["all"], sum(len(row["lost"]) for row in mope["table"])
    by = f"by {mope['metric']}, {modules:,} modules missed one at a time"
    rows = [
        (
            "lost before restoration",
            f"{number(whole['predicted'], '{:.4f}')} if losses added up, {number(whole['measured'], '{:.4f}')} measured ({by})",
        )
    ]
    if depth := mope["depth"]:
        words = [f"{one['layer']}: {number(one['lost'], '{:.4f}')}" for one in depth]
        rows.append(("layers missed least", f"{', '.join(words)} (on the cut model, one after another)"))
    return rows


def policy_rows(policy: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    """What the method `policy` has learned, and whether it was taken, as (name, value)."""
    if not policy:
        return []
    bare, taken = policy["unrestored"], "taken" if policy["accepted"] else f"not taken: {policy['standard']} was"
    learned = with_error(bare["gain"], bare["standard_error"], "{:.4f}")
    won = with_error(policy["gain"], policy["standard_error"], "{:.4f}")
    masks = f"{policy['forwards']:,} masks of {policy['units']:,} units"
    return [
        (
            "learned",
            f"{learned} nats a token better than its start before restoration, {won} than {policy['standard']} as cut; {taken} "
            f"({masks})",
        )
    ]


def missed_header() -> list[str]:
    return ["layer", "predicted", "measured"]


def missed_by_layer(mope: Mapping[str, Any] | None) -> list[list[str]]:
    """What the cut of each layer alone costs, under `missed_header`."""
    rows = mope["layers"] if mope else []
    return [[str(row["layer"]), *(number(row[key], "{:.5f}") for key in ("predicted", "measured"))] for row in rows]


def look_rows(look: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    """What a prune's closing look saw, the unpruned model first, as (name, value)."""
    if not look:
        return []
    (before, after), rows = look["perplexities"], []
    if finite(before) and finite(after):
        error = f" ± {look['factor_standard_error']:.3f}" if finite(look["factor_standard_error"]) else ""
        divergence = f", {look['kl']:.3f} nats a token" if finite(look["kl"]) else ""
        rows.append(
            (
                f"on {look['text']}",
                f"perplexity {before:.2f} → {after:.2f} (×{number(look['factor'], '{:.3f}')}{error}){divergence}",
            )
        )
    said = {name: f"{name} {percent(a)} → {percent(b)}" for name, (a, b) in look["repetition"].items() if finite(a)}
    if said:
        rows.append(("repetition", ", ".join(said.values())))
    rows.append(
        ("small tasks", ", ".join(f"{name} {percent(a)} → {percent(b)}" for name, (a, b) in look["tasks"].items()))
    )
    if look["warning"]:
        rows.append(("warning", look["warning"]))
    return rows


def residual_rows(narrowed: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    """How many channels of the residual stream are left, and what turning it has cost, as (name, value)."""
    if not narrowed:
        return []
    head = narrowed["untied_parameters"]
    untied = f"; the head, no longer tied to the embeddings, adds {head:,} parameters" if head else ""
    turned = ", rotated first" if narrowed["rotated"] else ""
    return [("residual stream", f"{narrowed['before']:,} → {narrowed['kept']:,} channels{turned}{untied}")]


def calibration_words(cut: Mapping[str, Any]) -> str:
    text = cut["calibration"]
    if not text["windows"]:
        return "none was needed"
    seed = (cut.get("recipe") or {}).get("seed")
    probes = f", {text['probes']} more to probe with" if text.get("probes") else ""
    if other := text.get("elsewhere"):
        probes += f" and {other['windows']} of {other['source']}"
    words = [
        f"{text['windows']:,} windows of {text['seq_len']:,} tokens of {text['source']}{probes}",
        begun_words(text),
    ]
    return ", ".join(filter(None, [*words, f"seed {seed}" if seed is not None else ""]))


def widths(cuts: Sequence[Mapping[str, Any]]) -> str:
    """What is left of one kind: once where all layers are equal, else the range."""
    before, after = {c["units"] for c in cuts}, {c["units"] - c["dropped"] for c in cuts}
    if len(before) == len(after) == 1:
        return f"{before.pop():,} → {after.pop():,} in each of {len(cuts)} layers"
    untouched = sum(c["dropped"] == 0 for c in cuts)
    uncut = f", {untouched} of {len(cuts)} layers whole" if untouched else f" in {len(cuts)} layers"
    return f"{'/'.join(f'{n:,}' for n in sorted(before))} → {min(after):,} to {max(after):,}{uncut}"


def _patched(cuts: Sequence[Mapping[str, Any]], dropped: Sequence[int]) -> str:
    """Layers that lost nothing and were refitted to make up for dropped ones: each, or the mean where they are many."""
    if not cuts:
        return ""
    if len(cuts) > MANY:
        return f"layers {ranges(c['layer'] for c in cuts)}: error {_errors(cuts)}"
    words = []
    for c in cuts:
        held_out = f", {c['error_held_out']:.2f} held out" if finite(c.get("error_held_out")) else ""
        words.append(f"layer {c['layer']}: error {number(c['error_without'])} → {number(c['error'])}{held_out}")
    if 0 in dropped:
        words.append("nothing stands before layer 0 to patch")
    return "; ".join(words)


def _errors(cuts: Sequence[Mapping[str, Any]]) -> str:
    """Mean relative errors of one kind, over the layers that were cut or not."""
    means = {}
    for key in ("error_without", "error", "error_held_out"):
        values = [c[key] for c in cuts if finite(c.get(key))]
        means[key] = sum(values) / len(values) if values else None
    if means["error"] is None:
        return ""
    held_out = f", {means['error_held_out']:.3f} on held-out windows" if means["error_held_out"] is not None else ""
    if means["error"] == means["error_without"]:  # nothing was repaired
        return f"{means['error']:.3f}{held_out} (mean of layers)"
    by = "merging" if cuts[0]["kind"] == "experts" else "restoration"
    return f"{number(means['error_without'], '{:.3f}')} → {means['error']:.3f} by {by}{held_out} (mean of layers)"
