"""Which windows are, in part, the same text as others: they share a run of tokens, wherever in a window it begins."""

import torch
from torch import Tensor

RUN = 32  # tokens: what two texts share of at least this length, and somewhat more, is the same text
STRIDE = 16


def overlapping(windows: Tensor, others: Tensor) -> Tensor:
    """Which of `windows` (windows, length) share a run of about `RUN` tokens or more with one of `others`, as a mask."""
    length = min(RUN, windows.shape[1], others.shape[1])
    return sharing(windows, runs(others, length), length)


def sharing(windows: Tensor, known: set[int], length: int) -> Tensor:
    """Which of `windows` have one of the `known` runs of `length` tokens, as a mask."""
    return torch.tensor([not known.isdisjoint(each) for each in _numbers(windows, length, STRIDE).tolist()])


def runs(windows: Tensor, length: int) -> set[int]:
    """A number for every run of `length` tokens of each window."""
    return set(_numbers(windows, length, 1).flatten().tolist())


def _numbers(windows: Tensor, length: int, stride: int) -> Tensor:
    weights = torch.randint(2**62, (length,), generator=torch.Generator().manual_seed(0))
    return (windows.unfold(1, length, stride) * weights).sum(-1)  # int64 wraps around: a hash
