"""A folder that long work is kept in belongs to one run, and one process at a time works in it: what run it is, lies in run.json."""

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
ELSEWHERE = {"device"}  # settings that a run may go on with others of
REMOVED = {"removed": True}  # what lies there while all else goes, so that whoever comes next goes on with that
PAGES = "pages"  # folder in a run's folder: weights that it changed, where they stream, of no use to another process
_held = set[tuple[int, str]]()  # by which process: a forked one has a copy


@contextmanager
def locked(work: Path | None) -> Iterator[None]:
    """Have a run's folder to ourselves while open; it is made if it is not there, and goes if nothing came into it.

    Raises:
        BillhookError: another process works in it; it holds what no run has made; it cannot be made.
    """
    if work is None or (here := (os.getpid(), os.path.realpath(work))) in _held:
        yield
        return
    check(work)
    made = [one for one in (work, *work.parents) if not one.exists()]
    with cleanup_on_signal(lambda: atomic.remove_empty(made)), ExitStack() as stack:
        try:
            work.parent.mkdir(parents=True, exist_ok=True)
            lock, _ = stack.enter_context(alone(work))
        except OSError as error:
            raise BillhookError(f"cannot write {work}: {error.strerror or error}") from error
        if lock == "taken":
            raise BillhookError(f"another command works in {work}: wait until it has ended")
        if lock == "unknown":
            LOG.warning(
                "%s: its file system has no locks: let no other command work there until this one has ended", work
            )
        stack.callback(atomic.remove_empty, made)  # while it is locked
        _held.add(here)
        stack.callback(_held.remove, here)
        yield


def check(work: Path) -> None:
    """Raise BillhookError if a folder could not become a run's."""
    atomic.check_name(work)
    if not os.path.lexists(work) or (work / NAME).exists():
        return
    if not work.is_dir() or not all(atomic.is_hidden(one) for one in work.iterdir()):  # of one killed as it claimed
        raise BillhookError(f"{work} is not a run's folder, and would become one: remove it, or choose another output")


def claim(work: Path, key: dict[str, Any], fresh: bool, keep: Sequence[str] = ()) -> None:
    """Make `work` the folder of the run that `key` describes, or find that it is; `fresh` empties it of another's, but for `keep`.

    Raises:
        BillhookError: it is another's; says in what they differ.
    """
    check(work)
    path = work / NAME
    if path.exists() and (fresh or _goes(work)):
        _empty(work, keep)
    elif path.exists() and (differing := sorted(_differing(_known(path), key))):
        raise BillhookError(
            f"{work} holds an unfinished run that differs in {', '.join(differing)}: repeat its own command, or start "
            "over with --fresh"
        )
    work.mkdir(parents=True, exist_ok=True)
    atomic.write_text(path, json.dumps(key) + "\n")


def remove(work: Path) -> None:
    """Remove a run's folder; killed meanwhile, what is left of it is known as one that goes."""
    with suppress(OSError, BillhookError), locked(work), signals_deferred():
        if (work / NAME).exists():
            _empty(work)
            (work / NAME).unlink()
        work.rmdir()  # what no run made stays


def begun(work: Path) -> bool:
    """Whether a run's folder holds anything that another process could go on from."""
    if not (work / NAME).exists() or _goes(work):
        return False
    return any(
        any(one.iterdir()) if one.is_dir() else one.suffix != ".partial"
        for one in work.iterdir()
        if one.name not in (NAME, PAGES) and not atomic.is_hidden(one)
    )


def _goes(work: Path) -> bool:
    """Whether a process was killed as it removed what is in a run's folder."""
    with suppress(BillhookError, FileNotFoundError):
        return _known(work / NAME) == REMOVED
    return False


def _empty(work: Path, keep: Sequence[str] = ()) -> None:
    """Remove what is in a run's folder, all but its name."""
    with signals_deferred():
        atomic.write_text(work / NAME, json.dumps(REMOVED) + "\n")
        for one in work.iterdir():
            if one.name not in (*keep, NAME):
                shutil.rmtree(one) if one.is_dir() else one.unlink()


def _known(path: Path) -> dict[str, Any]:
    return read_object(path, str(path), "start over with --fresh")


def _differing(known: dict[str, Any], key: dict[str, Any]) -> set[str]:
    flat = [{**one, **_settings(one), "settings": None} for one in (known, key)]
    return {name for name in flat[0].keys() | flat[1].keys() if flat[0].get(name) != flat[1].get(name)} - ELSEWHERE


def _settings(key: dict[str, Any]) -> dict[str, Any]:
    found = key.get("settings")
    return found if isinstance(found, dict) else {}
