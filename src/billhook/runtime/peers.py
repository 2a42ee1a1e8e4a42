"""Processes that `accelerate launch` started for one command.

Each does the same work, but for its share of what takes long; the first alone writes.
"""

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from accelerate import PartialState
from torch import Tensor, distributed

Item = TypeVar("Item")


@dataclass(frozen=True)
class Peers:
    """A process among those of one command.  What they do together, all of them have to do, in the same order."""

    number: int = 0  # of this process, from 0
    count: int = 1
    device: str = "cpu"  # where tensors are exchanged

    @property
    def first(self) -> bool:
        return self.number == 0

    def share(self, items: Sequence[Item]) -> Sequence[Item]:
        """This process's share of some items."""
        return items[self.number :: self.count]

    def wait(self) -> None:
        """Go on when all processes are here."""
        if self.count > 1:
            distributed.barrier()

    def agree(self, tensors: Iterable[Tensor]) -> None:
        """Give tensors the values that they have in the first process, in place."""
        self._exchange(list(tensors), lambda flat: distributed.broadcast(flat, 0))

    def add(self, tensors: Iterable[Tensor]) -> None:
        """Give tensors the sums of their values in all processes, in place."""
        self._exchange(list(tensors), distributed.all_reduce)

    @torch.no_grad()
    def _exchange(self, tensors: Sequence[Tensor], exchange: Callable[[Tensor], object]) -> None:
        """All tensors in one row of float64, which holds each value that they have."""
        if self.count == 1:
            return
        flat = torch.cat([tensor.flatten().to(self.device, torch.float64) for tensor in tensors])
        exchange(flat)
        for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))


ALONE = Peers()


def launched(on_cpu: Callable[[], bool]) -> Peers:
    """This process among those that were started with it.

    Args:
        on_cpu: says whether they compute on the CPU, though there be accelerators.
    """
    if "LOCAL_RANK" not in os.environ:
        return ALONE
    process = PartialState(cpu=on_cpu())
    return Peers(process.process_index, process.num_processes, str(process.device))
