"""What the commands share: the consoles, common options, and the progress bar."""

import os
import shlex
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

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

from billhook.checkpoints import load
from billhook.checkpoints.clients import check
from billhook.checkpoints.publish import check_apart, check_out
from billhook.errors import BillhookError
from billhook.pruning.prune import prune
from billhook.pruning.recipe import Recipe
from billhook.pruning.result import Result
from billhook.reports import tables, terminal
from billhook.runtime import atomic, run_folder, signals
from billhook.runtime.progress import Tick

out, err = Console(), Console(stderr=True)
WARN_AS_BYTES = 0.05  # share of the calibration text's characters
WARN_GROWTH = (
    0.02  # share of its tokens: at 1, 3 and 9 % SmolLM2 read other text 2, 8 and 20 % worse per byte (docs/LOG.md)
)


def choice(names: Iterable[str], text: str) -> Any:
    """An option that the shell completes from `names`; a wrong value is refused later, with the nearest name."""
    return typer.Option(help=text, autocompletion=lambda: list(names))


Model = Annotated[
    str, typer.Argument(help="a folder, a hub id (owner/name), a .gguf file, or 'demo'", show_default=False)
]
Output = Annotated[Path, typer.Option("--output", "-o", help="folder to write", show_default=False)]
Ratio = Annotated[
    float | None,
    typer.Option(help="share of the decoder layers' parameters to remove, between 0 and 1", show_default=False),
]
Rotate = Annotated[
    bool | None,
    typer.Option(
        "--rotate/--no-rotate",
        help="slicegpt: turn the residual stream to its principal axes first, which unties a tied head",
        show_default="slicegpt alone does",
    ),
]
Params = Annotated[
    str | None,
    typer.Option(help="instead of a ratio: parameters the whole model may have, like 100M", show_default=False),
]
Json = Annotated[bool, typer.Option("--json", help="print JSON instead of tables")]
Device = Annotated[str, typer.Option(help="auto (an accelerator if there is one), cpu, cuda, mps, …")]
Dtype = Annotated[
    str,
    choice(
        ("auto", *load.DTYPES),
        "to compute in: auto (float32 on a CPU, else the checkpoint's), float32, bfloat16, float16",
    ),
]
Stream = Annotated[
    bool | None,
    typer.Option(
        "--stream-weights/--no-stream-weights",
        help="leave the weights in their files, one decoder layer at a time in memory",
        show_default="where the model would take more than 80 % of the free memory",
    ),
]
Ray = Annotated[
    str,
    typer.Option(
        help="instead of --jobs: a Ray cluster's HOST:PORT, or auto for this machine's; every machine has billhook and the model "
        "(extra: ray)",
        show_default=False,
    ),
]
Fresh = Annotated[bool, typer.Option("--fresh", help="start over where a prune was cut off")]
SeqLen = Annotated[int, typer.Option(help="tokens in a window")]
Texts = Annotated[
    list[str] | None,
    typer.Option("--text", help="text to score, as for --calibration; may be repeated", show_default="demo"),
]
Windows = Annotated[
    int | None, typer.Option(min=1, help="score at most this many windows of each text", show_default="all")
]
Page = Annotated[
    Path | None,
    typer.Option(
        "--report", help="write a page for people to this .html file, its numbers beside it", show_default=False
    ),
]
JsonFile = Annotated[
    Path | None, typer.Option(help="write every number to this file ('-' for standard output)", show_default=False)
]
Markdown = Annotated[bool, typer.Option("--markdown", help="print the table as Markdown, for a model card")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="replace OUT if billhook wrote it")]


def unfinished(output: Path) -> Path:
    """The folder beside an output that keeps what a run that was cut off needs to go on."""
    output = Path(os.path.expanduser(output))
    return output.with_name(output.name + ".unfinished")


def print_measures(found: list[dict[str, Any]]) -> None:
    """The table of `evaluate`, and what each model writes."""
    names = " and ".join(one["name"] for one in found)
    out.print(terminal.table(names, tables.comparison_header(found), tables.comparison_rows(found)))
    if found[0].get("prompts"):
        out.print(terminal.text_table(found))


def command_line() -> str:
    """What the user typed."""
    return shlex.join(["billhook", *sys.argv[1:]])


def counts(text: str, name: str) -> tuple[int, ...]:
    """`1,8` as numbers."""
    try:
        found = tuple(int(part) for part in listed(text))
    except ValueError:
        found = ()
    if not found or min(found) < 1:
        raise BillhookError(f"--{name} {text!r}: write whole numbers from 1 up, with commas")
    return tuple(dict.fromkeys(found))


def listed(text: str) -> list[str]:
    """What stands between commas or blanks."""
    return text.replace(",", " ").split()


def check_seq_len(seq_len: int) -> None:
    if seq_len < 2:
        raise BillhookError(f"seq-len {seq_len}: a window needs at least 2 tokens")


def check_outputs(json: Path | None, html: Path | None, *models: str) -> None:
    """Refuse, before the work, files that could not be written after it, or would be among a model's own."""
    if html and html.suffix not in (".html", ".htm"):
        raise BillhookError(f"--report {html}: name a file that ends in .html")
    for path in (json if json != Path("-") else None, html, html and html.with_suffix(".json")):
        if path:
            for model in models:
                check_apart(path, Path(os.path.expanduser(model)))
            atomic.check_file(path)


@contextmanager
def progress() -> Iterator[Tick]:
    """A progress bar on standard error for each stage, with the time left."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    bars = Progress(*columns, console=err, disable=not err.is_terminal)
    with signals.cleanup_on_signal(_show_cursor), bars:
        tasks: dict[str, TaskID] = {}

        def tick(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total)
            bars.update(tasks[stage], completed=min(done, total), total=total)

        yield tick


def _show_cursor() -> None:
    """A bar hides it; rich's own way waits for a thread that may wait for this one."""
    if err.is_terminal:
        os.write(2, b"\x1b[?25h\n")


def check_free_of(model: str, output: Path, overwrite: bool) -> Path:
    """The output folder, which may be written and is not the model's own."""
    output, source = Path(os.path.expanduser(output)), Path(os.path.expanduser(model))
    check_out(output, source if source.exists() else None, overwrite)
    return output


def prune_to(model: str, chosen: Recipe, output: Path, overwrite: bool, **means: Any) -> Result:
    """Prune into a folder that is reserved before the work starts, so that an unwritable place costs no time."""
    output = check_free_of(model, output, overwrite)
    check.check_startable()
    kept = unfinished(output)
    with atomic.folder(output, overwrite) as work, going_on(means.get("study") or kept), progress() as tick:
        result = prune(model, tick=tick, announce=_say, work=kept, **means, **chosen.model_dump())
        result.write(work, tick)
    if result.kept or means.get("study") == kept:
        run_folder.remove(kept)
    if cut := result.report["vocabulary"]:
        _warn_of_vocabulary(cut)
    return result


@contextmanager
def going_on(work: Path) -> Iterator[None]:
    """Have the folder of a run that goes on where it was cut off; whatever ends it, what is there is said, and nothing stays if nothing is."""
    new = not work.exists()

    def left() -> str:
        return (
            f"what was done is in {work}: the same command goes on, --fresh starts over"
            if run_folder.begun(work)
            else ""
        )

    def clear() -> None:
        if new and not run_folder.begun(work):
            run_folder.remove(work)

    with run_folder.locked(work), signals.cleanup_on_signal(clear), signals.message_on_signal(left):
        try:
            yield
        except BaseException:
            if said := left():
                _say(f"billhook: {said}")
            clear()
            raise


def _warn_of_vocabulary(cut: dict[str, Any]) -> None:
    if cut["calibration_as_bytes"] > WARN_AS_BYTES:
        share = f"{cut['calibration_as_bytes']:.0%} of the calibration text becomes single bytes"
        err.print(f"billhook: warning: {share}: --vocab-from is of another script", soft_wrap=True)
    elif cut["calibration_grows"] > WARN_GROWTH:
        share = f"the calibration text becomes {cut['calibration_grows']:.0%} more tokens, which the model reads worse"
        err.print(f"billhook: warning: {share}: give --vocab-from more text, or raise --vocab-size", soft_wrap=True)


def _say(line: str) -> None:
    if err.is_terminal:
        err.print(line, soft_wrap=True)
