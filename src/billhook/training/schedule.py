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
from billhook.training.mixture import Mixture

WHOLE = "whole.json"  # the file that completes a checkpoint: digests of all its other files
# how every message of torch.save begins when it cannot write a file
TORCH_WRITE_ERRORS = ("[enforce fail at inline_container.cc", "basic_ios::clear")


@dataclass(frozen=True)
class Schedule:
    """All that decides a training run besides the model and its teacher."""

    windows: Tokens
    order: Sequence[int]  # numbers of the windows to train on, step by step, over all passes
    rows: int  # windows in a step
    lr: float
    micro_batch: int = 1  # windows in one forward pass
    warmup: float = 0.05  # share of the steps that the learning rate rises over
    states: bool = False  # whether hidden states are aligned with the teacher's
    text_share: float = 0.0  # of the loss, beside a teacher's predictions: the text's own
    contrast: float = 0.0  # weight of token-level contrastive distillation
    dropout: bool = False  # whether the dropout of the model's config is on
    autocast: torch.dtype | None = None
    cpu: bool = False
    seed: int = 0
    evaluate_after: Sequence[int] = ()  # steps after which the model is evaluated
    mixture: Mixture | None = None  # what decides the order instead, from one evaluation to the next

    @property
    def steps(self) -> int:
        return len(self.order) // self.rows

    @property
    def step_tokens(self) -> int:
        return self.rows * self.windows.shape[1]

    @property
    def ends(self) -> list[int]:
        """How many windows are read before the shares of each evaluation end, of the first one before any step on.

        Shares begin a step late: when the model is evaluated, windows of the next step are loaded already.
        """
        return [*(min(step + 1, self.steps) * self.rows for step in self.evaluate_after), self.steps * self.rows]

    @property
    def warmup_steps(self) -> int:
        """Steps at the start that train below the full rate; at least one step has the full rate."""
        return min(round(self.warmup * self.steps), self.steps - 1)

    def lr_factor(self, step: int) -> float:
        """The share of `lr` after `step` steps: a line up from above zero, then a cosine down towards zero."""
        if step < self.warmup_steps:
            return (step + 1) / (self.warmup_steps + 1)
        return (1 + math.cos(math.pi * (step - self.warmup_steps) / (self.steps - self.warmup_steps))) / 2


class Diverged(BillhookError):
    """The loss, or its gradient, is no longer a number."""


def checkpoints(work: Path) -> list[Path]:
    """The Trainer's checkpoint folders, in the order of steps."""
    return sorted((path for path in work.glob("checkpoint-*") if path.is_dir()), key=step_of)


def mark_whole(checkpoint: Path) -> None:
    """Mark a checkpoint as complete, by a last file that lists the digests of all others."""
    digests = {str(file.relative_to(checkpoint)): _digest(file) for file in checkpoint.rglob("*") if file.is_file()}
    atomic.write_text(checkpoint / WHOLE, sealed(digests))


def is_whole(checkpoint: Path) -> bool:
    """Whether a checkpoint is complete and undamaged."""
    try:
        digests = read_sealed(checkpoint / WHOLE, WHOLE, "")
        return all(_digest(checkpoint / name) == digest for name, digest in digests.items())
    except (OSError, BillhookError):
        return False


def _digest(file: Path) -> str:
    """The digest of a plain file; '' for a pipe."""
    if not file.is_file():
        return ""
    with file.open("rb") as content:
        return hashlib.file_digest(content, "blake2b").hexdigest()


def last_whole(work: Path) -> str:
    """In words, the checkpoint from which a run that ends now can go on."""
    whole = [checkpoint for checkpoint in checkpoints(work) if is_whole(checkpoint)]
    return f"the checkpoint of step {step_of(whole[-1])} is kept in {whole[-1]}" if whole else "none was saved yet"


@contextmanager
def saving(checkpoint: Path) -> Iterator[None]:
    """Write a checkpoint whole or not at all: one that does not fit on the disk is removed, which frees its space.

    Raises:
        BillhookError: the disk is full, or files may not be as large; names the checkpoint that is left.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError, BillhookError) as error:
        why = atomic.disk_full(error.__cause__ or error)
        if not why and str(error).startswith(TORCH_WRITE_ERRORS):
            why = "the disk is full, or files may not be as large"
        if not why:
            raise
        shutil.rmtree(checkpoint, ignore_errors=True)
        raise BillhookError(
            f"cannot write {checkpoint}: {why}; {last_whole(checkpoint.parent)}: make room, then give the same command "
            "again"
        ) from error


def step_of(checkpoint: Path) -> int:
    """The step after which a checkpoint was written."""
    return int(checkpoint.name.rpartition("-")[2])
