"""Commands that carry a result to where it is served: check, export."""

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from billhook.checkpoints.formats import Wanted
from billhook.checkpoints.names import local_path
from billhook.choices import CLIENTS, FORMATS, QUANTIZE, QUANTIZER
from billhook.cli.commands import app
from billhook.cli.options import OUTPUT, FamilyRow, Json, Model, Overwrite, option
from billhook.errors import BillhookError, one_of
from billhook.runtime import atomic
from billhook.runtime.outputs import check_apart, check_out

CLIENT, FORMAT = "Client", "Format"


@app.command(name="check")
def check_command(
    path: Annotated[Path, typer.Argument(metavar="OUT", help="a checkpoint folder", show_default=False)],
    client: Annotated[
        str, option(CLIENT, f"one of: {', '.join(CLIENTS)}, or all", names=(*CLIENTS, "all"))
    ] = "transformers",
    python: Annotated[
        str | None,
        option(CLIENT, "interpreter that has the client", show_default="the one that runs billhook"),
    ] = None,
    trust_remote_code: Annotated[
        bool,
        option(CLIENT, "let the client run code that lies in OUT, of model and tokenizer", "--trust-remote-code"),
    ] = False,
    family_row: FamilyRow = "",
    json: Json = False,
) -> None:
    """Load OUT in a process of a stock client, without billhook, and compare tokens and logits with billhook's own.

    Of the code in OUT only the modelling file that billhook itself wrote is run, if it was not changed.

    With --client all, what fails is listed and the exit code stays 0: few machines have every client.

    Example: billhook check smaller --client llama.cpp --python ~/llama/bin/python
    """
    wanted = list(CLIENTS) if client == "all" else [one_of("client", client, (*CLIENTS, "all"))]
    from rich.markup import escape
    from rich.table import Table

    from billhook.cli.console import loading, out, progress

    with loading():
        from billhook.checkpoints import load
        from billhook.checkpoints.clients import check
        from billhook.reports import records
    load.use_row(family_row, [str(path)])
    load.check_loadable(path, str(path))
    found, failed = [], []
    with progress() as tick:
        for n, name in enumerate(wanted):
            tick("checking", n, len(wanted))
            try:
                found.append(check.check(path, name, python, trust_remote_code))
            except BillhookError as error:
                if client != "all":
                    raise
                failed.append({"client": name, "error": str(error)})
        tick("checking", len(wanted), len(wanted))
    if json:
        typer.echo(records.to_json({"loads": found, "fails": failed}), nl=False)
        return
    table = Table("client", "version", "what was seen")
    for one in found:
        drift = f", logits within {one['logits_drift']:.1e}" if "logits_drift" in one else ""
        refused = one.get("refused_generation_config")
        but = f"; generation_config.json it cannot read: {refused}" if refused else ""
        table.add_row(one["client"], one["version"], escape(f"the same greedy tokens{drift}{but}"))
    for one in failed:
        table.add_row(one["client"], "—", escape(one["error"]))
    out.print(table)


@app.command(name="export")
def export_command(
    model: Model,
    output: Annotated[Path, option(OUTPUT, "file or folder to write", "--output", "-o", show_default=False)],
    format: Annotated[str, option(FORMAT, f"one of: {', '.join(FORMATS)}", names=FORMATS)] = "gguf",
    quantize: Annotated[
        str,
        option(
            *(FORMAT, f"F32, F16, BF16, Q8_0, Q5_0, Q4_0, …; K-quants (Q4_K_M, …) need {QUANTIZER}"),
            names=QUANTIZE,
            show_default="F16",
        ),
    ] = "",
    merge: Annotated[
        bool,
        option(FORMAT, "multiply thin matrices out, fill narrow heads with zeros: stock shapes, no saving", "--merge"),
    ] = False,
    overwrite: Overwrite = False,
    family_row: FamilyRow = "",
    json: Json = False,
) -> None:
    """Write MODEL for another runtime: one GGUF file for llama.cpp, with tokenizer and chat template, or a folder.

    Example: billhook export smaller --quantize Q8_0 -o smaller.gguf
    """
    output, source = Path(os.path.expanduser(output)), Path(os.path.expanduser(model))
    if format == "folder":
        check_out(output, source if source.exists() else None, overwrite)
    else:
        check_apart(output, source)
        if output.exists() and not overwrite:
            raise BillhookError(f"{output} exists: choose another file, or --overwrite")
        atomic.check_file(output)
    wanted = Wanted(format, quantize, merge, overwrite)
    local_path(model)
    from rich.table import Table

    from billhook.cli.console import loading, out, progress

    with loading():
        from billhook.checkpoints import load
        from billhook.checkpoints.export import export
        from billhook.reports import records
    with progress() as tick:
        opened = load.open_model(model, device="cpu", dtype="float32", tick=tick, family_row=family_row)
        found = export(opened, output, wanted, tick)
    if json:
        typer.echo(records.to_json(found), nl=False)
        return
    table = Table(show_header=False)
    for row in _rows(found):
        table.add_row(*row)
    out.print(table)
    out.print(f"written: {output}", soft_wrap=True)


def _rows(found: dict[str, Any]) -> list[tuple[str, str]]:
    """What was written, as it is read; `--json` has all of it."""
    rows = [
        (name, f"{value:,}" if isinstance(value, int) else str(value)) for name, value in found.items() if _tells(value)
    ]
    if types := found.get("types"):
        rows.append(("types", ", ".join(f"{count} {name}" for name, count in types.items())))
    rows += [("loads in", f"{client['client']} {client['version']}") for client in found.get("loads", ())]
    return rows


def _tells(value: object) -> bool:
    return bool(value) and isinstance(value, int | str)
