"""What a user gives a run: where it keeps things, whom it reports to, what it may take."""

import os
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path

from billhook.errors import SettingsError
from billhook.runtime.activations import Room
from billhook.runtime.peers import ALONE, Peers
from billhook.runtime.progress import Tick, quiet, unheard
from billhook.runtime.run import Run
from billhook.runtime.units import BYTES, amount
from billhook.runtime.workers import Workers


@dataclass(frozen=True)
class Means:
    """What a user gives a run."""

    tick: Tick = quiet  # called with (stage, steps done, all steps) as the work proceeds
    announce: Callable[[str], object] = unheard  # called with one line, what will be done, before anything is
    statistics: str | os.PathLike[str] | None = None  # folder that keeps what was measured, for other runs
    work: str | os.PathLike[str] | None = None  # folder of this run alone: after a kill the same call goes on there
    fresh: bool = False  # start over in that folder
    jobs: int = 1  # processes that share the work; each opens the model for itself
    ray: str = ""  # in their place the address of a Ray cluster (auto: of this machine)
    peers: Peers = ALONE  # processes that call this alike, with one `work`, and share what takes long
    hidden_budget: int | str | None = None  # bytes (or `2GB`) of hidden states to keep in memory, the rest in files

    @property
    def run(self) -> Run:
        """Raises BillhookError: an amount that is none; several processes without a folder that all of them see."""
        if self.peers.count > 1 and not self.work:
            raise SettingsError("peers: processes that work together exchange files: name one folder for all, as work")
        limit = amount(self.hidden_budget, BYTES, "hidden-budget")
        return Run(
            tick=self.tick,
            announce=self.announce,
            statistics=Path(self.statistics) if self.statistics else None,
            folder=Path(self.work) if self.work else None,
            fresh=self.fresh,
            workers=Workers(self.jobs, self.ray),
            peers=self.peers,
            hidden=Room(limit),
        )


MEANS = tuple(field.name for field in fields(Means))
