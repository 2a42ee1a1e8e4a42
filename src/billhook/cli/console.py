"""What a command shows while it works:
the consoles, a spinner while libraries load, progress bars, what is left of a run."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

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

from billhook.runtime import run_folder, signals
from billhook.runtime.progress import Tick

out, err = Console(), Console(stderr=True)
SLOW = "torch"  # what takes seconds to import brings it


@contextmanager
def loading() -> Iterator[None]:
    """Say that libraries are loading, on a terminal, the first time that they do."""
    waits = err.is_terminal and SLOW not in sys.modules
    with (
        signals.cleanup_on_signal(_show_cursor),
        err.status("loading torch and transformers") if waits else nullcontext(),
    ):
        yield


@contextmanager
def progress(shown: bool = True) -> Iterator[Tick]:
    """A progress bar on standard error for each stage, with the time left, if that is a terminal."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    bars = Progress(*columns, console=err, disable=not (shown and err.is_terminal))
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


@contextmanager
def going_on(work: Path) -> Iterator[None]:
    """Have the folder of a run that goes on where it was cut off.

    Whatever ends the run, what is there is said, and no empty folder stays.
    """
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
            if message := left():
                say(f"billhook: {message}")
            clear()
            raise


def say(line: str) -> None:
    """A line to whoever looks at the terminal."""
    if err.is_terminal:
        err.print(line, soft_wrap=True)
