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
        table.add_row(Text(name), Text(value))  # of strangers: brackets in them are no markup
    return table


def table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """Rows of `tables` for a terminal."""
    found = Table(title=title, title_justify="left")
    for n, name in enumerate(header):
        found.add_column(name, justify="right" if n else "left", overflow="fold")  # no name is cut short
    for row in rows:
        found.add_row(*row)
    return found


def estimate_table(found: dict[str, Any], title: str) -> Table:
    """What a prune would come to, of `billhook.pruning.dry_run`."""
    table = Table(title=title, title_justify="left", show_header=False)

    def per(part: str) -> str:
        before, after = (found[part][when] for when in ("before", "after"))
        return f"{before:,} → {after:,} ({after / before - 1:+.1%})"

    table.add_row("parameters", per("parameters"))
    table.add_row("of the decoder", per("decoder_parameters"))
    where = "weights stay in their files" if found["streamed"] else "weights in memory"
    table.add_row("peak memory", f"{found['peak_bytes'] / 1e9:.2f} GB of {found['free_bytes'] / 1e9:.2f} free; {where}")
    table.add_row("disk", f"{found['disk_bytes'] / 1e9:.2f} GB of {found['disk_free_bytes'] / 1e9:.2f} free")
    for stage, cost in found["stages"].items():
        done = f", {cost['flops'] / 1e12:.2f} TFLOP" if cost["flops"] else ""
        table.add_row(stage, f"{cost['seconds']:.1f} s{done}")
    table.add_row("in all", f"{found['seconds']:.0f} s, {found['flops'] / 1e12:.2f} TFLOP", style="bold")
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
