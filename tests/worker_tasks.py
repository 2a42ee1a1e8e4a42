"""What workers do in the tests of crews: importable where they are."""

import os
import signal
from pathlib import Path

from billhook.errors import BillhookError

kept: dict[str, int] = {}


def prepare(start: int) -> None:
    kept["start"] = start


def add(step: int, item: int) -> int:
    return kept["start"] + step * item


def fail(item: int) -> int:
    raise BillhookError(f"item {item} cannot work")


def die_once(folder: str, item: int) -> int:
    """The first to come dies as of kill -9."""
    if item == 1 and not (Path(folder) / "dead").exists():
        (Path(folder) / "dead").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return kept["start"] + item
