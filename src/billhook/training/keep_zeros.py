"""Exact zeros in the linear weights of the decoder layers: what a mask method leaves, and what training must not fill.

A gradient is as large where a weight was masked as anywhere else: after one plain step hardly a zero is left.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerCallback
from transformers.pytorch_utils import Conv1D

from billhook.models.families import layers


@dataclass(frozen=True)
class Census:
    """How many entries of the decoder layers' linear weights there are, and how many of each weight are exactly zero."""

    entries: int
    zeros: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.zeros.values())

    @property
    def share(self) -> float:
        return self.total / self.entries if self.entries else 0.0

    def filled(self, model: PreTrainedModel) -> int:
        """How many zeros fewer `model` has than the one that was counted, weight by weight.

        Counts, not places: within one weight an entry that a narrow dtype rounds to zero hides one that was filled.
        """
        now = census(model).zeros
        return sum(max(0, before - now[name]) for name, before in self.zeros.items())


def weights(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """The linear weights of the decoder layers; names count from the first layer: 0.mlp.down_proj."""
    for name, module in layers(model).named_modules():
        if isinstance(module, nn.Linear | Conv1D):
            yield name, module.weight


def census(model: PreTrainedModel) -> Census:
    """Count them; -0 is a zero as well."""
    found = {name: weight.numel() - int(torch.count_nonzero(weight)) for name, weight in weights(model)}
    return Census(sum(weight.numel() for _, weight in weights(model)), found)


def zeros(model: PreTrainedModel) -> dict[str, Tensor]:
    """Where the trained weights are exactly zero: bool, a byte an entry, and nothing for weights that are frozen or have none."""
    trained = {name: weight.detach() == 0 for name, weight in weights(model) if weight.requires_grad}
    return {name: mask for name, mask in trained.items() if mask.any()}


class Keeper(TrainerCallback):
    """Keeps every zero of `model` through its training, as it is now: before weights of a checkpoint are read into it.

    Gradients are masked as they arise, so that neither the clipped norm nor Adam's moments know of them; after each step the
    zeros are written again, whatever weight decay or a rounding made of them.
    """

    def __init__(self, model: PreTrainedModel):
        self.masks = zeros(model)
        self.kept = {name: weight for name, weight in weights(model) if name in self.masks}
        for name, weight in self.kept.items():
            weight.register_hook(lambda gradient, name=name: gradient.masked_fill(self._mask(name, gradient), 0))

    def on_optimizer_step(self, *_: Any, **__: Any) -> None:
        self.reapply()

    @torch.no_grad()
    def reapply(self) -> None:
        """Write the zeros again."""
        for name, weight in self.kept.items():
            weight.masked_fill_(self._mask(name, weight), 0)

    def _mask(self, name: str, beside: Tensor) -> Tensor:
        """A mask on the device that training has moved its weight to."""
        self.masks[name] = self.masks[name].to(beside.device)
        return self.masks[name]
