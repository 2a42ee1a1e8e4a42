"""Cutting: remove units for good, or silence them in place.  Cached sizes and the config follow the tensors."""

import torch
from torch import nn
from transformers import PreTrainedModel

from billhook.axes import Axis, owners
from billhook.errors import BillhookError
from billhook.families import layers, sizes
from billhook.tensors import Units


def remove(model: PreTrainedModel, axis: Axis, drop: Units) -> None:
    """Physically remove the units `drop` of `axis`, in place.  `axis` is stale afterwards; the config is not touched."""
    for slot, owner, leaf in owners(model, axis):
        old = getattr(owner, leaf)
        keep = torch.ones(old.shape[slot.dim], dtype=torch.bool)
        keep[slot.index[drop.cpu()].flatten()] = False
        kept = keep.nonzero().flatten().to(old.device)
        setattr(owner, leaf, nn.Parameter(old.detach().index_select(slot.dim, kept), old.requires_grad))
        if isinstance(owner, nn.Linear):
            owner.out_features, owner.in_features = owner.weight.shape
    for path, per_unit in axis.counters:
        owner, leaf = model.get_submodule(path.rpartition(".")[0]), path.rpartition(".")[2]
        setattr(owner, leaf, int(getattr(owner, leaf) - per_unit * len(drop)))


def zero(model: PreTrainedModel, axis: Axis, drop: Units) -> None:
    """Silence the units `drop` by zeroing what reads them: the reference that `remove` must match."""
    slot = axis.reader
    model.get_parameter(slot.param).data.index_fill_(slot.dim, slot.index[drop].flatten(), 0)


def update_config(model: PreTrainedModel) -> None:
    """Write the sizes that the tensors have into the config: the `uniform` layout.

    Raises:
        BillhookError: two layers differ, so that no stock config can say it.
    """
    first, *rest = [sizes(model, n) for n in range(len(layers(model)))]
    for n, other in enumerate(rest, start=1):
        if other != first:
            raise BillhookError(f"layer {n} has {other}, layer 0 has {first}: the uniform layout needs equal layers")
    for key, value in first.items():
        setattr(model.config, key, value)


def cast(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Cast the parameters, and only them: rotary frequencies stay float32 as a stock load leaves them."""
    for param in model.parameters():
        param.data = param.data.to(dtype)
    model.config.dtype = dtype
