"""The command line: parse, call, print.  Bad input prints one line and leaves with exit code 2."""

import os
import signal
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, NoReturn, cast

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from billhook import atomic, budget, checkpoint, data, demo, evaluate, report
from billhook.errors import BillhookError
from billhook.families import FAMILIES, KINDS
from billhook.methods import METHODS
from billhook.observe import STREAMS
from billhook.progress import Tick
from billhook.recipe import Recipe, check_out, measure, prune, read_recipe, recipe
from billhook.scores import SCORES

app = typer.Typer(
    name="billhook",
    help="Prune a Hugging Face causal language model into a smaller, faster, stock checkpoint.\n\n"
    "MODEL is a folder, a hub id (owner/name), a .gguf file, or 'demo' (SmolLM2-135M-Instruct). Start with: billhook demo",
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
# typer brings a click of its own or the real one, by version; both derive every parse error from one class
UsageError = cast(type[typer.BadParameter], typer.BadParameter.__mro__[1])
out, err = Console(), Console(stderr=True)

INTERRUPTED = 130


def _choice(names: Iterable[str], text: str) -> Any:
    """An option that the shell completes from `names`; a wrong value is refused later, with the nearest name."""
    return typer.Option(help=text, autocompletion=lambda: list(names))


DEFAULT = Recipe(ratio=0.2)
Model = Annotated[
    str, typer.Argument(help="a folder, a hub id (owner/name), a .gguf file, or 'demo'", show_default=False)
]
Json = Annotated[bool, typer.Option("--json", help="print JSON instead of tables")]
Device = Annotated[str, typer.Option(help="auto (an accelerator if there is one), cpu, cuda, mps, …")]
Dtype = Annotated[
    str,
    _choice(
        ("auto", *checkpoint.DTYPES),
        "to compute in: auto (float32 on a CPU, else the checkpoint's), float32, bfloat16, float16",
    ),
]
SeqLen = Annotated[int, typer.Option(help="tokens in a window")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="replace OUT if billhook wrote it")]


@app.command(name="prune")
def prune_command(
    model: Model,
    output: Annotated[Path, typer.Option("--output", "-o", help="folder to write", show_default=False)],
    ratio: Annotated[
        float,
        typer.Option(help="share of the decoder layers' parameters to remove, between 0 and 1", show_default=False),
    ],
    method: Annotated[
        str, typer.Option(help=f"one of: {', '.join(METHODS)} (see 'billhook methods')")
    ] = DEFAULT.method,
    axes: Annotated[
        str, _choice(KINDS, "what to prune, comma-separated: ffn, heads, groups; empty: the method's own")
    ] = "",
    score: Annotated[str, _choice(SCORES, f"one of: {', '.join(SCORES)}")] = DEFAULT.score,
    stream: Annotated[str, _choice(STREAMS, f"whose activations a layer sees: {', '.join(STREAMS)}")] = DEFAULT.stream,
    damping: Annotated[float, typer.Option(help="ridge, as a share of the Gram's mean diagonal")] = DEFAULT.damping,
    restoration: Annotated[bool, typer.Option(help="repair the kept weights by least squares")] = DEFAULT.restoration,
    correction: Annotated[
        float, typer.Option(help="share of the error of the layers before that a restoration makes up (dense_target)")
    ] = DEFAULT.correction,
    calibration: Annotated[
        str,
        typer.Option(
            help="text file, .jsonl with a 'text' field, folder of either, hub data set name[:config[:split]], or demo"
        ),
    ] = DEFAULT.calibration,
    samples: Annotated[int, typer.Option(help="windows of calibration text")] = DEFAULT.samples,
    seq_len: SeqLen = DEFAULT.seq_len,
    seed: Annotated[int, typer.Option(help="which windows are drawn")] = DEFAULT.seed,
    multiple_of: Annotated[
        int, typer.Option(help="round FFN widths to multiples of this; kernels like 32 and more")
    ] = DEFAULT.multiple_of,
    device: Device = DEFAULT.device,
    dtype: Dtype = DEFAULT.dtype,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Prune MODEL once, without training; write OUT, reload it with stock transformers and compare.

    Example: billhook prune demo --ratio 0.2 -o smaller
    """
    chosen = recipe(
        method=method,
        ratio=ratio,
        axes=tuple(axes.replace(",", " ").split()),
        score=score,
        stream=stream,
        damping=damping,
        restoration=restoration,
        correction=correction,
        calibration=calibration,
        samples=samples,
        seq_len=seq_len,
        seed=seed,
        multiple_of=multiple_of,
        device=device,
        dtype=dtype,
    )
    found = _prune_to(model, chosen, output, overwrite)
    if json:
        typer.echo(report.to_json(found), nl=False)
    else:
        out.print(report.summary_table(found, f"{model}, pruned by {method}"))
        out.print(f"written and reload-verified: {output}", soft_wrap=True)


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
    with _progress() as tick:
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
            _check_positions(one, seq_len)
        subjects = [evaluate.Subject(one.name, one.model, one.tokenizer, _disk_bytes(one)) for one in opened]
        found = evaluate.side_by_side(subjects, texts, seq_len, windows, tick)
    if json == Path("-"):
        typer.echo(report.to_json({"models": found}), nl=False)
        return
    if json:
        atomic.write_text(json, report.to_json({"models": found}))
    _print_measures(found)
    out.print(f"{time.perf_counter() - started:.0f} s")


@app.command(name="inspect")
def inspect_command(model: Model, json: Json = False) -> None:
    """Show what MODEL is made of and what can be pruned, without loading its weights."""
    with _progress() as tick:
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
            [f"{row['units']:,}", f"{row['parameters_per_unit']:,}", f"{row['share_of_decoder']:.1%}"]
            if row["units"]
            else ["—"] * 3
        )
        table.add_row(row["axis"], KINDS[row["axis"]], *cells)
    out.print(table)
    for row in found["axes"]:
        if row["refused"]:
            out.print(f"[bold]{row['axis']}[/]: {row['refused']}")


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
            f"  needs:  {method.needs}\n  scores: {', '.join(SCORES)}; streams: {', '.join(STREAMS)}\n  note:   {method.note}"
        )
    out.print(f"families: {', '.join(FAMILIES)}")


@app.command(name="run")
def run_command(
    path: Annotated[
        Path,
        typer.Argument(
            metavar="RECIPE", help="a YAML recipe: model, settings, and expected numbers", show_default=False
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="folder to write", show_default=False)],
    check: Annotated[
        bool, typer.Option("--check", help="evaluate the result and compare with the recipe's expected numbers")
    ] = False,
    overwrite: Overwrite = False,
) -> None:
    """Prune by a recipe file.

    Example: billhook run recipes/fasp-smollm2-20.yaml -o smaller --check
    """
    file = read_recipe(path)
    found = _prune_to(file.model, file.recipe, output, overwrite)
    out.print(report.summary_table(found, f"{file.model}, pruned by {path}"))
    if not check:
        return
    with _progress() as tick:
        measured = measure(output, file.recipe, tick)
    expected, tolerance = file.expect.get("numbers", {}), file.expect.get("tolerance", 0.0)
    table = Table("", "expected", "measured", title=f"within {tolerance:.1%}?", title_justify="left")
    for name, value in measured.items():
        table.add_row(name, f"{expected.get(name, '—')}", f"{value:,.3f}")
    out.print(table)
    wrong = [
        name
        for name, value in expected.items()
        if name not in measured or abs(measured[name] - value) > tolerance * value
    ]
    if wrong:
        raise BillhookError(f"{path}: not within {tolerance:.1%} of what is expected: {', '.join(wrong)}")


@app.command(name="demo")
def demo_command(json: Json = False) -> None:
    """Prune a fifth of SmolLM2-135M's decoder and show what it cost: two wheels are fetched on the first run."""
    started = time.perf_counter()
    result_folder = demo.cache_folder() / "demo-fasp-20"
    chosen = recipe(ratio=0.2, samples=32)
    found = _prune_to("demo", chosen, result_folder, overwrite=True)
    if not json:
        out.print(report.summary_table(found, "SmolLM2-135M-Instruct, a fifth of its decoder pruned by FASP"))
    with _progress() as tick:
        texts = data.evaluation_texts(["demo"], tick)
        subjects = []
        for name, where in (("dense", "demo"), ("pruned", str(result_folder))):
            opened = checkpoint.open_model(where, tick=tick)
            subjects.append(evaluate.Subject(name, opened.model, opened.tokenizer, _disk_bytes(opened)))
        measured = evaluate.side_by_side(subjects, texts, chosen.seq_len, max_windows=24, tick=tick)
    if json:
        typer.echo(report.to_json({"prune": found, "models": measured}), nl=False)
        return
    _print_measures(measured)
    out.print(
        f"{time.perf_counter() - started:.0f} s in all. The pruned model, a stock checkpoint: {result_folder}",
        soft_wrap=True,
    )


def _show_version(wanted: bool | None) -> None:
    if wanted:
        typer.echo(f"billhook {version('billhook')}")
        raise typer.Exit


@app.callback()
def _top(
    show_version: Annotated[
        bool | None,
        typer.Option("--version", callback=_show_version, is_eager=True, help="print the version and leave"),
    ] = None,
) -> None:
    """What every command shares."""


def main() -> NoReturn:
    """Entry point: exit code 0, 2 for bad input with one line on standard error, 130 for Ctrl-C."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that temporary folders go, as with Ctrl-C
    try:
        code = app(sys.argv[1:] or ["--help"], standalone_mode=False) or 0
    except BillhookError as error:
        _fail(str(error))
    except OSError as error:
        _fail(f"{error.filename}: {error.strerror}" if error.filename else str(error))
    except UsageError as error:
        _fail(error.format_message())
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    if code == INTERRUPTED:  # newer typers turn Ctrl-C into this code without a word
        typer.echo("billhook: interrupted; nothing half-written was left", err=True)
    sys.exit(code)


def _fail(message: str) -> NoReturn:
    typer.echo("billhook: error: " + " ".join(message.split()), err=True)
    sys.exit(2)


def _prune_to(model: str, chosen: Recipe, output: Path, overwrite: bool) -> dict[str, Any]:
    """Prune into a folder that is reserved before the work starts, so that an unwritable place costs no time."""
    output, source = Path(os.path.expanduser(output)), Path(os.path.expanduser(model))
    if not source.exists():
        source = None
    check_out(output, source, overwrite)
    with _progress() as tick, atomic.folder(output, overwrite) as work:
        result = prune(model, tick=tick, **chosen.model_dump())
        result.write(work, tick)
    return result.report


def _print_measures(found: list[dict[str, Any]]) -> None:
    out.print(report.measure_table(found, "dense and pruned" if len(found) > 1 else found[0]["name"]))
    out.print(report.text_table(found))


def _check_positions(opened: checkpoint.Opened, seq_len: int) -> None:
    limit = getattr(opened.model.config, "max_position_embeddings", seq_len)
    if seq_len > limit:
        raise BillhookError(f"seq-len {seq_len} is beyond the {limit} positions of {opened.name}: lower --seq-len")


def _disk_bytes(opened: checkpoint.Opened) -> int | None:
    return sum(f.stat().st_size for f in opened.folder.glob("*.safetensors")) if opened.folder else None


def _fingerprint(tokenizer: Any) -> int:
    return hash(frozenset(tokenizer.get_vocab().items()))


@contextmanager
def _progress() -> Iterator[Tick]:
    """A progress bar on standard error for each stage, with the time left."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=err, disable=not err.is_terminal) as bars:
        tasks: dict[str, TaskID] = {}

        def tick(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total)
            bars.update(tasks[stage], completed=min(done, total), total=total)

        yield tick
