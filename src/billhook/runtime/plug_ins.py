"""What other packages add to billhook, by the entry points that they declare: methods, scores, families.  Loads no torch.

[project.entry-points."billhook.methods"]
mine = "my_package:METHOD"
"""

import logging
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from billhook.errors import BillhookError, first_line

LOG = logging.getLogger("billhook")
GROUPS = ("methods", "scores", "families")


@cache
def names(group: str) -> tuple[str, ...]:
    """What other packages add to a group of `GROUPS`, by name."""
    return tuple(entry_points(group=f"billhook.{group}").names)


def load(group: str, name: str) -> Any:
    """What an entry point, or else a name like `module:function`, stands for.

    Raises:
        BillhookError: it cannot be imported.
    """
    if name in _given:
        return _given[name]
    found = tuple(entry_points(group=f"billhook.{group}", name=name))
    entry = found[0] if found else EntryPoint(name, name, f"billhook.{group}")
    try:
        return entry.load()
    except Exception as error:  # whatever code of another package raises
        raise BillhookError(f"{group[:-1]} {name}: {entry.value} cannot be loaded ({first_line(error)})") from error


def added(group: str, known: dict[str, Any]) -> dict[str, Any]:
    """The table `known` with what other packages add; what cannot be loaded, or has a name that is taken, is warned of."""
    table = dict(known)
    for name in names(group):
        if name in known:
            LOG.warning("%s %s of another package has the name of one of billhook's, and is left out", group[:-1], name)
            continue
        try:
            table[name] = load(group, name)
        except BillhookError as error:
            LOG.warning("%s", error)
    return table


def path_of(thing: Any) -> str:
    """The name `module:function` of a function that was given: this process knows it, others import it."""
    name = f"{thing.__module__}:{getattr(thing, '__qualname__', repr(thing))}"
    _given[name] = thing
    return name


_given: dict[str, Any] = {}  # functions that this process was given, by name
