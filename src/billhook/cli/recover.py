"""Commands that train, and say beforehand what training buys: recover, forecast."""

import os
import time
from pathlib import Path
from typing import Annotated

import typer
from accelerate import PartialState

from billhook.checkpoints.clients import check
from billhook.checkpoints.publish import check_out
from billhook.choices import PRECISIONS, TRAINABLE
from billhook.cli.commands import app
from billhook.cli.options import (
    Device,
    Json,
    Model,
    Output,
    Overwrite,
    SeqLen,
    choice,
    err,
    going_on,
    out,
    progress,
    unfinished,
)
from billhook.recovery.forecast import SECONDS, forecast
from billhook.recovery.recover import Recovered, recover
from billhook.recovery.settings import OBJECTIVES, STATES, STEPS, Recovery, recovery
from billhook.recovery.setup import on_cpu
from billhook.reports import records, terminal
from billhook.runtime import atomic, run_folder
from billhook.runtime.progress import Tick, quiet

DEFAULT = Recovery(teacher="demo", tokens=1)


@app.command(name="recover")
def recover_command(
    model: Model,
    output: Output,
    teacher: Annotated[
        str, typer.Option(help="the unpruned model, as MODEL; it answers once, to disk, and leaves", show_default=False)
    ] = "",
    tokens: Annotated[
        str | None, typer.Option(help="how much to train on, like 500k or 2M", show_default=False)
    ] = None,
    minutes: Annotated[
        float | None, typer.Option(help="instead of tokens: how long all of it may take", show_default=False)
    ] = None,
    text: Annotated[
        list[str] | None,
        typer.Option(
            help="text to train on: file, .jsonl, folder, hub data set or demo; may be repeated: a broad mix harms least",
            show_default="demo",
        ),
    ] = None,
    held_out: Annotated[
        list[str] | None,
        typer.Option(
            help="text to judge by, better of another kind: if it gets worse, training stops; may be repeated",
            show_default="demo",
        ),
    ] = None,
    objective: Annotated[
        str, choice(OBJECTIVES, "; ".join(f"{k}: {v}" for k, v in OBJECTIVES.items()))
    ] = DEFAULT.objective,
    trainable: Annotated[
        str, choice(TRAINABLE, "; ".join(f"{k}: {v}" for k, v in TRAINABLE.items()))
    ] = DEFAULT.trainable,
    states: Annotated[
        str, choice(STATES, "distill: " + "; ".join(f"{k}: {v}" for k, v in STATES.items()))
    ] = DEFAULT.states,
    lr: Annotated[
        str, typer.Option(help="peak learning rate; auto: the best of three, each tried for 2% of the steps")
    ] = "auto",
    batch_tokens: Annotated[
        str | None, typer.Option(help="tokens in a step, over all processes", show_default=f"{STEPS} steps in all")
    ] = None,
    micro_batch: Annotated[
        int, typer.Option(help="windows in one forward; the rest accumulates")
    ] = DEFAULT.micro_batch,
    seq_len: SeqLen = DEFAULT.seq_len,
    warmup: Annotated[float, typer.Option(help="share of the steps; a cosine to zero follows")] = DEFAULT.warmup,
    top_k: Annotated[
        int, typer.Option(help="tokens of which the teacher's probability is kept; the others count as one")
    ] = DEFAULT.top_k,
    rank: Annotated[int, typer.Option(help="of lora's adapters; of spp: blocks of rows")] = DEFAULT.rank,
    keep_zeros: Annotated[
        bool | None,
        typer.Option(
            "--keep-zeros/--no-keep-zeros",
            help="of a model pruned by a mask (unstructured, 2:4): keep every zero weight of the decoder exactly zero, or let "
            "training fill them, which gives a dense model again; a sparse model is refused until one of the two is given",
            show_default=False,
        ),
    ] = DEFAULT.keep_zeros,
    dropout: Annotated[
        bool, typer.Option(help="train with the dropout that the model's config asks for, if any; a teacher has none")
    ] = DEFAULT.dropout,
    guard: Annotated[bool, typer.Option(help="stop when a held-out text gets worse")] = DEFAULT.guard,
    lessons: Annotated[
        Path | None,
        typer.Option(
            help="folder for the teacher's answers, which other runs may share (1 KB a token)",
            show_default="beside OUT, deleted at the end",
        ),
    ] = None,
    precision: Annotated[
        str, choice(PRECISIONS, "; ".join(f"{k}: {v}" for k, v in PRECISIONS.items()))
    ] = DEFAULT.precision,
    device: Device = DEFAULT.device,
    seed: Annotated[int, typer.Option(help="of the order of the windows")] = DEFAULT.seed,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="start over where a run was cut off; the teacher's answers stay")
    ] = False,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Train a pruned MODEL back, by distillation or on text; write OUT, reload it and compare.

    A run that was cut off goes on with the same command.  `accelerate launch -m billhook recover …` uses many processes.

    Example: billhook recover smaller --teacher demo --tokens 500k --text wiki.txt -o healed
    """
    started = time.perf_counter()
    chosen = recovery(
        teacher=teacher,
        tokens=tokens,
        minutes=minutes,
        text=tuple(text or DEFAULT.text),
        held_out=tuple(held_out or DEFAULT.held_out),
        objective=objective,
        trainable=trainable,
        states=states,
        lr=lr,
        batch_tokens=batch_tokens,
        micro_batch=micro_batch,
        seq_len=seq_len,
        warmup=warmup,
        top_k=top_k,
        rank=rank,
        keep_zeros=keep_zeros,
        dropout=dropout,
        guard=guard,
        precision=precision,
        device=device,
        seed=seed,
    )
    output, source = Path(os.path.expanduser(output)), Path(os.path.expanduser(model))
    check_out(output, source if source.exists() else None, overwrite)
    check.check_startable()
    work = unfinished(output)

    def train(tick: Tick) -> Recovered:
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
    ratio: Annotated[float, typer.Option(help="share of the decoder to remove", show_default=False)],
    minutes: Annotated[float, typer.Option(min=0.1, help="to train in", show_default=False)],
    seq_len: SeqLen = DEFAULT.seq_len,
    seconds: Annotated[float, typer.Option(min=1, help="to measure this machine for")] = SECONDS,
    device: Device = DEFAULT.device,
    json: Json = False,
) -> None:
    """Measure how fast this machine trains, say how many tokens the minutes buy, and print the commands that it calls for.

    Example: billhook forecast demo --ratio 0.3 --minutes 60
    """
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
    err.print(f"billhook: {line}", soft_wrap=True)
