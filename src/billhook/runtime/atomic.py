"""Outputs appear whole or not at all: they are written to a temporary sibling, synced to the disk, then renamed."""

import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from itertools import count
from pathlib import Path

from billhook.errors import BillhookError
from billhook.runtime.locks import Lock, alone, locked
from billhook.runtime.renaming import exchanged, rename_where_free
from billhook.runtime.signals import cleanup_on_signal, signals_deferred

MARK = "billhook.json"  # a file in every folder that billhook writes; --overwrite replaces no other folders
LONGEST = "model-00001-of-00001.safetensors"  # about the longest name inside an output
SHOWN = 150  # a longer path is shown by this many characters of both its ends


def check_name(out: Path) -> None:
    """Raise BillhookError if `out` cannot name an output, or is too long for the names of its hidden siblings."""
    shown = str(out).encode(errors="backslashreplace").decode()
    shown = shown if len(shown) <= 2 * SHOWN else f"{shown[:SHOWN]}…{shown[-SHOWN:]}"
    if out.name in ("", ".."):
        raise BillhookError(f"output {shown!r} is no name of its own: write one")
    try:
        str(out).encode()
    except UnicodeEncodeError:
        raise BillhookError(f"cannot write {shown}: its name is not UTF-8: choose another output") from None
    try:
        with suppress(FileNotFoundError):
            out.stat()  # a link that leads to itself
        longest = hidden(out.resolve(), "partial") / LONGEST
        above = next(path for path in longest.parents if path.exists())
        for path in (longest, *(above / name for name in longest.relative_to(above).parts)):
            with suppress(FileNotFoundError):
                path.lstat()
    except OSError as error:
        raise BillhookError(f"cannot write {shown}: {error.strerror or error}") from error


def check_free(out: Path, overwrite: bool) -> None:
    """Raise BillhookError if writing the folder `out` would destroy something, or its name cannot be used."""
    check_name(out)
    _bring_back(out)
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
    """A hidden sibling of `out` that becomes `out` when the context ends without an error, and is removed otherwise.

    Raises:
        BillhookError: `out` is taken or cannot be written, another command is writing it, or the disk is full; nothing
            is left behind.  If `out` was taken meanwhile, the work is left under another name, which the message says.
    """
    check_free(out, overwrite)
    out = out.resolve()  # a link stays a link, and the temporary sibling is on the disk that it leads to
    with _beside(out) as (work, lock):
        if lock != "ours":
            raise BillhookError(_why_not(work, out, lock))
        if out.exists():
            _remove(hidden(out, "old"))
        yield work
        with _explaining(out):  # renaming fails for a mount point, for one
            for path in [*work.rglob("*"), work]:
                _settle(path)
            work.chmod(0o777 & ~_umask())
            with signals_deferred():
                _put(work, out, overwrite)


def hidden(out: Path, what: str) -> Path:
    """The path beside an output of its unfinished version (`partial`), or of the version that it replaces (`old`)."""
    return out.with_name(f".{out.name}.billhook.{what}")


def is_hidden(path: Path) -> bool:
    """Whether a path is a hidden sibling of any output."""
    return path.match(".*.billhook.*")


@contextmanager
def _beside(out: Path) -> Iterator[tuple[Path, Lock]]:
    """Yield the folder for the unfinished version of `out`, and its lock; it is empty if the lock is "ours".

    Contents that a killed process left are removed first.  Afterwards the folder is removed unless it was renamed, and
    so are parents that were made for it, if they are empty.
    """
    parents = [parent for parent in out.parents if not parent.exists()]
    work, owned = hidden(out, "partial"), list[os.stat_result]()

    def undo() -> None:
        with suppress(OSError):
            if owned and os.path.samestat(owned[0], work.stat()):
                shutil.rmtree(work, ignore_errors=True)
        remove_empty(parents)

    try:
        with cleanup_on_signal(undo), ExitStack() as stack:
            with signals_deferred():
                with _explaining(out, ""):
                    out.parent.mkdir(parents=True, exist_ok=True)
                    lock, created = stack.enter_context(alone(work, 0o700))
                if created and lock == "unknown":  # a folder just made is no other command's
                    lock = "ours"
                if lock == "ours":
                    owned.append(work.stat())
            stack.callback(undo)  # called before the lock is released
            if owned:
                for content in work.iterdir():
                    _remove(content)
            yield work, lock
    except BaseException as error:
        if not owned:
            _remove_unused(work)
            remove_empty(parents)
        if full := disk_full(error):
            raise BillhookError(f"cannot write {out}: {full}; nothing half-written was left") from error
        raise


@contextmanager
def _explaining(out: Path, more: str = "; nothing half-written was left") -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise BillhookError(f"cannot write {out}: {error.strerror or error}{more}") from error


def _why_not(work: Path, out: Path, lock: Lock) -> str:
    if lock == "taken":
        return f"another command is writing {out}: wait until it has ended, or choose another output"
    return (
        f"{work} is there, and its file system has no locks to tell whether another command is writing {out}: "
        "remove it if none is"
    )


def _put(work: Path, out: Path, overwrite: bool) -> None:
    """Rename `work` to `out`, so that `out` exists at every moment; the old version is removed afterwards.

    Raises:
        BillhookError: `out` came into being since the work began; the work is left under another name.
    """
    try:
        check_free(out, overwrite)
        if out.is_dir() and any(out.iterdir()):
            _replace(work, out)
        else:
            work.rename(out)  # `out` is missing or an empty folder
    except BillhookError:
        raise _in_the_way(work, out) from None
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise _in_the_way(work, out) from error
        raise
    _settle(out.parent)


def _replace(work: Path, out: Path) -> None:
    with locked(out):  # so that no other command removes it while it has its hidden name
        if exchanged(work, out):
            old = work
        else:
            old = hidden(out, "old")
            out.rename(old)
            try:
                work.rename(out)
            except BaseException:
                old.rename(out)
                raise
        _settle(out.parent)
        _remove(old)


def _in_the_way(work: Path, out: Path) -> BillhookError:
    return BillhookError(f"{out} was made by something else meanwhile: the finished output is in {_spare(work, out)}")


def _spare(work: Path, out: Path) -> Path:
    """Rename `work` to the next free name beside `out`, and return that."""
    for n in count(1):
        with suppress(FileExistsError):
            free = out.with_name(f"{out.name}.{n}")
            rename_where_free(work, free)
            return free
    raise AssertionError


def _bring_back(out: Path) -> None:
    """Rename an old version back if a process was killed after it hid that and before it put the new one in place."""
    out = out.resolve()
    old = hidden(out, "old")
    if old.is_dir() and not os.path.lexists(out):
        with suppress(OSError), locked(old) as lock:
            if lock != "taken":
                rename_where_free(old, out)


def _remove_unused(work: Path) -> None:
    """Remove a folder that no process has locked: an interrupt came as it was made."""
    with suppress(OSError), locked(work) as lock:
        if lock == "ours":
            shutil.rmtree(work)


def check_file(path: Path) -> None:
    """Raise BillhookError if `write_text` could not write to `path`: to be called before the work, not after it."""
    check_name(path)
    above = next(parent for parent in path.absolute().parents if parent.exists())
    if path.is_dir() or not above.is_dir() or not os.access(above, os.W_OK):
        why = os.strerror(errno.EISDIR if path.is_dir() else errno.EACCES if above.is_dir() else errno.ENOTDIR)
        raise BillhookError(f"cannot write {path}: {why}")


@contextmanager
def file(out: Path, overwrite: bool = True) -> Iterator[Path]:
    """A path in a temporary sibling folder;
    the file written there becomes `out` when the context ends without an error.

    Two processes may write the same file: each writes its own version, and the last one stays.

    Raises:
        BillhookError: the file cannot be written; or it must not be overwritten, and `out` was taken meanwhile: then
            the file is left under another name, which the message says.
    """
    check_file(out)
    out = out.resolve()  # a link stays a link
    with _explaining(out), _beside(out) as (work, lock), ExitStack() as stack:
        if lock != "ours":
            work = hidden(out, f"{secrets.token_hex(4)}.partial")
            stack.enter_context(cleanup_on_signal(lambda: _remove(work)))
            stack.callback(_remove, work)
            work.mkdir(mode=0o700)
        yield work / out.name
        if overwrite:
            rename(work / out.name, out)
            return
        _settle(work / out.name)
        try:
            rename_where_free(work / out.name, out)
        except FileExistsError:
            raise _in_the_way(work / out.name, out) from None
        _settle(out.parent)


def write_text(path: Path, text: str) -> None:
    """Write a text file that appears whole or not at all."""
    with file(path) as work:
        work.write_text(text, encoding="utf-8")


def rename(work: Path, to: Path) -> None:
    """Rename a file once its content is on the disk, so that no power loss leaves half of it under the new name."""
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


def _remove(path: Path) -> None:
    """Remove a file or folder, as far as possible; it may be missing."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def disk_full(error: BaseException) -> str:
    """The system's words if `error` is about the disk, or ''.

    Libraries written in Rust (tokenizers) raise errors of their own with the system's error code in the text.
    """
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO):
        return os.strerror(error.errno)
    codes = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    return next((os.strerror(code) for code in codes if f"os error {code}" in str(error)), "")


def remove_empty(folders: list[Path]) -> None:
    """Remove those of `folders` that are empty, in the order given: innermost first."""
    for path in folders:
        if path.is_dir() and not any(path.iterdir()):
            path.rmdir()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
