"""What workers do in the tests of crews: importable where they are."""

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

from billhook.errors import BillhookError


def prepare(start: int) -> int:
    return start


def add(start: int, step: int, item: int) -> int:
    return start + step * item


def pid(_: int, item: int) -> int:
    return os.getpid()


def fail(_: int, item: int) -> int:
    raise BillhookError(f"item {item} cannot work")


def die_once(start: int, folder: str, item: int) -> int:
    """The first to come dies as of kill -9."""
    if item == 1 and not (Path(folder) / "dead").exists():
        (Path(folder) / "dead").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return start + item


def die_midway(start: int, folder: str, item: int) -> Iterator[int]:
    """Three things, of which the first to come that far dies before the second."""
    for n in range(3):
        if item == 1 and n == 1 and not (Path(folder) / "dead").exists():
            (Path(folder) / "dead").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        yield start + 10 * item + n


def count_when_asked(_: int, folder: str, item: str) -> Iterator[str]:
    """Three things, each once the one before has a file."""
    for n in range(3):
        while n and not (Path(folder) / f"{item}{n - 1}").exists():
            time.sleep(0.01)
        yield f"{item}{n}"
