"""The shapes billhook speaks of, as types.  Dimension names bind within one signature; the tests check every call."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

Weight = Float[Tensor, "out in"]  # what reads an axis, seen as (out, in) whatever the storage order
Narrowed = Float[Tensor, "out kept"]  # the same weight with only the kept columns
Gram = Float[Tensor, "in in"]  # X^T X of what enters a reader, float64
Cross = Float[Tensor, "out in"]  # E^T X: a target's correlation with what enters a reader, float64
Columns = Float[Tensor, " in"]  # one number for each column of a reader
Scores = Float[Tensor, " units"]  # one number for each unit of an axis
Units = Int[Tensor, " chosen"]  # numbers of units, ascending
Kept = Int[Tensor, " kept"]  # numbers of the units, or columns, that stay, ascending
Index = Int[Tensor, "units span"]  # which entries of a dimension each unit owns
Mask = Bool[Tensor, " entries"]
Tokens = Int[Tensor, "windows length"]  # token ids, every row a full window
Probes = Int[Tensor, "probes length"]  # other windows, to judge by
Logits = Float[Tensor, "rows length vocabulary"]
Chosen = Int[Tensor, "rows predicted k"]  # the teacher's most likely tokens, the most likely first
LogChances = Float[Tensor, "rows predicted k"]  # their log-probabilities
Tail = Float[Tensor, "rows predicted"]  # probability of all other tokens together
Rows = Float[Tensor, " rows"]  # one number for each window of a forward pass
States = Float[Tensor, "rows length hidden"]
SlotWindows = Float[Tensor, "slots windows units"]  # of each slot of an axis, in each window
SlotMixtures = Float[Tensor, "mixtures slots units"]  # of each slot, for each mixture of clusters of windows
WindowUnits = Float[Tensor, "windows units"]
SlotUnits = Float[Tensor, "slots units"]
Clusters = Int[Tensor, " windows"]  # which cluster each window belongs to, from 0
Shares = Float[Tensor, " windows"]  # what each window weighs in a mixture, summing to 1
WITHOUT = {"mps"}  # types of devices


def float64_device(device: torch.device) -> torch.device:
    """Where float64 is for what is on a device: there, or on the CPU."""
    return torch.device("cpu") if device.type in WITHOUT else device


def precise(tensor: Tensor) -> Tensor:
    """The tensor in float64, on `place` of its device."""
    return tensor.to(
        float64_device(tensor.device)
    ).double()  # in this order: neither way of the other is on an Apple GPU
