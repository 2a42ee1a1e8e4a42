"""Outputs appear whole or not at all: a temporary sibling, on the disk, then a rename."""

import errno
import fcntl
import glob
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from billhook.errors import BillhookError

FRESH = 10.0  # seconds in which a folder may not be locked yet
MARK = "billhook.json"  # every folder billhook writes holds one; --overwrite replaces nothing else


def check_free(out: Path, overwrite: bool) -> None:
    """Raise BillhookError if writing the folder `out` would destroy something."""
    if not out.exists() and not out.is_symlink():
        return
    if not out.is_dir():
        raise BillhookError(f"{out} exists and is not a folder: choose another output")
    if any(out.iterdir()):
        if not overwrite:
            raise BillhookError(f"{out} exists and is not empty: choose another output, or pass --overwrite")
        if not (out / MARK).exists():
            raise BillhookError(
                f"{out} was not written by billhook (no {MARK}): --overwrite will not replace it, remove it yourself"
            )


@contextmanager
def folder(out: Path, overwrite: bool = False) -> Iterator[Path]:
    """A temporary sibling of `out` that becomes `out` when the context ends well, and vanishes when it does not.

    Raises:
        BillhookError: `out` is taken or cannot be written, or the disk is full; nothing is left behind.
    """
    check_free(out, overwrite)
    out = out.resolve()  # a link stays a link; the temporary sibling is on the disk that the link leads to
    made = [parent for parent in out.parents if not parent.exists()]
    # named before it is made: an interrupt between the two would leave it
    work = out.with_name(f".{out.name}.{secrets.token_hex(4)}.partial")
    try:
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            for left in out.parent.glob(partial(out.name)):
                _remove_abandoned(left)
            work.mkdir(mode=0o700)
        except OSError as error:
            raise BillhookError(f"cannot write {out}: {error.strerror or error}") from error
        with _locked(work):
            yield work
            try:
                _put(work, out)
            except OSError as error:  # a mount point, say
                raise BillhookError(
                    f"cannot write {out}: {error.strerror or error}; nothing half-written was left"
                ) from error
    except BaseException as error:
        shutil.rmtree(work, ignore_errors=True)
        remove_empty(made)
        if full := disk_full(error):
            raise BillhookError(f"cannot write {out}: {full}; nothing half-written was left") from error
        raise


def partial(name: str) -> str:
    """The pattern of what an output of that name is called until it is whole."""
    return f".{glob.escape(name)}.*.partial"


@contextmanager
def _locked(work: Path) -> Iterator[bool]:
    """Lock a folder while open, as long as this process lives; whether it could be: another has it, or the file system has no locks."""
    own = os.open(work, os.O_RDONLY)
    try:
        fcntl.flock(own, fcntl.LOCK_EX | fcntl.LOCK_NB)
        free = True
    except OSError:
        free = False
    try:
        yield free
    finally:
        os.close(own)


def _remove_abandoned(work: Path) -> None:
    """Remove what a process that was killed has left half-written: it may be as large as a model."""
    with suppress(OSError), _locked(work) as free:  # or gone meanwhile
        if free and time.time() - work.stat().st_mtime > FRESH:
            shutil.rmtree(work)


def check_file(path: Path) -> None:
    """Raise BillhookError if `write_text` could not write there: before the work, not after it."""
    above = next(parent for parent in path.absolute().parents if parent.exists())
    if path.is_dir() or not above.is_dir() or not os.access(above, os.W_OK):
        why = os.strerror(errno.EISDIR if path.is_dir() else errno.EACCES if above.is_dir() else errno.ENOTDIR)
        raise BillhookError(f"cannot write {path}: {why}")


@contextmanager
def file(out: Path) -> Iterator[Path]:
    """A path in a temporary sibling folder; what is written there becomes `out` when the context ends well.

    Raises:
        BillhookError: nothing can be written there.
    """
    check_file(out)
    out = out.resolve()  # a link stays a link
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{out.name}.", suffix=".partial", dir=out.parent) as work:
            yield Path(work) / out.name
            rename(Path(work) / out.name, out)
    except OSError as error:
        raise BillhookError(f"cannot write {out}: {error.strerror or error}; nothing half-written was left") from error


def write_text(path: Path, text: str) -> None:
    """Write a text file that appears whole or not at all."""
    with file(path) as work:
        work.write_text(text, encoding="utf-8")


def rename(work: Path, to: Path) -> None:
    """Give a written file its name once its content is on the disk: no power loss leaves half of it under that."""
    _settle(work)
    work.replace(to)
    _settle(to.parent)


def _settle(path: Path) -> None:
    """Wait until a file's content, or the names in a folder, are on the disk."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def _put(work: Path, out: Path) -> None:
    """Rename `work` to `out`; what `out` held before goes only once the new is in place."""
    for path in [*work.rglob("*"), work]:
        _settle(path)
    work.chmod(0o777 & ~_umask())
    if not out.exists():
        work.rename(out)
        _settle(out.parent)
        return
    old = work.with_suffix(".old")
    out.rename(old)
    try:
        work.rename(out)
    except BaseException:
        old.rename(out)
        raise
    _settle(out.parent)
    shutil.rmtree(old)


def disk_full(error: BaseException) -> str:
    """What the disk said, if it was the disk.  What is written in Rust (tokenizers) wraps the system's error in a text of its own."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO):
        return os.strerror(error.errno)
    codes = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    return next((os.strerror(code) for code in codes if f"os error {code}" in str(error)), "")


def remove_empty(folders: list[Path]) -> None:
    """Remove those of `folders` that are empty, innermost first."""
    for path in folders:
        if path.is_dir() and not any(path.iterdir()):
            path.rmdir()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
