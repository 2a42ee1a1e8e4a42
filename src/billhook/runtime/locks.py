"""Folders that one process at a time works in: a lock on the open folder, which ends with the process however that ends."""

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal

Lock = Literal["ours", "taken", "unknown"]  # unknown: the file system has no locks
TAKEN = {errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES}  # every other answer means that there are none here


@contextmanager
def locked(folder: Path) -> Iterator[Lock]:
    """Lock a folder while open, if no other process has.  No child process inherits the lock.

    Raises:
        OSError: there is no such folder, or it cannot be read.
    """
    own = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield _lock(own)
    finally:
        os.close(own)


@contextmanager
def alone(folder: Path, mode: int = 0o777) -> Iterator[tuple[Lock, bool]]:
    """The same of a folder that is made if it is not there: the lock, of the one that has the name, and whether it was made.

    Raises:
        OSError: it cannot be made or read.
    """
    while True:
        made = False
        with suppress(FileExistsError):
            folder.mkdir(mode)
            made = True
        with suppress(FileNotFoundError):  # gone meanwhile, with the process that had it
            own = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
            lock = _lock(own)
            if lock == "taken" or _is_at(own, folder):
                break
            os.close(own)
    try:
        yield lock, made
    finally:
        os.close(own)


def _lock(own: int) -> Lock:
    try:
        fcntl.flock(own, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return "taken" if error.errno in TAKEN else "unknown"
    return "ours"


def _is_at(own: int, folder: Path) -> bool:
    """Whether an open folder is still the one that has the name."""
    return os.path.samestat(os.fstat(own), folder.stat())
