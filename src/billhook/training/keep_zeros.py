"""Exact zeros in the linear weights of the decoder layers: a mask method leaves them, and training must not fill them.

Gradients are as large at masked weights as anywhere else: after one plain step hardly a zero is left.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import PreTrainedModel, TrainerCallback
from transformers.pytorch_utils import Conv1D

from billhook.models.families import layers


@dataclass(frozen=True)
class Census:
    """A count of the exact zeros in the decoder layers' linear weights."""

    entries: int  # entries of all these weights together
    zeros: dict[str, int]  # zeros of each weight, by its name

    @property
    def total(self) -> int:
        return sum(self.zeros.values())

    @property
    def share(self) -> float:
        return self.total / self.entries if self.entries else 0.0

    def filled(self, model: PreTrainedModel) -> int:
        """How many zeros `model` has lost since the count, weight by weight.

        Counts are compared, not places: in the same weight, an entry that a narrow dtype rounds to zero hides a filled
        one.
        """
        after = census(model).zeros
        return sum(max(0, before - after[name]) for name, before in self.zeros.items())


def weights(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """The linear weights of the decoder layers, by names that begin with the layer's number, like 0.mlp.down_proj.

    Of a weight that is computed from another, that one.
    """
    for name, module in layers(model).named_modules():
        if isinstance(module, nn.Linear | Conv1D):
            stored = "parametrizations.weight.original" if parametrize.is_parametrized(module, "weight") else "weight"
            yield name, module.get_parameter(stored)


def census(model: PreTrainedModel) -> Census:
    """Count the zeros of a model; -0 is one as well."""
    counts = {name: weight.numel() - int(torch.count_nonzero(weight)) for name, weight in weights(model)}
    return Census(sum(weight.numel() for _, weight in weights(model)), counts)


def zeros(model: PreTrainedModel) -> dict[str, Tensor]:
    """Masks of exact zeros in the trained weights; weights that are frozen or without zeros are left out."""
    trained = {name: weight.detach() == 0 for name, weight in weights(model) if weight.requires_grad}
    return {name: mask for name, mask in trained.items() if mask.any()}


class ZeroKeeper(TrainerCallback):
    """Keeps the zeros that `model` has when this is made: before weights of a checkpoint are read into it.

    Gradients are masked as they arise, so that they enter neither the clipped norm nor Adam's moments.  After each step
    the zeros are written again, against weight decay and rounding.
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

    def _mask(self, name: str, tensor: Tensor) -> Tensor:
        """The mask of a weight, on the device of `tensor`, which training may have moved."""
        self.masks[name] = self.masks[name].to(tensor.device)
        return self.masks[name]
