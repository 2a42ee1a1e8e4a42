"""Commands that look at models: evaluate, inspect."""

import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from billhook.checkpoints.names import local_path
from billhook.choices import KINDS, NEW_TOKENS, PARTS
from billhook.cli.commands import app
from billhook.cli.options import (
    Device,
    Dtype,
    FamilyRow,
    Json,
    JsonFile,
    Markdown,
    Model,
    Page,
    SeqLen,
    Stream,
    Texts,
    Windows,
    check_outputs,
    check_seq_len,
    command_line,
    counts,
    listed,
    option,
)
from billhook.errors import BillhookError, one_of

MEASURED = "What is measured"


@app.command(name="evaluate")
def evaluate_command(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL...", help="folders, hub ids (owner/name), .gguf files, or 'demo'", show_default=False
        ),
    ],
    against: Annotated[
        str | None, option(MEASURED, "the model that the others are compared with: the unpruned", show_default=False)
    ] = None,
    text: Texts = None,
    seq_len: SeqLen = 512,
    windows: Windows = None,
    tasks: Annotated[
        list[str] | None,
        option(MEASURED, "zero-shot task of lm-eval, a YAML file, or a folder; may be repeated", show_default=False),
    ] = None,
    limit: Annotated[int | None, option(MEASURED, "documents of each task, at most", min=1, show_default="all")] = None,
    batch_sizes: Annotated[str, option(MEASURED, "batch sizes to time, with commas; tasks take the largest")] = "1",
    context_lengths: Annotated[str, option(MEASURED, "prompt lengths to time, with commas")] = "512",
    prompts: Annotated[
        Path | None, option(MEASURED, "file of prompts to continue, one a line", show_default="five of billhook's own")
    ] = None,
    new_tokens: Annotated[int, option(MEASURED, "tokens of each continuation", min=1)] = NEW_TOKENS,
    parts: Annotated[
        str | None,
        option(
            *(MEASURED, f"what besides perplexity and tasks: {', '.join(PARTS)}, or none"),
            show_default="all; none of weights in files",
        ),
    ] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    family_row: FamilyRow = "",
    stream_weights: Stream = None,
    json: JsonFile = None,
    html: Page = None,
    markdown: Markdown = False,
) -> None:
    """Measure models side by side: size, perplexity, zero-shot tasks, speed, memory, and what they write.

    `accelerate launch -m billhook evaluate …` has many processes share the texts.

    Example: billhook evaluate smaller --against demo --text wiki.txt --report smaller.html
    """
    started, sizes = (
        time.perf_counter(),
        [counts(batch_sizes, "batch-sizes"), counts(context_lengths, "context-lengths")],
    )
    check_seq_len(seq_len)
    names = ([against] if against else []) + models
    check_outputs(json, html, *names)
    if len(set(names)) < len(names):
        raise BillhookError(f"{next(n for n in names if names.count(n) > 1)} is named twice")
    from billhook.cli.console import err, loading, out, progress

    with loading():
        from billhook import data
        from billhook.checkpoints import load
        from billhook.cli.work import print_measures
        from billhook.evaluation import side_by_side
        from billhook.evaluation.continuations import PROMPTS
        from billhook.recovery.setup import on_cpu
        from billhook.reports import records, tables
        from billhook.runtime.offload import is_offloaded
        from billhook.runtime.peers import launched
    peers = launched(partial(on_cpu, device))
    with progress(peers.first) as tick:
        wanted = tuple(one_of("part", one, PARTS) for one in listed(parts or "") if parts != "none")
        named = [name for one in tasks or () for name in listed(one)]
        scorer = _zero_shot(named, limit, max(sizes[0]), tick) if named else None
        asked = side_by_side.Measures(
            texts=data.evaluation_texts(text or ["demo"], tick),
            seq_len=seq_len,
            max_windows=windows,
            batch_sizes=sizes[0],
            contexts=sizes[1],
            prompts=side_by_side.read_prompts(prompts) if prompts else PROMPTS,
            new_tokens=new_tokens,
            tasks=scorer,
            parts=tuple(PARTS) if parts is None else wanted,
            peers=peers,
        )
        how = {"device": device, "dtype": dtype, "stream": stream_weights, "packed": True}
        load.use_row(family_row, names, tick)
        opened = [load.open_model(name, **how, tick=tick) for name in names]
        for one in opened:
            load.check_positions(one, seq_len)
        if parts is None and any(is_offloaded(one.model) for one in opened):
            asked = replace(asked, parts=())
        subjects = [side_by_side.Subject.of(one, label) for one, label in zip(opened, _labels(names), strict=True)]
        found = side_by_side.side_by_side(subjects, asked, bool(against), tick)
    if not peers.first:
        return
    cuts = [cut for one in opened if (cut := records.stored_cut(one.folder)) and one.name != against]
    written = records.assemble(
        "evaluate",
        " and ".join(one["name"] for one in found[bool(against) :])
        + (f" beside {found[0]['name']}" if against else ""),
        records.conditions(opened[0].model, command_line(), time.perf_counter() - started),
        models=found,
        reference=found[0]["name"] if against else None,
        cut=cuts[0] if len(cuts) == 1 else None,
    )
    if not side_by_side.same_tokenizer(found):
        err.print(
            "billhook: the tokenizers differ: perplexities per token do not compare, bits per byte do", soft_wrap=True
        )
    _save(written, json, html)
    if json == Path("-"):
        typer.echo(records.to_json(written), nl=False)
        return
    if markdown:
        typer.echo(tables.markdown(found), nl=False)
        return
    print_measures(found)
    if parts is None and not asked.parts:
        out.print("the weights stayed in their files: neither speed nor texts (--parts speed,texts)")
    out.print(f"{time.perf_counter() - started:.0f} s" + (f"; {html}" if html else ""))


def _save(written: dict[str, Any], json: Path | None, html: Path | None) -> None:
    """Write the record and its page where the user wants files of them."""
    from billhook.reports import page, records
    from billhook.runtime import atomic

    if json and json != Path("-"):
        atomic.write_text(json, records.to_json(written))
    if html:
        page.save(html, written)


def _labels(names: list[str]) -> list[str]:
    """What tables call models: of folders the last part of the path, where that tells them apart."""
    short = [Path(name).resolve().name if Path(name).is_dir() else name for name in names]
    return short if len(set(short)) == len(names) else names


def _zero_shot(names: list[str], limit: int | None, batch_size: int, tick: Any) -> Any:
    """What scores a model on tasks, which are known before a model is loaded; finished ones are kept."""
    from billhook import demo
    from billhook.evaluation import zeroshot
    from billhook.runtime.run import Run

    files = [str(file) for name in names if Path(name).is_dir() for file in sorted(Path(name).glob("*.yaml"))]
    given = files + [name for name in names if not Path(name).is_dir()]
    if not given:
        raise BillhookError(f"--tasks {' '.join(names)}: the folder holds no .yaml file")
    tasks, kept = zeroshot.load_tasks(given, tick), demo.cache_folder() / "results"
    how = {"limit": limit, "batch_size": batch_size}
    return lambda subject, tick: zeroshot.evaluate(
        subject.model, subject.tokenizer, tasks, **how, run=Run(tick, statistics=kept)
    )


@app.command(name="inspect")
def inspect_command(
    model: Model,
    family_row: FamilyRow = "",
    json: Json = False,
) -> None:
    """Show what MODEL is made of and what can be pruned, without loading its weights."""
    local_path(model)
    from rich.table import Table

    from billhook.cli.console import loading, out, progress

    with loading():
        from billhook.checkpoints import load
        from billhook.models import limits
        from billhook.reports import records
    with progress() as tick:
        skeleton = load.open_skeleton(model, tick, family_row)
    found = {"model": model, **limits.anatomy(skeleton)}
    if json:
        typer.echo(records.to_json(found), nl=False)
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
    if "places" in found["row"]:
        out.print(_row_table(found["row"], found["model_type"]))


def _row_table(row: dict[str, Any], model_type: str) -> Any:
    """A row that is not by hand: what it names, what was proved of it on a small model, and why the rest was not."""
    from rich.table import Table

    table = Table(
        "", "", show_header=False, title=f"row of {model_type}, by {row['by']}, proved on a small random model"
    )
    for name, value in row["places"].items():
        table.add_row(name, value if isinstance(value, str) else ", ".join(value))
    table.add_row("config keys", ", ".join(f"{size}: {key}" for size, key in row["keys"].items()) or "none")
    table.add_row("[bold]proved[/]", ", ".join(row["proved"]))
    table.add_row("by", row["laws"])
    for kinds, why in row["refused"].items():
        table.add_row("[bold]refused[/]", f"{kinds}: {why}")
    return table


def _span(units: int | list[int]) -> str:
    """Units a layer: one number, or from the least to the most where layers differ."""
    return f"{units:,}" if isinstance(units, int) else f"{min(units):,}-{max(units):,}"
