"""Commands that prune many times and judge: compare, sweep."""

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from billhook.choices import AXIS_STREAMS
from billhook.cli.commands import app
from billhook.cli.options import (
    MACHINE,
    JsonFile,
    Markdown,
    Model,
    Page,
    Texts,
    Windows,
    check_outputs,
    command_line,
    listed,
    option,
)
from billhook.cli.settings import shared, with_options
from billhook.errors import BillhookError
from billhook.methods import METHODS
from billhook.pruning import contenders as compared

COMPARED = "What is compared"
COMMON = [
    one
    for one in shared()
    if one.name in ("calibration", "samples", "seq_len", "seed", "device", "dtype", "family_row")
]


@app.command(name="compare")
@with_options(COMMON)
def compare_command(
    model: Model,
    methods: Annotated[
        list[str],
        option(
            *(COMPARED, "a method, with settings if wanted (fasp:score=wanda,stream=dense); may be repeated"),
            show_default=False,
        ),
    ],
    ratio: Annotated[
        list[float], option(COMPARED, "share of the decoder to remove; may be repeated", show_default=False)
    ],
    settings: dict[str, Any],
    text: Texts = None,
    windows: Windows = None,
    jobs: Annotated[int, option(MACHINE, "prunes at a time, each in a process of its own", min=1)] = 1,
    json: JsonFile = None,
    html: Page = None,
    markdown: Markdown = False,
) -> None:
    """Prune MODEL by several methods at one size, and judge the results on the same texts: a leaderboard.

    What is done is kept: the same command goes on where it was cut off.

    Example: billhook compare demo --methods fasp --methods fasp:score=wanda,stream=dense --ratio 0.2
    """
    contenders = [compared.contender(part) for one in methods for part in ([one] if ":" in one else listed(one))]
    if not contenders:
        raise BillhookError(f"--methods names none: valid: {', '.join(METHODS)}")
    for one in contenders:  # impossible settings cost no work
        for share in ratio:
            compared.settled(one, share, settings)
    check_outputs(json, html, model)
    started = time.perf_counter()
    from billhook.cli.console import loading, progress

    with loading():
        from billhook.pruning import compare
    with progress() as tick:
        opened, by = compare.open_judged(model, settings, text or ["demo"], windows, tick)
        points = compare.compare(opened, contenders, ratio, by, settings, jobs=jobs, tick=tick)
    title = f"{model}: {len(contenders)} ways to prune it"
    _show("compare", title, points, opened, started, json, html, markdown)


@app.command(name="sweep")
@with_options(COMMON)
def sweep_command(
    model: Model,
    ratios: Annotated[
        str, option(COMPARED, "ratios to prune by: first:last:step, or some with commas", show_default=False)
    ],
    settings: dict[str, Any],
    method: Annotated[
        str, option(COMPARED, "a method, with settings: fasp:layout=per_layer,allocation=global", names=METHODS)
    ] = "fasp",
    stream: Annotated[
        str, option(COMPARED, "dense: one pass serves all ratios; the others make one for each", names=AXIS_STREAMS)
    ] = "dense",
    text: Texts = None,
    windows: Windows = None,
    json: JsonFile = None,
    html: Page = None,
    markdown: Markdown = False,
) -> None:
    """Prune MODEL at many ratios and show what quality each leaves, with the knee where the loss turns steep.

    Example: billhook sweep demo --ratios 0.1:0.6:0.1 --report sweep.html
    """
    shares, one = _ratios(ratios), compared.contender(method)
    chosen = [compared.settled(one, share, {**settings, "stream": stream}) for share in shares]
    check_outputs(json, html, model)
    started = time.perf_counter()
    from billhook.cli.console import loading, progress

    with loading():
        from billhook.pruning import compare
    with progress() as tick:
        opened, by = compare.open_judged(model, settings, text or ["demo"], windows, tick)
        points = compare.sweep(opened, one.name, chosen, by, tick)
    _show("sweep", f"{model} at {len(shares)} ratios by {one.name}", points, opened, started, json, html, markdown)


def _ratios(text: str) -> list[float]:
    """`0.1:0.6:0.1`, both ends included, or `0.1,0.2,0.5`."""
    try:
        if ":" in text:
            first, last, step = (float(part) for part in text.split(":"))
            count = round((last - first) / step) if step > 0 else -1
            found = [round(first + n * step, 6) for n in range(count + 1) if first + n * step <= last + step / 1e6]
        else:
            found = [float(part) for part in listed(text)]
    except (ValueError, OverflowError):
        found = []
    if not found or not all(0 < one < 1 for one in found):
        raise BillhookError(
            f"--ratios {text!r}: write first:last:step, like 0.1:0.6:0.1, or ratios between 0 and 1 with commas"
        )
    return sorted(set(found))


def _show(
    kind: str,
    title: str,
    points: list[dict[str, Any]],
    opened: Any,
    started: float,
    json: Path | None,
    html: Path | None,
    markdown: bool,
) -> None:
    from billhook.cli.console import out
    from billhook.pruning import compare
    from billhook.reports import page, records, tables, terminal
    from billhook.runtime import atomic

    seconds = time.perf_counter() - started
    found = compare.bend(points) if kind == "sweep" else None
    where = records.conditions(opened.model, command_line(), seconds)
    written = records.assemble(kind, title, where, points=points, knee=found)
    if json and json != Path("-"):
        atomic.write_text(json, records.to_json(written))
    if html:
        page.save(html, written)
    if json == Path("-"):
        typer.echo(records.to_json(written), nl=False)
        return
    if markdown:
        typer.echo(tables.github([tables.point_header(points), *tables.point_rows(points)]), nl=False)
        return
    out.print(terminal.table(title, tables.point_header(points), tables.point_rows(points)))
    for point in points:
        if said := point["error"] or point["note"]:
            out.print(f"{point['settings']} at {point['ratio']:.0%}: {said}", soft_wrap=True)
    if found:
        out.print(f"{found['verdict']} (on {found['text']}; 90 % interval {found['low']:.0%} to {found['high']:.0%})")
    elif kind == "sweep":
        out.print("no knee: the loss grows evenly, or there are fewer than five points")
    out.print(f"{seconds:.0f} s" + (f"; {html}" if html else ""))
