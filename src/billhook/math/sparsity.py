"""Masks of a matrix: a share of all weights, or N of every M neighbours along the input, counted exactly."""

import torch
from torch import Tensor

from billhook.errors import BillhookError, one_of
from billhook.math.pattern import Pattern
from billhook.tensors import Weight

Support = Tensor  # Bool (out, in), the entries of a weight that may be nonzero
WITHIN = ("row", "matrix")


def check(pattern: Pattern, columns: int, name: str) -> None:
    """Refuse a pattern whose groups do not tile the input of the weight called `name`.

    Raises:
        BillhookError: M does not divide the number of columns.
    """
    if pattern.group is not None and columns % pattern.group:
        raise BillhookError(f"{name} has {columns} inputs, which groups of {pattern.group} ({pattern}) do not divide")


def keep_mask(scores: Weight, pattern: Pattern, within: str = "row", zeros: Support | None = None) -> Support:
    """True where a weight stays: all but the lowest scores, exactly as many as the pattern says, ties included.

    A share s drops round(s in) weights of each row (`within="row"`) or round(s out in) of the whole (`"matrix"`); N:M
    drops N of every M consecutive inputs whatever `within` is.  Among ties the lower index is dropped first.  `zeros`
    marks entries that must be dropped: they count first, and all of them are dropped even if the pattern asks for
    fewer.
    """
    one_of("scope of a sparsity pattern", within, WITHIN)
    if zeros is not None:
        scores = scores.masked_fill(zeros, -torch.inf)
    if pattern.group is not None and pattern.zeros is not None:
        groups, count = scores.reshape(-1, pattern.group), pattern.zeros
    else:
        groups = scores if within == "row" else scores.reshape(1, -1)
        count = round(pattern.share * groups.shape[1])
    stay = ~lowest_mask(groups, count).view(scores.shape)
    return stay if zeros is None else stay & ~zeros


def lowest_mask(scores: Tensor, count: int) -> Tensor:
    """True at the `count` lowest of every row of scores (groups, size); among ties, at the lower index."""
    if count == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    # selection, then ties by position: several times faster than a stable sort of a whole matrix
    threshold = _kth_lowest(scores, count)
    below, tied = scores < threshold, scores == threshold
    room = count - below.sum(1, keepdim=True)
    return below | (tied & (tied.cumsum(1) <= room))


def _kth_lowest(scores: Tensor, count: int) -> Tensor:
    """The `count`-th lowest of every row of scores (groups, size): (groups, 1).

    On a GPU `kthvalue` has one block of threads for a row, however long, and a sort has all of them.
    """
    if scores.device.type == "cpu":
        return scores.kthvalue(count, dim=1, keepdim=True).values
    return scores.sort(dim=1).values[:, count - 1 : count]


# a model with this share of exact zeros was masked: rounding leaves a few in a million, masks a tenth or more
SPARSE_SHARE = 0.05
