"""Folders that one process at a time works in.

The lock is on the open folder, and ends with the process however that ends.
"""

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal

Lock = Literal["ours", "taken", "unknown"]  # "unknown": the file system has no locks
TAKEN = {errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES}  # any other error means that the file system has no locks


@contextmanager
def locked(folder: Path) -> Iterator[Lock]:
    """Lock a folder while open, unless another process has locked it.  Child processes do not inherit the lock.

    Raises:
        OSError: there is no such folder, or it cannot be read.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield _lock(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def alone(folder: Path, mode: int = 0o777) -> Iterator[tuple[Lock, bool]]:
    """As `locked`, of a folder that is made if it is missing: yields the lock, and whether the folder was made.

    Raises:
        OSError: the folder cannot be made or read.
    """
    while True:
        made = False
        with suppress(FileExistsError):
            folder.mkdir(mode)
            made = True
        with suppress(FileNotFoundError):  # the process that had it has removed it meanwhile
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
            lock = _lock(descriptor)
            if lock == "taken" or _is_at(descriptor, folder):
                break
            os.close(descriptor)
    try:
        yield lock, made
    finally:
        os.close(descriptor)


def _lock(descriptor: int) -> Lock:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return "taken" if error.errno in TAKEN else "unknown"
    return "ours"


def _is_at(descriptor: int, folder: Path) -> bool:
    """Whether an open folder is still the one that has the name."""
    return os.path.samestat(os.fstat(descriptor), folder.stat())
