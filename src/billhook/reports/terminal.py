"""Tables on the terminal."""

from collections.abc import Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from billhook.reports.cut_tables import cut_rows


def summary_table(report: dict[str, Any], title: str) -> Table:
    """What was cut, for a terminal."""
    table = Table(title=title, show_header=False, title_justify="left")
    for name, value in cut_rows(report):
        table.add_row(Text(name), Text(value))  # not markup, since strangers' names may have brackets
    return table


def table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """Rows of `tables` for a terminal."""
    shown = Table(title=title, title_justify="left")
    for n, name in enumerate(header):
        # names are wrapped, not cut short
        shown.add_column(name, justify="right" if n else "left", overflow="fold")
    for row in rows:
        shown.add_row(*row)
    return shown


def estimate_table(estimate: dict[str, Any], title: str) -> Table:
    """What a prune would come to, of `billhook.pruning.dry_run`."""
    table = Table(title=title, title_justify="left", show_header=False)

    def per(part: str) -> str:
        before, after = (estimate[part][when] for when in ("before", "after"))
        return f"{before:,} → {after:,} ({after / before - 1:+.1%})"

    table.add_row("parameters", per("parameters"))
    table.add_row("of the decoder", per("decoder_parameters"))
    where = "weights stay in their files" if estimate["streamed"] else "weights in memory"
    table.add_row(
        "peak memory", f"{estimate['peak_bytes'] / 1e9:.2f} GB of {estimate['free_bytes'] / 1e9:.2f} free; {where}"
    )
    table.add_row("disk", f"{estimate['disk_bytes'] / 1e9:.2f} GB of {estimate['disk_free_bytes'] / 1e9:.2f} free")
    if will := estimate["will"]:
        table.add_row("what it does", will)
    for stage, cost in estimate["stages"].items():
        done = f", {cost['flops'] / 1e12:.2f} TFLOP" if cost["flops"] else ""
        table.add_row(stage, f"{cost['seconds']:.1f} s{done}")
    table.add_row("in all", f"{estimate['seconds']:.0f} s, {estimate['flops'] / 1e12:.2f} TFLOP", style="bold")
    return table


def text_table(models: Sequence[dict[str, Any]]) -> Table:
    """What each model writes, side by side."""
    table = Table(title="greedy continuations", title_justify="left", show_lines=True)
    table.add_column("prompt", ratio=1)
    for model in models:
        table.add_column(model["name"], ratio=2)
    for n, prompt in enumerate(models[0]["prompts"]):
        table.add_row(prompt, *[model["continuations"][n].strip() for model in models])
    return table
