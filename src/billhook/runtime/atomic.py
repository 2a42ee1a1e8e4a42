"""Outputs appear whole or not at all: a temporary sibling, on the disk, then a rename."""

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

MARK = "billhook.json"  # every folder billhook writes holds one; --overwrite replaces nothing else
LONGEST = "model-00001-of-00001.safetensors"  # of the names in an output, about
SHOWN = 150  # characters of either end of a path


def check_name(out: Path) -> None:
    """Raise BillhookError if `out` is no name for an output, or leaves no room for those of its hidden siblings."""
    said = str(out).encode(errors="backslashreplace").decode()
    said = said if len(said) <= 2 * SHOWN else f"{said[:SHOWN]}…{said[-SHOWN:]}"
    if out.name in ("", ".."):
        raise BillhookError(f"output {said!r} is no name of its own: write one")
    try:
        str(out).encode()
    except UnicodeEncodeError:
        raise BillhookError(f"cannot write {said}: its name is not UTF-8: choose another output") from None
    try:
        with suppress(FileNotFoundError):
            out.stat()  # a link that leads to itself
        longest = hidden(out.resolve(), "partial") / LONGEST
        above = next(one for one in longest.parents if one.exists())
        for one in (longest, *(above / name for name in longest.relative_to(above).parts)):
            with suppress(FileNotFoundError):
                one.lstat()
    except OSError as error:
        raise BillhookError(f"cannot write {said}: {error.strerror or error}") from error


def check_free(out: Path, overwrite: bool) -> None:
    """Raise BillhookError if writing the folder `out` would destroy something, or it is no name for one."""
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
    """A hidden sibling of `out` that becomes `out` when the context ends well, and vanishes when it does not.

    Raises:
        BillhookError: `out` is taken or cannot be written, another command is writing it, or the disk is full; nothing is left
            behind.  Or it was taken meanwhile: then the work has a name beside it, which is said.
    """
    check_free(out, overwrite)
    out = out.resolve()  # a link stays a link; the temporary sibling is on the disk that the link leads to
    with _beside(out) as (work, lock):
        if lock != "ours":
            raise BillhookError(_why_not(work, out, lock))
        if out.exists():
            _remove(hidden(out, "old"))
        yield work
        with _saying(out):  # a mount point, say
            for path in [*work.rglob("*"), work]:
                _settle(path)
            work.chmod(0o777 & ~_umask())
            with signals_deferred():
                _put(work, out, overwrite)


def hidden(out: Path, what: str) -> Path:
    """What stands beside an output while it is worked on: `partial`, the work; `old`, what it takes the place of."""
    return out.with_name(f".{out.name}.billhook.{what}")


def is_hidden(path: Path) -> bool:
    """Whether it is such a thing, of any output."""
    return path.match(".*.billhook.*")


@contextmanager
def _beside(out: Path) -> Iterator[tuple[Path, Lock]]:
    """A folder beside `out`, empty and ours alone if it could be had; it goes unless it got another name, and so do the parents that
    were made for it unless something is in them.

    What a process that was killed left in it goes first.
    """
    made = [parent for parent in out.parents if not parent.exists()]
    work, known = hidden(out, "partial"), list[os.stat_result]()

    def undo() -> None:
        with suppress(OSError):
            if known and os.path.samestat(known[0], work.stat()):
                shutil.rmtree(work, ignore_errors=True)
        remove_empty(made)

    try:
        with cleanup_on_signal(undo), ExitStack() as stack:
            with signals_deferred():
                with _saying(out, ""):
                    out.parent.mkdir(parents=True, exist_ok=True)
                    lock, new = stack.enter_context(alone(work, 0o700))
                if new and lock == "unknown":  # no one else can have made it
                    lock = "ours"
                if lock == "ours":
                    known.append(work.stat())
            stack.callback(undo)  # while it is locked
            if known:
                for left in work.iterdir():
                    _remove(left)
            yield work, lock
    except BaseException as error:
        if not known:
            _remove_unused(work)
            remove_empty(made)
        if full := disk_full(error):
            raise BillhookError(f"cannot write {out}: {full}; nothing half-written was left") from error
        raise


@contextmanager
def _saying(out: Path, more: str = "; nothing half-written was left") -> Iterator[None]:
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
    """Give `work` the name `out`, which at no moment stands for nothing; what it stood for before goes once the new is in place.

    Raises:
        BillhookError: something is there that was not when the work began; the work has another name.
    """
    try:
        check_free(out, overwrite)
        if out.is_dir() and any(out.iterdir()):
            _replace(work, out)
        else:
            work.rename(out)  # in place of nothing, or of an empty folder
    except BillhookError:
        raise _in_the_way(work, out) from None
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise _in_the_way(work, out) from error
        raise
    _settle(out.parent)


def _replace(work: Path, out: Path) -> None:
    with locked(out):  # whoever finds it under its hidden name leaves it
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
    return BillhookError(
        f"{out} came to be while this worked, and is not its own: what was to be there is whole in {_spare(work, out)}"
    )


def _spare(work: Path, out: Path) -> Path:
    """The next free name beside `out`, which `work` now has."""
    for n in count(1):
        with suppress(FileExistsError):
            found = out.with_name(f"{out.name}.{n}")
            rename_where_free(work, found)
            return found
    raise AssertionError


def _bring_back(out: Path) -> None:
    """Where a process was killed between taking an output's name from the old and giving it to the new: the old has it again."""
    out = out.resolve()
    old = hidden(out, "old")
    if old.is_dir() and not os.path.lexists(out):
        with suppress(OSError), locked(old) as lock:
            if lock != "taken":
                rename_where_free(old, out)


def _remove_unused(work: Path) -> None:
    """Remove a folder that no process has: an interrupt came as it was made."""
    with suppress(OSError), locked(work) as lock:
        if lock == "ours":
            shutil.rmtree(work)


def check_file(path: Path) -> None:
    """Raise BillhookError if `write_text` could not write there: before the work, not after it."""
    check_name(path)
    above = next(parent for parent in path.absolute().parents if parent.exists())
    if path.is_dir() or not above.is_dir() or not os.access(above, os.W_OK):
        why = os.strerror(errno.EISDIR if path.is_dir() else errno.EACCES if above.is_dir() else errno.ENOTDIR)
        raise BillhookError(f"cannot write {path}: {why}")


@contextmanager
def file(out: Path, overwrite: bool = True) -> Iterator[Path]:
    """A path in a temporary sibling folder; what is written there becomes `out` when the context ends well.

    Two processes may write the same one: each writes its own, and the last stays.

    Raises:
        BillhookError: nothing can be written there; or it is not to be overwritten, and was taken meanwhile: then what was
            written has a name beside it, which is said.
    """
    check_file(out)
    out = out.resolve()  # a link stays a link
    with _saying(out), _beside(out) as (work, lock), ExitStack() as stack:
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


def _remove(path: Path) -> None:
    """A file or folder, if it is there, and what of it can be removed."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


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
