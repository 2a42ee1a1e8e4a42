"""What other packages add to billhook, by the entry points that they declare:
methods, scores, families.  Loads no torch.

[project.entry-points."billhook.methods"]
mine = "my_package:METHOD"
"""

import logging
import os
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from billhook.errors import BillhookError, first_line

LOG = logging.getLogger("billhook")
GROUPS = ("methods", "scores", "families")


@cache
def declared() -> bool:
    """Whether any package that is installed adds to billhook:
    importlib.metadata takes a tenth of a second to say so."""
    folders = [Path(place) for place in sys.path if os.path.isdir(place)]
    files = (file for folder in folders for file in folder.glob("*.*-info/entry_points.txt"))
    return any(b"[billhook." in file.read_bytes() for file in files)


def entries(group: str) -> Any:
    """What other packages add to a group of `GROUPS`."""
    if not declared():
        return ()
    from importlib.metadata import entry_points

    return entry_points(group=f"billhook.{group}")


@cache
def names(group: str) -> tuple[str, ...]:
    """The names of what other packages add to a group."""
    return tuple(entry.name for entry in entries(group))


def load(group: str, name: str) -> Any:
    """What an entry point, or else a name like `module:function`, stands for.

    Raises:
        BillhookError: it cannot be imported.
    """
    if name in _given:
        return _given[name]
    from importlib.metadata import EntryPoint

    named = [entry for entry in entries(group) if entry.name == name]
    entry = named[0] if named else EntryPoint(name, name, f"billhook.{group}")
    try:
        return entry.load()
    except Exception as error:  # whatever code of another package raises
        raise BillhookError(f"{group[:-1]} {name}: {entry.value} cannot be loaded ({first_line(error)})") from error


def sound(name: str, thing: Any) -> str:
    """Nothing is wrong."""
    return ""


def added(group: str, known: dict[str, Any], flaw: Callable[[str, Any], str] = sound) -> dict[str, Any]:
    """The table `known` with what other packages add; what cannot be taken is warned of.

    Args:
        flaw: what is wrong with a thing of a name, or ''.
    """
    table = dict(known)
    for name in names(group):
        if name in known:
            LOG.warning("%s %s of another package has the name of one of billhook's, and is left out", group[:-1], name)
            continue
        try:
            thing = load(group, name)
        except BillhookError as error:
            LOG.warning("%s", error)
            continue
        if why := flaw(name, thing):
            LOG.warning("%s %s of another package %s, and is left out", group[:-1], name, why)
        else:
            table[name] = thing
    return table


def path_of(thing: Any) -> str:
    """The name `module:function` of a function that was given: this process knows it, others import it."""
    name = f"{thing.__module__}:{getattr(thing, '__qualname__', repr(thing))}"
    _given[name] = thing
    return name


_given: dict[str, Any] = {}  # functions that this process was given, by name
