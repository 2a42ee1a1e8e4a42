"""Commands that train, and say beforehand what training buys: recover, forecast."""

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from billhook.checkpoints.names import local_path
from billhook.choices import MEASURING_SECONDS
from billhook.cli.commands import app
from billhook.cli.options import (
    BUDGET,
    MACHINE,
    TRAINING,
    Device,
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
from billhook.cli.settings import Setting, heading_of, with_options
from billhook.recovery.settings import Recovery, recovery


@app.command(name="recover")
@with_options([Setting(name, field, heading_of(field, TRAINING)) for name, field in Recovery.model_fields.items()])
def recover_command(
    model: Model,
    output: Output,
    settings: dict[str, Any],
    overwrite: Overwrite = False,
    json: Json = False,
    lessons: Annotated[
        Path | None,
        option(
            *(MACHINE, "folder for the teacher's answers, which other runs may share"),
            show_default="beside OUT, deleted at the end",
        ),
    ] = None,
    fresh: Fresh = False,
) -> None:
    """Train a pruned MODEL back, by distillation or on text; write OUT, reload it and compare.

    A run that was cut off goes on with the same command.  `accelerate launch -m billhook recover …` uses many
    processes.

    Example: billhook recover smaller --teacher demo --tokens 500k --text wiki.txt -o healed
    """
    chosen, started = recovery(**settings), time.perf_counter()
    output = check_free_of(model, output, overwrite)
    from billhook.cli.console import err, going_on, loading, out, progress

    with loading():
        from accelerate import PartialState

        from billhook.checkpoints.clients import check
        from billhook.checkpoints.result import Result
        from billhook.recovery.recover import recover
        from billhook.recovery.setup import on_cpu
        from billhook.reports import records, terminal
        from billhook.runtime import atomic, run_folder
        from billhook.runtime.progress import quiet
    check.check_startable()
    work = unfinished(output)

    def train(tick: Any) -> Result:
        how = {"tick": tick, "announce": _say, **chosen.model_dump()}
        return recover(model, work=work, lessons=lessons, fresh=fresh, **how)

    if not PartialState(cpu=on_cpu(chosen.device)).is_main_process:
        train(quiet)
        return
    with atomic.folder(output, overwrite) as folder, going_on(work), progress() as tick:
        found = train(tick)
        found.write(folder, tick)
    run_folder.remove(work)
    if json:
        typer.echo(records.to_json(found.record), nl=False)
        return
    if why := found.healing["stopped"]:
        err.print(f"billhook: stopped early: {why}", soft_wrap=True)
    out.print(terminal.summary_table(found.record, f"{model}, recovered"))
    out.print(f"{time.perf_counter() - started:.0f} s; written and reload-verified: {output}", soft_wrap=True)


@app.command(name="forecast")
def forecast_command(
    model: Model,
    ratio: Annotated[float, option(BUDGET, "share of the decoder to remove", show_default=False)],
    minutes: Annotated[float, option(BUDGET, "to train in", min=0.1, show_default=False)],
    seq_len: SeqLen = 512,
    seconds: Annotated[float, option(MACHINE, "to measure this machine for", min=1)] = MEASURING_SECONDS,
    device: Device = "auto",
    family_row: FamilyRow = "",
    json: Json = False,
) -> None:
    """Measure how fast this machine trains, say how many tokens the minutes buy, and print the commands.

    Example: billhook forecast demo --ratio 0.3 --minutes 60
    """
    local_path(model)
    from billhook.cli.console import loading, out, progress

    with loading():
        from billhook.recovery.forecast import forecast
        from billhook.reports import records
    with progress() as tick:
        opens = {"device": device, "family_row": family_row}
        found = forecast(model, ratio, minutes, seq_len=seq_len, seconds=seconds, tick=tick, **opens)
    if json:
        typer.echo(records.to_json(found), nl=False)
        return
    speed, taught = found["training_tokens_per_second"], found["teacher_tokens_per_second"]
    out.print(
        f"{model} cut by {ratio:.0%} has {found['parameters']:,} parameters. On {found['device']}, in {found['precision']}, it "
        f"trains {speed:,.0f} tokens a second and its teacher answers {taught:,.0f}: {minutes:g} minutes buy "
        f"[bold]{found['tokens']:,} tokens[/], {found['tokens_per_parameter']:.2g} for each parameter, with the trials of three "
        "rates and the judging on held-out text.",
        soft_wrap=True,
    )
    fits = (
        "all but embeddings and head"
        if found["trainable"] == "decoder"
        else "adapters (lora), since that would not fit"
    )
    out.print(
        f"Training every parameter would take about {found['training_bytes'] / 2**30:,.1f} GiB besides activations, "
        f"{found['free_bytes'] / 2**30:,.1f} GiB are free: train {fits}.",
        soft_wrap=True,
    )
    out.print(f"{found['why'][:1].upper()}{found['why'][1:]}:\n", soft_wrap=True)
    for line in found["commands"]:
        out.print(f"  {line}", soft_wrap=True, highlight=False)


def _say(line: str) -> None:
    from billhook.cli.console import err

    err.print(f"billhook: {line}", soft_wrap=True)
