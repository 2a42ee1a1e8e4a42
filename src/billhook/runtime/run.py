"""What a run of long work reports to, keeps and shares: one value in place of many arguments.  It decides no result."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from billhook.runtime.activations import Room
from billhook.runtime.cache import Grams
from billhook.runtime.peers import ALONE, Peers
from billhook.runtime.progress import Clock, Tick, quiet, unheard
from billhook.runtime.workers import ONE_PROCESS, Workers


class Finished:
    """Layers that are done: none, and none is kept.  `billhook.checkpoints.resume` has those that a folder keeps."""

    def __init__(self, grams: Grams | None = None) -> None:
        self.records: dict[int, dict[str, Any]] = {}  # what became of each, by number
        self.grams = grams  # cache of the dense stream's Grams, shared with other runs

    @property
    def found(self) -> list[dict[str, Any]]:
        """What became of the finished layers, as their records say, in the order of layers."""
        return [cut for n in sorted(self.records) for cut in self.records[n]["found"]]

    def save(self, n: int, found: list[dict[str, Any]], drops: Any) -> None:
        """Keep layer n as it is now."""

    def once(self, name: str, make: Callable[[], Tensor]) -> Tensor:
        """What `make` gives, or gave when it was first asked for."""
        return make()

    def reload(self, n: int) -> None:
        """Give layer n the weights it had when it was finished."""
        raise KeyError(n)


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
    peers: Peers = ALONE  # processes that do the same, but for their shares of what takes long
    hidden: Room = field(default_factory=Room)  # where hidden states are kept between layers
    finished: Finished = field(default_factory=Finished)
