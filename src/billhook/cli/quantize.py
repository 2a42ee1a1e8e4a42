"""The command quantize."""

import os
import time
from pathlib import Path
from typing import Annotated

import typer

from billhook.choices import BITS, BITS_BY, CONTAINERS, EMBEDDING_TYPES, GRID_TYPES, OPERATOR_STREAMS, QUANTIZERS
from billhook.cli.commands import app
from billhook.cli.options import (
    BUDGET,
    CALIBRATION,
    METHOD,
    OUTPUT,
    FamilyRow,
    Fresh,
    Json,
    Model,
    Output,
    Overwrite,
    SeqLen,
    check_free_of,
    option,
    unfinished,
)
from billhook.planning.few_bits import Wanted
from billhook.runtime import atomic
from billhook.runtime.outputs import check_apart
from billhook.runtime.units import BYTES, amount


@app.command(name="quantize")
def quantize_command(
    model: Model,
    output: Output,
    bits: Annotated[
        str,
        option(
            *(BUDGET, f"{', '.join(BITS)}; a type, like Q4_1; mixed: by --memory"),
            names=(*BITS, *GRID_TYPES, "mixed"),
            show_default="4",
        ),
    ] = "",
    memory: Annotated[
        str | None, option(BUDGET, "or: bytes that all weights may take, like 90MB", show_default=False)
    ] = None,
    format: Annotated[str, option(OUTPUT, f"one of: {', '.join(CONTAINERS)}", names=CONTAINERS)] = "gguf",
    method: Annotated[
        str,
        option(
            METHOD,
            "gptq reads calibration text; rtn: round to nearest; kept: what `recover --bits` left",
            names=QUANTIZERS,
        ),
    ] = "gptq",
    allocation: Annotated[
        str,
        option(BUDGET, f"bits by layer: {', '.join(BITS_BY)}", names=BITS_BY, show_default="sensitivity"),
    ] = "",
    stream: Annotated[
        str, option(METHOD, f"each weight sees: {', '.join(OPERATOR_STREAMS)}", names=OPERATOR_STREAMS)
    ] = "sequential",
    embedding: Annotated[
        str,
        option(
            *(METHOD, f"type of embedding and head: {', '.join(EMBEDDING_TYPES)}"),
            names=EMBEDDING_TYPES,
            show_default="Q8_0; F16 with compressed-tensors",
        ),
    ] = "",
    calibration: Annotated[
        str, option(CALIBRATION, "text: a file, a folder, a hub data set name[:config[:split]], mixed, or demo")
    ] = "mixed",
    samples: Annotated[int, option(CALIBRATION, "windows of calibration text", min=1)] = 64,
    probes: Annotated[int, option(CALIBRATION, "further windows to choose bits by, and again to accept by", min=1)] = 8,
    seq_len: SeqLen = 512,
    seed: Annotated[int, option(CALIBRATION, "which windows are drawn", min=0)] = 0,
    imatrix: Annotated[
        Path | None,
        option(OUTPUT, "write an importance matrix for llama-quantize to this file, too", show_default=False),
    ] = None,
    family_row: FamilyRow = "",
    overwrite: Overwrite = False,
    json: Json = False,
    fresh: Fresh = False,
) -> None:
    """Give the weights of MODEL fewer bits, for llama.cpp or compressed-tensors; write OUT, reload it and compare.

    Examples:

    billhook quantize smaller --bits 4 -o smaller-q4

    billhook quantize smaller --memory 90MB --calibration wiki.txt -o smaller-90
    """
    started, limit = time.perf_counter(), amount(memory, BYTES, "memory")
    how = {
        "allocation": allocation,
        "stream": stream,
        "embedding": embedding,
        "samples": samples,
        "probes": probes,
        "seq_len": seq_len,
    }
    wanted = Wanted(bits, limit, format, method, **how, calibration=calibration, seed=seed, imatrix=imatrix is not None)
    output = check_free_of(model, output, overwrite)
    if imatrix is not None:
        imatrix = Path(os.path.expanduser(imatrix))
        check_apart(imatrix, Path(os.path.expanduser(model)))
        atomic.check_file(imatrix)
    from billhook.cli.console import going_on, loading, out, progress, say

    with loading():
        from billhook.checkpoints import load
        from billhook.pruning.quantize import quantize
        from billhook.reports import records, terminal
        from billhook.reports.quantized import quantized_rows
        from billhook.runtime import run_folder
        from billhook.runtime.run import Run
    work = unfinished(output)
    with atomic.folder(output, overwrite) as folder, going_on(work), progress() as tick:
        run = Run(tick=tick, announce=say, folder=work, fresh=fresh)
        load.use_row(family_row, [model], tick)
        found = quantize(model, wanted, run)
        found.write(folder, tick)
        if imatrix is not None:
            found.write_imatrix(imatrix)
    run_folder.remove(work)
    if json:
        typer.echo(records.to_json(found.record), nl=False)
        return
    out.print(terminal.table(f"{model}, quantised", ["", ""], quantized_rows(found.record["quantized"])))
    out.print(f"{time.perf_counter() - started:.0f} s; written and reload-verified: {output}", soft_wrap=True)
