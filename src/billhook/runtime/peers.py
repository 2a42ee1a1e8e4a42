"""Processes that `accelerate launch` started for one command.

Each does the same work, but for its share of what takes long; the first alone writes.

    for batch, sharing in peers.rounds(batches):     # one batch in each process
        for one in peers.every(sum_of(batch), sharing):
            total += one                             # in the order of the batches, however many processes there are
    losses = peers.joined([loss_of(one) for one in peers.share(windows)])
"""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from torch import Tensor, distributed

Item = TypeVar("Item")
PATIENCE = timedelta(days=30)  # that processes wait for each other: the first one looks alone, and opens files first


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

    def joined(self, mine: list[Any]) -> list[Any]:
        """One value for each item of all shares, in the order of the items, from those of this process's share."""
        if self.count == 1:
            return mine
        found: list[Any] = [None] * self.count
        distributed.all_gather_object(found, mine)
        return [found[n % self.count][n // self.count] for n in range(sum(map(len, found)))]

    def rounds(self, items: Sequence[Item]) -> Iterator[tuple[Item, int]]:
        """This process's item of every round, and how many processes have one of their own there.

        In the last round the others have the last item once more: all have to come to the same exchanges.
        """
        for start in range(0, len(items), self.count):
            left = len(items) - start
            yield items[start + min(self.number, left - 1)], min(self.count, left)

    def every(self, mine: Tensor, sharing: int) -> Iterator[Tensor]:
        """The tensors of the first `sharing` processes, in their order; all have one shape and dtype."""
        if self.count == 1:
            yield mine
            return
        mine = mine.contiguous()
        for number in range(sharing):
            one = mine if number == self.number else torch.empty_like(mine)
            distributed.broadcast(one, number)
            yield one

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
    process = PartialState(cpu=on_cpu(), timeout=PATIENCE)
    return Peers(process.process_index, process.num_processes, str(process.device))
