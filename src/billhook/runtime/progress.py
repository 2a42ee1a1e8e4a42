"""Progress of long work: a callback for steps done, a clock for the time of each stage."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

Tick = Callable[[str, int, int], None]  # called with the stage, the steps done, and all steps
T = TypeVar("T")


def quiet(stage: str, done: int, total: int) -> None:
    """Report nothing."""


def unheard(line: str) -> None:
    """Announce nothing."""


def ticked(items: Sequence[T], stage: str, tick: Tick) -> Iterator[T]:
    """The items, one by one; `tick` is told how many are done."""
    for n, item in enumerate(items):
        tick(stage, n, len(items))
        yield item
    tick(stage, len(items), len(items))


class Clock:
    """Wall seconds by stage.  Time in a stage inside another counts for the inner one alone."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._open: list[str] = []
        self._last = 0.0

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        self._charge()
        self._open.append(stage)
        try:
            yield
        finally:
            self._charge()
            self._open.pop()

    def _charge(self) -> None:
        now = time.perf_counter()
        if self._open:
            self.seconds[self._open[-1]] = self.seconds.get(self._open[-1], 0.0) + now - self._last
        self._last = now


def least_seconds(act: Callable[[], Any], repeats: int = 3) -> float:
    """The least of some runs, the first not counted."""
    act()
    found = []
    for _ in range(repeats):
        started = time.perf_counter()
        act()
        found.append(time.perf_counter() - started)
    return min(found)
