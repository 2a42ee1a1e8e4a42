"""Windows that share text with others: a run of tokens in common, wherever it begins."""

import torch
from torch import Tensor

RUN = 32  # tokens; two texts with a common run of about this length or more count as overlapping
STRIDE = 16  # tokens between the starts of two runs that are looked for


def overlapping(windows: Tensor, others: Tensor) -> Tensor:
    """Mask of the `windows` (windows, length) that share a run of about `RUN` tokens or more with one of `others`."""
    length = min(RUN, windows.shape[1], others.shape[1])
    return sharing(windows, runs(others, length), length)


def sharing(windows: Tensor, known: set[int], length: int) -> Tensor:
    """Mask of the `windows` that have one of the `known` runs of `length` tokens."""
    return torch.tensor([not known.isdisjoint(hashes) for hashes in _numbers(windows, length, STRIDE).tolist()])


def runs(windows: Tensor, length: int) -> set[int]:
    """Hashes of all runs of `length` tokens of the windows."""
    return set(_numbers(windows, length, 1).flatten().tolist())


def _numbers(windows: Tensor, length: int, stride: int) -> Tensor:
    weights = torch.randint(2**62, (length,), generator=torch.Generator().manual_seed(0))
    return (windows.unfold(1, length, stride) * weights).sum(-1)  # a hash: int64 wraps around
