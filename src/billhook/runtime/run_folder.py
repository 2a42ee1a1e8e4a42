"""A folder that keeps long work belongs to one run, described in run.json, and one process at a time works in it."""

import json
import logging
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from billhook.errors import BillhookError
from billhook.runtime import atomic
from billhook.runtime.documents import read_object
from billhook.runtime.locks import alone
from billhook.runtime.signals import cleanup_on_signal, signals_deferred

LOG = logging.getLogger("billhook")
NAME = "run.json"
CHANGEABLE = {"device"}  # settings that may change when a run is continued
REMOVED = {"removed": True}  # content of run.json while the folder is emptied: an interrupted removal is continued
SWAP_FOLDER = "pages"  # folder in a run's folder: offloaded weights that were edited, useless to another process
_locked = set[tuple[int, str]]()  # (process, folder): a forked process has a copy of this set


@contextmanager
def locked(work: Path | None) -> Iterator[None]:
    """Lock a run's folder while open.  It is made if it is missing, and removed if it stays empty.

    Raises:
        BillhookError: another process works in the folder; it holds files of no run; it cannot be made.
    """
    if work is None or (key := (os.getpid(), os.path.realpath(work))) in _locked:
        yield
        return
    check(work)
    missing = [path for path in (work, *work.parents) if not path.exists()]
    with cleanup_on_signal(lambda: atomic.remove_empty(missing)), ExitStack() as stack:
        try:
            work.parent.mkdir(parents=True, exist_ok=True)
            lock, _ = stack.enter_context(alone(work))
        except OSError as error:
            raise BillhookError(f"cannot write {work}: {error.strerror or error}") from error
        if lock == "taken":
            raise BillhookError(f"another command works in {work}: wait until it has ended")
        if lock == "unknown":
            LOG.warning(
                "%s: its file system has no locks: start no other command that works there until this one has ended",
                work,
            )
        stack.callback(atomic.remove_empty, missing)  # called before the lock is released
        _locked.add(key)
        stack.callback(_locked.remove, key)
        yield


def check(work: Path) -> None:
    """Raise BillhookError if a folder cannot become a run's folder."""
    atomic.check_name(work)
    if not os.path.lexists(work) or (work / NAME).exists():
        return
    # hidden files may be those of a run that was killed as it claimed the folder
    if not work.is_dir() or not all(atomic.is_hidden(path) for path in work.iterdir()):
        raise BillhookError(f"{work} is not a run's folder, and would become one: remove it, or choose another output")


def claim(work: Path, key: dict[str, Any], fresh: bool, keep: Sequence[str] = ()) -> None:
    """Make `work` the folder of the run that `key` describes, unless it is already.

    Args:
        fresh: empty the folder first, whatever run it belongs to; files named in `keep` stay.

    Raises:
        BillhookError: the folder belongs to another run; names the settings that differ.
    """
    check(work)
    path = work / NAME
    if path.exists() and (fresh or _half_removed(work)):
        _empty(work, keep)
    elif path.exists() and (differing := sorted(_differing(_read_key(path), key))):
        raise BillhookError(
            f"{work} holds an unfinished run that differs in {', '.join(differing)}: repeat its own command, or start "
            "over with --fresh"
        )
    work.mkdir(parents=True, exist_ok=True)
    atomic.write_text(path, json.dumps(key) + "\n")


def remove(work: Path) -> None:
    """Remove a run's folder; if that is interrupted, the rest is recognised as one that is being removed."""
    with suppress(OSError, BillhookError), locked(work), signals_deferred():
        if (work / NAME).exists():
            _empty(work)
            (work / NAME).unlink()
        work.rmdir()  # files of no run stay, and with them the folder


def begun(work: Path) -> bool:
    """Whether a run's folder holds anything that another process could continue from."""
    if not (work / NAME).exists() or _half_removed(work):
        return False
    return any(
        any(path.iterdir()) if path.is_dir() else path.suffix != ".partial"
        for path in work.iterdir()
        if path.name not in (NAME, SWAP_FOLDER) and not atomic.is_hidden(path)
    )


def _half_removed(work: Path) -> bool:
    """Whether a process was killed while it emptied a run's folder."""
    with suppress(BillhookError, FileNotFoundError):
        return _read_key(work / NAME) == REMOVED
    return False


def _empty(work: Path, keep: Sequence[str] = ()) -> None:
    """Remove everything in a run's folder but run.json and what is named in `keep`."""
    with signals_deferred():
        atomic.write_text(work / NAME, json.dumps(REMOVED) + "\n")
        for path in work.iterdir():
            if path.name not in (*keep, NAME):
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def _read_key(path: Path) -> dict[str, Any]:
    return read_object(path, str(path), "start over with --fresh")


def _differing(known: dict[str, Any], key: dict[str, Any]) -> set[str]:
    before, now = ({**settings, **_settings(settings), "settings": None} for settings in (known, key))
    return {name for name in before.keys() | now.keys() if before.get(name) != now.get(name)} - CHANGEABLE


def _settings(key: dict[str, Any]) -> dict[str, Any]:
    settings = key.get("settings")
    return settings if isinstance(settings, dict) else {}
