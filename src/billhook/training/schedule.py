"""The schedule of a training run, and which of its checkpoints are whole."""

import hashlib
import math
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError

from billhook.errors import BillhookError
from billhook.runtime import atomic
from billhook.runtime.documents import read_sealed, sealed
from billhook.tensors import Tokens

WHOLE = "whole.json"  # a checkpoint's last file: digests of all others
# how all begins that torch.save says of a file that it cannot write
TORCH_WRITES = ("[enforce fail at inline_container.cc", "basic_ios::clear")


@dataclass(frozen=True)
class Course:
    """All that decides a training run but the model and its teacher."""

    windows: Tokens
    order: Sequence[int]  # windows by number, step by step, over all passes
    rows: int  # windows in a step
    lr: float
    micro_batch: int = 1  # windows in one forward
    warmup: float = 0.05  # share of the steps
    states: bool = False
    dropout: bool = False  # as the model's config has it
    autocast: torch.dtype | None = None
    cpu: bool = False
    seed: int = 0
    points: Sequence[int] = ()  # steps after which the model is judged

    @property
    def steps(self) -> int:
        return len(self.order) // self.rows

    @property
    def step_tokens(self) -> int:
        return self.rows * self.windows.shape[1]

    @property
    def warming(self) -> int:
        """Steps below the full rate at the start; one at least has all of it."""
        return min(round(self.warmup * self.steps), self.steps - 1)

    def share_of_lr(self, step: int) -> float:
        """What of `lr` the step after `step` others trains at: a line up from above zero, then a cosine down towards it."""
        if step < self.warming:
            return (step + 1) / (self.warming + 1)
        return (1 + math.cos(math.pi * (step - self.warming) / (self.steps - self.warming))) / 2


class Diverged(BillhookError):
    """The loss, or its gradient, is no longer a number."""


def checkpoints(work: Path) -> list[Path]:
    """The Trainer's checkpoint folders, by step."""
    return sorted((path for path in work.glob("checkpoint-*") if path.is_dir()), key=step_of)


def mark_whole(checkpoint: Path) -> None:
    """Say that nothing is missing from a checkpoint: its last file lists the digests of all others."""
    digests = {str(file.relative_to(checkpoint)): _digest(file) for file in checkpoint.rglob("*") if file.is_file()}
    atomic.write_text(checkpoint / WHOLE, sealed(digests))


def is_whole(checkpoint: Path) -> bool:
    """Whether a checkpoint has all that it had when it was written."""
    try:
        digests = read_sealed(checkpoint / WHOLE, WHOLE, "")
        return all(_digest(checkpoint / name) == digest for name, digest in digests.items())
    except (OSError, BillhookError):
        return False


def _digest(file: Path) -> str:
    """Of a plain file: a pipe has none."""
    if not file.is_file():
        return ""
    with file.open("rb") as content:
        return hashlib.file_digest(content, "blake2b").hexdigest()


def last_whole(work: Path) -> str:
    """What a run that ends here leaves to go on from, in words."""
    found = [one for one in checkpoints(work) if is_whole(one)]
    return f"the checkpoint of step {step_of(found[-1])} is kept in {found[-1]}" if found else "none was saved yet"


@contextmanager
def saving(checkpoint: Path) -> Iterator[None]:
    """Write a checkpoint, or have nothing of it: one that the disk does not take goes, and its space is free again.

    Raises:
        BillhookError: the disk is full, or files may not be as large; says which checkpoint is left.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError, BillhookError) as error:
        why = atomic.disk_full(error.__cause__ or error)
        if not why and str(error).startswith(TORCH_WRITES):
            why = "the disk is full, or files may not be as large"
        if not why:
            raise
        shutil.rmtree(checkpoint, ignore_errors=True)
        raise BillhookError(
            f"cannot write {checkpoint}: {why}; {last_whole(checkpoint.parent)}: make room, then give the same command again"
        ) from error


def step_of(checkpoint: Path) -> int:
    """After which step a checkpoint was written."""
    return int(checkpoint.name.rpartition("-")[2])
