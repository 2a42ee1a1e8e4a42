"""What a run of long work reports to, keeps and shares: one value in place of many arguments.  It decides no result."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from billhook.runtime.activations import Room
from billhook.runtime.cache import Grams
from billhook.runtime.progress import Clock, Tick, quiet, unheard
from billhook.runtime.workers import ONE_PROCESS, Workers


class Finished(Protocol):
    """Layers that this run, or an earlier one of the same work, has finished (`billhook.checkpoints.resume`)."""

    records: dict[int, dict[str, Any]]  # what became of them, by number
    grams: Grams | None  # cache of the dense stream's Grams, shared with other runs

    @property
    def found(self) -> list[dict[str, Any]]: ...

    def save(self, n: int, found: list[dict[str, Any]], drops: Any) -> None:
        """Keep layer n as it is now."""
        ...

    def reload(self, n: int) -> None:
        """Give layer n the weights it had when it was finished."""
        ...


@dataclass(frozen=True)
class Run:
    """The means of one run.  `dataclasses.replace(run, tick=quiet)` is the same run with one of them changed."""

    tick: Tick = quiet  # called with (stage, steps done, all steps)
    announce: Callable[[str], object] = unheard  # called with one line, before the work that it describes
    clock: Clock = field(default_factory=Clock)  # wall seconds by stage
    statistics: Path | None = None  # folder of measurements, for other runs as well
    folder: Path | None = None  # folder of this run alone: after a kill it goes on there
    fresh: bool = False  # start over in that folder
    workers: Workers = ONE_PROCESS
    hidden: Room = field(default_factory=lambda: Room(float("inf")))  # where hidden states are kept between layers
    finished: Finished | None = None  # layers that are done, where a run keeps them
