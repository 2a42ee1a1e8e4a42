"""Hidden states of the calibration text between layers: in memory, beyond a budget in files, loaded when they are read.

room = Room(2**30)
state = room.keep(x)  # in memory, while there is room
state.read()          # the same bits
"""

import shutil
import tempfile
import weakref
from itertools import count
from pathlib import Path

import torch
from torch import Tensor

from billhook.errors import BillhookError, first_line
from billhook.runtime.atomic import disk_full


class Room:
    """At most `limit` bytes of memory, None for any number, and a folder for everything beyond."""

    def __init__(self, limit: int | float | None = None) -> None:
        self.limit, self.used, self.numbers = float("inf") if limit is None else limit, 0, count()
        self.folder: Path | None = None

    def keep(self, x: Tensor) -> "State":
        """Store hidden states in memory or in a file, as the limit says.

        Raises:
            BillhookError: the limit has no room for these states alone, or the disk is full.
        """
        return State(x, self)

    def file(self) -> Path:
        if self.folder is None:
            self.folder = Path(tempfile.mkdtemp(prefix="billhook-hidden-"))
            weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)
        return self.folder / str(next(self.numbers))


class State:
    """The hidden states of one batch."""

    def __init__(self, x: Tensor, room: Room) -> None:
        self.room, self.bytes = room, x.numel() * x.element_size()
        self.held: Tensor | None = None
        self.file: Path | None = None
        if self.bytes > room.limit:
            raise BillhookError(
                f"--hidden-budget {room.limit:,.0f} bytes: the hidden states of one batch alone take {self.bytes:,}: "
                "raise it"
            )
        if room.used + self.bytes <= room.limit:
            self.held, room.used = x, room.used + self.bytes
            return
        self.file, self.like = room.file(), (x.dtype, x.shape, x.device)
        try:
            x.cpu().contiguous().flatten().view(torch.uint8).numpy().tofile(self.file)
        except OSError as error:
            why = disk_full(error) or first_line(error)
            raise BillhookError(f"cannot write hidden states to {self.file}: {why}; raise --hidden-budget") from error

    def read(self) -> Tensor:
        if self.file is None:
            assert self.held is not None
            return self.held
        dtype, shape, device = self.like
        mapped = torch.from_file(str(self.file), shared=False, size=shape.numel(), dtype=dtype)
        # copied, since the mapped file would count as memory as long as it is referenced
        return mapped.view(shape).to(device, copy=True)

    def __del__(self) -> None:
        if self.held is not None:
            self.room.used -= self.bytes
        if self.file is not None:
            self.file.unlink(missing_ok=True)
