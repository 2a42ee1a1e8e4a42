"""What the commands share: the app, the consoles, common options, and the progress bar."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
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

from billhook import checkpoint, report
from billhook.progress import Tick

app = typer.Typer(
    name="billhook",
    help="Prune a Hugging Face causal language model into a smaller, faster checkpoint.\n\n"
    "MODEL is a folder, a hub id (owner/name), a .gguf file, or 'demo' (SmolLM2-135M-Instruct). Start with: billhook demo",
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
out, err = Console(), Console(stderr=True)


def choice(names: Iterable[str], text: str) -> Any:
    """An option that the shell completes from `names`; a wrong value is refused later, with the nearest name."""
    return typer.Option(help=text, autocompletion=lambda: list(names))


Model = Annotated[
    str, typer.Argument(help="a folder, a hub id (owner/name), a .gguf file, or 'demo'", show_default=False)
]
Json = Annotated[bool, typer.Option("--json", help="print JSON instead of tables")]
Device = Annotated[str, typer.Option(help="auto (an accelerator if there is one), cpu, cuda, mps, …")]
Dtype = Annotated[
    str,
    choice(
        ("auto", *checkpoint.DTYPES),
        "to compute in: auto (float32 on a CPU, else the checkpoint's), float32, bfloat16, float16",
    ),
]
SeqLen = Annotated[int, typer.Option(help="tokens in a window")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="replace OUT if billhook wrote it")]


def print_measures(found: list[dict[str, Any]]) -> None:
    out.print(report.measure_table(found, "dense and pruned" if len(found) > 1 else found[0]["name"]))
    out.print(report.text_table(found))


def disk_bytes(opened: checkpoint.Opened) -> int | None:
    return sum(f.stat().st_size for f in opened.folder.glob("*.safetensors")) if opened.folder else None


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
    with Progress(*columns, console=err, disable=not err.is_terminal) as bars:
        tasks: dict[str, TaskID] = {}

        def tick(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total)
            bars.update(tasks[stage], completed=min(done, total), total=total)

        yield tick
