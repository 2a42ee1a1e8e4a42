"""One folder for all temporary files of a process; with offloaded weights it is as large as a model.

It is removed when the process ends.  After a kill the next command removes it: its lock shows that no process has it.
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
MARK = ".billhook"  # file in every such folder that was ever locked


@contextmanager
def scratch() -> Iterator[None]:
    """While open, Python puts temporary files and folders into one folder."""
    before, root = tempfile.tempdir, Path(tempfile.gettempdir())
    for folder in root.glob(f"{PREFIX}*"):
        _sweep(folder)
    folders = list[Path]()

    def clear() -> None:
        tempfile.tempdir = before
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)

    with cleanup_on_signal(clear), ExitStack() as stack:
        with suppress(OSError), signals_deferred():  # not every command needs it, so a full disk is no error
            folders.append(Path(tempfile.mkdtemp(prefix=PREFIX, dir=root)))
            stack.callback(clear)
            stack.enter_context(locked(folders[0]))
            (folders[0] / MARK).touch()
            tempfile.tempdir = str(folders[0])
        yield


def _sweep(folder: Path) -> None:
    """Remove a killed process's folder: one that is this user's, has the mark, and is not locked."""
    with suppress(OSError):
        if folder.lstat().st_uid != os.getuid() or not (folder / MARK).is_file():
            return
        with locked(folder) as lock:
            if lock == "ours":
                shutil.rmtree(folder)
