"""Commands that train, and say beforehand what training buys: recover, forecast."""

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from billhook.checkpoints.names import local_path
from billhook.choices import MEASURING_SECONDS, PRECISIONS, TRAINABLE
from billhook.cli.commands import app
from billhook.cli.options import (
    BUDGET,
    CALIBRATION,
    MACHINE,
    Device,
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
from billhook.recovery.settings import OBJECTIVES, STATES, STEPS, Recovery, recovery

TRAINING = "Training"
DEFAULT = Recovery.model_construct()


@app.command(name="recover")
def recover_command(
    model: Model,
    output: Output,
    teacher: Annotated[
        str, option(TRAINING, "the unpruned model, as MODEL; it answers once, to disk, and leaves", show_default=False)
    ] = "",
    tokens: Annotated[str | None, option(BUDGET, "how much to train on, like 500k or 2M", show_default=False)] = None,
    minutes: Annotated[float | None, option(BUDGET, "or: how long all of it may take", show_default=False)] = None,
    text: Annotated[
        list[str] | None,
        option(CALIBRATION, "text to train on; may be repeated: a broad mix harms least", show_default="demo"),
    ] = None,
    held_out: Annotated[
        list[str] | None,
        option(CALIBRATION, "text to judge by, better of another kind; may be repeated", show_default="demo"),
    ] = None,
    guard: Annotated[bool, option(CALIBRATION, "stop when a held-out text gets worse")] = DEFAULT.guard,
    objective: Annotated[
        str, option(TRAINING, "distill: the teacher's probabilities; ce: the text itself", names=OBJECTIVES)
    ] = DEFAULT.objective,
    trainable: Annotated[str, option(TRAINING, ", ".join(TRAINABLE), names=TRAINABLE)] = DEFAULT.trainable,
    states: Annotated[
        str, option(TRAINING, "align hidden states with the teacher's too: auto, on, off", names=STATES)
    ] = DEFAULT.states,
    lr: Annotated[str, option(TRAINING, "peak learning rate; auto: the best of three")] = "auto",
    batch_tokens: Annotated[
        str | None, option(TRAINING, "tokens in a step, over all processes", show_default=f"{STEPS} steps in all")
    ] = None,
    micro_batch: Annotated[int, option(TRAINING, "windows in one forward; the rest accumulates")] = DEFAULT.micro_batch,
    seq_len: SeqLen = DEFAULT.seq_len,
    warmup: Annotated[float, option(TRAINING, "share of the steps; a cosine to zero follows")] = DEFAULT.warmup,
    top_k: Annotated[
        int, option(TRAINING, "tokens whose teacher probability is kept; others count as one")
    ] = DEFAULT.top_k,
    rank: Annotated[int, option(TRAINING, "of lora's adapters; of spp: blocks of rows")] = DEFAULT.rank,
    keep_zeros: Annotated[
        bool | None,
        option(
            *(TRAINING, "of a sparse model: keep its zeros, or fill them; one must be said"),
            "--keep-zeros/--no-keep-zeros",
            show_default=False,
        ),
    ] = DEFAULT.keep_zeros,
    dropout: Annotated[bool, option(TRAINING, "train with the dropout of the model's config")] = DEFAULT.dropout,
    seed: Annotated[int, option(TRAINING, "of the order of the windows")] = DEFAULT.seed,
    overwrite: Overwrite = False,
    json: Json = False,
    lessons: Annotated[
        Path | None,
        option(
            *(MACHINE, "folder for the teacher's answers, which other runs may share"),
            show_default="beside OUT, deleted at the end",
        ),
    ] = None,
    precision: Annotated[str, option(MACHINE, ", ".join(PRECISIONS), names=PRECISIONS)] = DEFAULT.precision,
    device: Device = DEFAULT.device,
    fresh: Fresh = False,
) -> None:
    """Train a pruned MODEL back, by distillation or on text; write OUT, reload it and compare.

    A run that was cut off goes on with the same command.  `accelerate launch -m billhook recover …` uses many processes.

    Example: billhook recover smaller --teacher demo --tokens 500k --text wiki.txt -o healed
    """
    given = {name: value for name, value in locals().items() if name in Recovery.model_fields}
    texts = {"text": tuple(text or DEFAULT.text), "held_out": tuple(held_out or DEFAULT.held_out)}
    chosen, started = recovery(**{**given, **texts}), time.perf_counter()
    output = check_free_of(model, output, overwrite)
    from billhook.cli.console import err, going_on, loading, out, progress

    with loading():
        from accelerate import PartialState

        from billhook.checkpoints.clients import check
        from billhook.recovery.recover import Recovered, recover
        from billhook.recovery.setup import on_cpu
        from billhook.reports import records, terminal
        from billhook.runtime import atomic, run_folder
        from billhook.runtime.progress import quiet
    check.check_startable()
    work = unfinished(output)

    def train(tick: Any) -> Recovered:
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
        typer.echo(records.to_json(found.report), nl=False)
        return
    if why := found.healing["stopped"]:
        err.print(f"billhook: stopped early: {why}", soft_wrap=True)
    out.print(terminal.summary_table(found.report, f"{model}, recovered"))
    out.print(f"{time.perf_counter() - started:.0f} s; written and reload-verified: {output}", soft_wrap=True)


@app.command(name="forecast")
def forecast_command(
    model: Model,
    ratio: Annotated[float, option(BUDGET, "share of the decoder to remove", show_default=False)],
    minutes: Annotated[float, option(BUDGET, "to train in", min=0.1, show_default=False)],
    seq_len: SeqLen = DEFAULT.seq_len,
    seconds: Annotated[float, option(MACHINE, "to measure this machine for", min=1)] = MEASURING_SECONDS,
    device: Device = DEFAULT.device,
    json: Json = False,
) -> None:
    """Measure how fast this machine trains, say how many tokens the minutes buy, and print the commands that it calls for.

    Example: billhook forecast demo --ratio 0.3 --minutes 60
    """
    local_path(model)
    from billhook.cli.console import loading, out, progress

    with loading():
        from billhook.recovery.forecast import forecast
        from billhook.reports import records
    with progress() as tick:
        found = forecast(model, ratio, minutes, seq_len=seq_len, seconds=seconds, device=device, tick=tick)
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
