"""Which training windows to keep, learned while a model trains on all of them (AdaPruner for data, arXiv:2312.05599).

What decides the masks is in the trainer's log, every window's loss at every step, so a run that is cut off goes on to
the same ones.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor
from transformers import TrainerCallback

from billhook.math import window_masks
from billhook.math.window_masks import Learning, State
from billhook.tensors import Kept, Rows

LOGGED = "window_losses"  # [[window, loss], …] of a step, in the trainer's log


class WindowMasks(TrainerCallback):
    """Weighs the loss of each window by its mask, and moves the masks after each step."""

    def __init__(self, windows: int, keep: float, order: Sequence[int], rows: int):
        """Nothing is learned yet.

        Args:
            windows: how many there are.
            keep: the share to keep.
            order: their numbers, step by step, each of them before any comes twice.
            rows: windows in a step.
        """
        a_pass = math.ceil(windows / rows)
        steps = len(order) // rows - a_pass + 1
        self.learning = Learning(keep, steps, min(a_pass, steps))
        self.windows, self.read = windows, list[tuple[int, float]]()
        self.replay(())

    def replay(self, log: Sequence[dict[str, Any]]) -> None:
        """Learn anew from a trainer's log."""
        self.state, self.losses = State.first(self.windows), torch.full((self.windows,), torch.nan, dtype=torch.float64)
        for entry in log:
            if LOGGED in entry:
                self._learn(entry[LOGGED])

    def weighed(self, windows: Tensor, losses: Rows) -> Tensor:
        """The mean loss of the windows of a forward pass, each weighed by its mask.

        Args:
            windows: (rows,), their numbers.
        """
        self.read += zip(windows.tolist(), losses.tolist(), strict=True)
        return (self.state.weights[windows.cpu()].to(losses) * losses).mean()

    def kept(self, count: int) -> Kept:
        """The numbers of the windows that are kept, ascending."""
        return window_masks.largest(self.state, count)

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.replay(state.log_history)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        read = sorted(gather_object(self.read))  # of all processes
        state.log_history.append({"step": state.global_step, LOGGED: read})
        self._learn(read)
        self.read = []

    def _learn(self, read: Sequence[Sequence[Any]]) -> None:
        """Move the masks by the last losses of all windows, once each has one."""
        for window, loss in read:
            self.losses[window] = loss
        if not self.losses.isnan().any():
            self.state = window_masks.moved(self.state, window_masks.pull(self.losses), self.learning)
