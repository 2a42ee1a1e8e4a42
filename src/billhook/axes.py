"""Named axes: one coupled group of parameters, wherever it lives.

An Axis is a set of Slots.  Slot(param, dim, index) says: along `dim` of `param`, unit u owns the entries index[u].
Removing unit u means dropping index[u] from every slot.  Nothing above this file knows what kind of layer it cuts.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from billhook.tensors import Columns, Index, Kept, Scores, Units


@dataclass(frozen=True, eq=False)
class Slot:
    """Along `dim` of the parameter named `param`, unit u of the axis owns the entries index[u]."""

    param: str
    dim: int
    index: Index


@dataclass(frozen=True, eq=False)
class Axis:
    """One coupled group: what writes it, what reads it, and the module attributes that cache its size."""

    layer: int
    kind: str
    writers: tuple[Slot, ...]
    reader: Slot
    counters: tuple[tuple[str, Fraction], ...] = ()  # (path of an attribute, how much it holds for each unit)
    blocks: int = 1  # units form this many equal contiguous blocks, cut evenly
    modules: str = ""  # path of a list of modules, of which unit u owns the u-th whole
    ends_layer: bool = False  # whether what the reader puts out is added to the layer's output as it is

    @property
    def slots(self) -> tuple[Slot, ...]:
        return (*self.writers, self.reader)

    @property
    def units(self) -> int:
        return len(self.reader.index)

    @property
    def reader_module(self) -> str:
        """Path of the module whose weight reads the axis."""
        return self.reader.param.removesuffix(".weight")

    def columns(self, units: Units) -> Kept:
        """Columns of the reader that belong to `units`, ascending."""
        return self.reader.index[units.cpu()].flatten().sort().values.to(units.device)

    def pool(self, scores: Columns) -> Scores:
        """Column scores of the reader, summed over the columns of each unit."""
        return scores[self.reader.index.to(scores.device)].sum(1)

    def price(self, model: PreTrainedModel) -> int:
        """Parameters that one unit owns."""
        whole = next(model.get_submodule(self.modules).children()).parameters() if self.modules else ()
        return sum(param.numel() for param in whole) + sum(
            slot.index.shape[1] * param.numel() // param.shape[slot.dim]
            for slot, owner, leaf in owners(model, self)
            if isinstance(param := getattr(owner, leaf), nn.Parameter)
        )


def blocks(units: int, inner: int = 1) -> Index:
    """Positions of each unit in a flat dimension laid out as (units, inner)."""
    return torch.arange(units * inner).view(units, inner)


def reader_weight(model: PreTrainedModel, axis: Axis) -> Tensor:
    """The weight that reads `axis` seen as (out, in): a view, so that assigning to its entries edits the model."""
    return model.get_parameter(axis.reader.param).data.movedim(axis.reader.dim, -1)


def owners(model: PreTrainedModel, axis: Axis) -> Iterator[tuple[Slot, nn.Module, str]]:
    """Each slot with the module that holds its parameter and the parameter's name there."""
    for slot in axis.slots:
        path, _, leaf = slot.param.rpartition(".")
        yield slot, model.get_submodule(path), leaf
