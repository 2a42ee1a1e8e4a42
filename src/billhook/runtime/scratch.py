"""One temporary folder for all that a process writes in passing, as large as a model where weights stream: it goes with the process.

After a kill it goes with the next command, which tells by the lock that no process has it any more.
"""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from billhook.runtime.locks import locked
from billhook.runtime.signals import cleanup_on_signal, signals_deferred

PREFIX = "billhook-"
MARK = ".billhook"  # a file in each that was locked once


@contextmanager
def scratch() -> Iterator[None]:
    """Have Python's temporary files and folders in one folder while open."""
    before, root = tempfile.tempdir, Path(tempfile.gettempdir())
    for left in root.glob(f"{PREFIX}*"):
        _sweep(left)
    made = list[Path]()

    def clear() -> None:
        tempfile.tempdir = before
        for own in made:
            shutil.rmtree(own, ignore_errors=True)

    with cleanup_on_signal(clear), ExitStack() as stack:
        with suppress(OSError), signals_deferred():  # as full as it may be: not every command needs one
            made.append(Path(tempfile.mkdtemp(prefix=PREFIX, dir=root)))
            stack.callback(clear)
            stack.enter_context(locked(made[0]))
            (made[0] / MARK).touch()
            tempfile.tempdir = str(made[0])
        yield


def _sweep(left: Path) -> None:
    """Remove what a process that was killed has left: ours, marked, and locked by no one."""
    with suppress(OSError):
        if left.lstat().st_uid != os.getuid() or not (left / MARK).is_file():
            return
        with locked(left) as lock:
            if lock == "ours":
                shutil.rmtree(left)
