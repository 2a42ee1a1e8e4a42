"""Commands that look at models: evaluate, inspect, methods."""

import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from billhook import atomic, budget, checkpoint, data, evaluate, report
from billhook.cli.shared import Device, Dtype, Json, Model, SeqLen, app, disk_bytes, out, print_measures, progress
from billhook.errors import BillhookError
from billhook.families import FAMILIES, KINDS
from billhook.methods import METHODS
from billhook.observe import STREAMS
from billhook.scores import SCORES
from billhook.taylor import GRADIENT_SCORES


@app.command(name="evaluate")
def evaluate_command(
    model: Annotated[
        str, typer.Argument(help="a folder, a hub id (owner/name), a .gguf file, or 'demo'", show_default=False)
    ],
    against: Annotated[
        str | None, typer.Option(help="another model to measure beside it, in turns", show_default=False)
    ] = None,
    text: Annotated[
        list[str] | None, typer.Option(help="text to score, as for --calibration; may be repeated", show_default="demo")
    ] = None,
    seq_len: SeqLen = 512,
    windows: Annotated[
        int | None, typer.Option(min=1, help="score at most this many windows of each text", show_default="all")
    ] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    json: Annotated[
        Path | None, typer.Option(help="write every number to this file ('-' for standard output)", show_default=False)
    ] = None,
) -> None:
    """Measure MODEL: size, perplexity, speed, memory, and what it writes.

    Example: billhook evaluate smaller --against demo --text wiki.txt
    """
    if seq_len < 2:
        raise BillhookError(f"seq-len {seq_len}: a window needs at least 2 tokens")
    if json and json != Path("-"):
        atomic.check_file(json)
    started = time.perf_counter()
    with progress() as tick:
        texts = data.evaluation_texts(text or ["demo"], tick)
        opened = [
            checkpoint.open_model(name, device=device, dtype=dtype, tick=tick)
            for name in ([against] if against else []) + [model]
        ]
        if len({_fingerprint(one.tokenizer) for one in opened}) > 1:
            raise BillhookError(
                f"{against} and {model} have different tokenizers: perplexities per token cannot be compared"
            )
        for one in opened:
            checkpoint.check_positions(one, seq_len)
        subjects = [evaluate.Subject(one.name, one.model, one.tokenizer, disk_bytes(one)) for one in opened]
        found = evaluate.side_by_side(subjects, texts, seq_len, windows, tick)
    if json == Path("-"):
        typer.echo(report.to_json({"models": found}), nl=False)
        return
    if json:
        atomic.write_text(json, report.to_json({"models": found}))
    print_measures(found)
    out.print(f"{time.perf_counter() - started:.0f} s")


@app.command(name="inspect")
def inspect_command(model: Model, json: Json = False) -> None:
    """Show what MODEL is made of and what can be pruned, without loading its weights."""
    with progress() as tick:
        skeleton = checkpoint.open_skeleton(model, tick)
    found = {"model": model, **budget.anatomy(skeleton)}
    if json:
        typer.echo(report.to_json(found), nl=False)
        return
    out.print(
        f"[bold]{model}[/]: {found['model_type']}, {found['layers']} layers, hidden size {found['hidden_size']}, "
        f"{found['parameters']:,} parameters, {found['decoder_parameters']:,} of them in decoder layers; "
        f"embeddings {'tied' if found['tied_embeddings'] else 'not tied'}"
    )
    table = Table()
    for column in ("axis", "what", "units a layer", "parameters a unit", "share of decoder"):
        table.add_column(column)
    for row in found["axes"]:
        cells = (
            [_span(row["units"]), f"{row['parameters_per_unit']:,}", f"{row['share_of_decoder']:.1%}"]
            if row["units"]
            else ["—"] * 3
        )
        table.add_row(row["axis"], KINDS[row["axis"]], *cells)
    out.print(table)
    for row in found["axes"]:
        if row["refused"]:
            out.print(f"[bold]{row['axis']}[/]: {row['refused']}")


def _span(units: int | list[int]) -> str:
    """Units a layer: one number, or from the least to the most where layers differ."""
    return f"{units:,}" if isinstance(units, int) else f"{min(units):,}-{max(units):,}"


@app.command(name="methods")
def methods_command(json: Json = False) -> None:
    """List every method: paper, what it prunes, what it needs."""
    if json:
        fields = ("title", "paper", "kinds", "default_kinds", "needs", "note")
        typer.echo(report.to_json({name: {f: getattr(m, f) for f in fields} for name, m in METHODS.items()}), nl=False)
        return
    for name, method in METHODS.items():
        out.print(f"[bold]{name}[/]  {method.title} ({method.paper})")
        out.print(f"  prunes: {', '.join(method.kinds)} (default {', '.join(method.default_kinds)})")
        out.print(
            f"  needs:  {method.needs}\n  scores: {', '.join((*SCORES, *GRADIENT_SCORES))}; streams: {', '.join(STREAMS)}\n  note:   {method.note}"
        )
    out.print(f"families: {', '.join(FAMILIES)}")


def _fingerprint(tokenizer: Any) -> int:
    return hash(frozenset(tokenizer.get_vocab().items()))
