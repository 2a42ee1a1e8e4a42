"""The rows of methods whose gates learn before units go."""

from collections.abc import Mapping, Sequence
from typing import Any

from billhook.reports.formatting import KINDS, number, percent
from billhook.reports.recovery_tables import trained_tokens

LEARNED = ("gates", "softtopk", "loraprune", "l0", "mlpruning")  # records of methods whose gates learn


def learned_rows(cut: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What gates came to, by whatever method, as (name, value)."""
    return [
        *gate_rows(cut.get("gates") or cut.get("softtopk")),
        *closing_rows(cut.get("loraprune")),
        *held_rows(cut.get("l0")),
        *share_rows(cut.get("mlpruning")),
    ]


def gate_rows(gates: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    """What learned gates came to, and whether they were taken, as (name, value)."""
    if not gates:
        return []
    begun, learned = (number(gates["unrestored"][name], "{:.4f}") for name in ("start", "learned"))
    taken = "" if gates["taken"] == "learned" else "; not taken: the start is better"
    how = f"{gates['units']:,} gates in {len(gates['losses']):,} steps"
    return [("learned", f"{begun} → {learned} nats a token before restoration, on held-out windows{taken} ({how})")]


def closing_rows(loraprune: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    """What the loss was while adapters trained and units went, as (name, value)."""
    if not loraprune:
        return []
    control = "; units were told one another's importance" if loraprune["shuffled"] else ""
    return [("trained", f"{_first_and_last(loraprune['losses'], loraprune['objective'])}{control}")]


def held_rows(l0: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    """What the loss was while random gates learned, and how near they came to the budget, as (name, value)."""
    if not l0:
        return []
    away = f"{percent(l0['away'])} of the gated parameters away from the budget before the cut, which meets it"
    return [("trained", f"{_first_and_last(l0['losses'], l0['objective'])}; {away}")]


def share_rows(mlpruning: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    """What the loss was while shares and adapters learned, and what each axis learned to keep, as (name, value)."""
    if not mlpruning:
        return []
    spans = {kind: (percent(min(found)), percent(max(found))) for kind, found in mlpruning["shares"].items()}
    kept = ", ".join(f"{least} to {most} of {KINDS[kind]}" for kind, (least, most) in spans.items())
    return [
        ("trained", f"{_first_and_last(mlpruning['losses'], mlpruning['objective'])}; layers learned to keep {kept}")
    ]


def learned_tokens(cut: Mapping[str, Any]) -> int:
    """How many tokens gates learned on, before units went."""
    return sum((cut.get(name) or {}).get("tokens", 0) for name in LEARNED)


def all_tokens_rows(cut: Mapping[str, Any]) -> list[tuple[str, str]]:
    """How many tokens a model was trained on before its units went and after, as (name, value): what to compare by."""
    before = learned_tokens(cut)
    after = sum(trained_tokens(recovery) for recovery in cut.get("recovery") or ())
    if not before:
        return []
    both = f", {after:,} after it: {before + after:,} in all" if after else ""
    return [("tokens learned on", f"{before:,} before the cut{both}")]


def _first_and_last(losses: Sequence[float], objective: str) -> str:
    tenth = max(1, len(losses) // 10)
    first, last = (number(sum(part) / tenth, "{:.4f}") for part in (losses[:tenth], losses[-tenth:]))
    return f"{first} → {last} nats a token (by {objective}, first and last tenth of {len(losses):,} steps)"
