"""What commands share before they work: common options, and checks of what needs no model.  Loads no torch."""

import os
import shlex
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

from billhook.checkpoints.names import local_path
from billhook.choices import DTYPES, FAMILY_ROW
from billhook.errors import BillhookError
from billhook.runtime import atomic
from billhook.runtime.outputs import check_apart, check_out

BUDGET, METHOD, TRAINING, CALIBRATION, LAYOUT, OUTPUT, MACHINE = (
    "Budget",
    "Method",
    "Training",
    "Calibration",
    "Layout",
    "Output",
    "Machine",
)  # headings of help


def option(heading: str, text: str, *flags: str, names: Iterable[str] = (), **more: Any) -> Any:
    """An option under a heading of help.

    The shell completes it from `names`; a wrong value is refused later, with the nearest name.
    """
    if names:
        more["autocompletion"] = lambda: list(names)
    return typer.Option(*flags, help=text, rich_help_panel=heading, **more)


Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", help="a folder, a hub id (owner/name), a .gguf file, or 'demo'", show_default=False
    ),
]
Output = Annotated[Path, option(OUTPUT, "folder to write", "--output", "-o", show_default=False)]
Overwrite = Annotated[bool, option(OUTPUT, "replace OUT if billhook wrote it", "--overwrite")]
Json = Annotated[bool, option(OUTPUT, "print JSON instead of tables", "--json")]
JsonFile = Annotated[
    Path | None, option(OUTPUT, "write every number to this file ('-' for standard output)", show_default=False)
]
Markdown = Annotated[bool, option(OUTPUT, "print the table as Markdown, for a model card", "--markdown")]
Page = Annotated[
    Path | None,
    option(OUTPUT, "write a page to this .html file, its numbers beside it", "--report", show_default=False),
]


SeqLen = Annotated[int, option(CALIBRATION, "tokens in a window")]
Texts = Annotated[
    list[str] | None,
    option(CALIBRATION, "text to score, as for --calibration; may be repeated", "--text", show_default="demo"),
]
Windows = Annotated[
    int | None, option(CALIBRATION, "score at most this many windows of each text", min=1, show_default="all")
]

Device = Annotated[str, option(MACHINE, "auto (an accelerator if there is one), cpu, cuda, mps, …")]
Dtype = Annotated[str, option(MACHINE, f"to compute in: auto, {', '.join(DTYPES)}", names=("auto", *DTYPES))]
FamilyRow = Annotated[str, option(MACHINE, FAMILY_ROW, show_default="derived")]
Stream = Annotated[
    bool | None,
    option(
        *(MACHINE, "leave the weights in their files, one layer at a time in memory"),
        "--stream-weights/--no-stream-weights",
        show_default="above 80 % of memory",
    ),
]
Jobs = Annotated[int, option(MACHINE, "processes that share the work", min=1)]
Ray = Annotated[
    str,
    option(MACHINE, "in place of --jobs: a Ray cluster's HOST:PORT, or auto (extra: ray)", show_default=False),
]
Fresh = Annotated[bool, option(MACHINE, "start over where a run was cut off", "--fresh")]


def started_together() -> bool:
    """Whether `accelerate launch` (or torchrun) has started this process and others, to share the work."""
    return os.environ.get("WORLD_SIZE", "1") != "1"


def unfinished(output: Path) -> Path:
    """The folder beside an output that keeps what a run that was cut off needs to go on."""
    output = Path(os.path.expanduser(output))
    return output.with_name(output.name + ".unfinished")


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
    for model in models:
        local_path(model)


def check_free_of(model: str, output: Path, overwrite: bool) -> Path:
    """The output folder, which may be written and is not the model's own; what MODEL cannot be is refused, too."""
    output, source = Path(os.path.expanduser(output)), Path(os.path.expanduser(model))
    check_out(output, source if source.exists() else None, overwrite)
    local_path(model)
    return output
