"""Masks of a matrix: a share of all weights or blocks, or N of every M neighbours along the input, counted exactly."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from billhook.errors import BillhookError, one_of
from billhook.math.pattern import Pattern
from billhook.tensors import Weight

Support = Tensor  # Bool (out, in), the entries of a weight that may be nonzero
WITHIN = ("row", "matrix")


def check(pattern: Pattern, shape: Sequence[int], name: str) -> None:
    """Refuse a pattern whose groups or blocks do not tile the weight (out, in) called `name`.

    Raises:
        BillhookError: M does not divide the number of inputs, or a block's side that of inputs or outputs.
    """
    outputs, inputs = shape
    if pattern.group is not None and inputs % pattern.group:
        raise BillhookError(f"{name} has {inputs} inputs, which groups of {pattern.group} ({pattern}) do not divide")
    if outputs % pattern.side or inputs % pattern.side:
        raise BillhookError(
            f"{name} has {outputs} outputs and {inputs} inputs, which {pattern.side} weights of a block do not divide"
        )


def keep_mask(scores: Weight, pattern: Pattern, within: str = "row", zeros: Support | None = None) -> Support:
    """True where a weight stays: all but the lowest scores, exactly as many as the pattern says, ties included.

    A share s drops round(s in) weights of each row (`within="row"`) or round(s out in) of the whole (`"matrix"`); N:M
    drops N of every M consecutive inputs whatever `within` is.  Among ties the lower index is dropped first.  `zeros`
    marks entries that must be dropped: they count first, and all of them are dropped even if the pattern asks for
    fewer.  A share of blocks drops as many of a row of blocks, or of all, as it would of weights, those of the lowest
    means; only blocks that are all `zeros` count first.
    """
    one_of("scope of a sparsity pattern", within, WITHIN)
    if (side := pattern.side) > 1:
        gone = None if zeros is None else whole_blocks(zeros, side)
        stay = spread(keep_mask(block_means(scores, side), replace(pattern, side=1), within, gone), side)
        return stay if zeros is None else stay & ~zeros
    if zeros is not None:
        scores = scores.masked_fill(zeros, -torch.inf)
    if pattern.group is not None and pattern.zeros is not None:
        groups, count = scores.reshape(-1, pattern.group), pattern.zeros
    else:
        groups = scores if within == "row" else scores.reshape(1, -1)
        count = round(pattern.share * groups.shape[1])
    stay = ~lowest_mask(groups, count).view(scores.shape)
    return stay if zeros is None else stay & ~zeros


def block_means(values: Tensor, side: int) -> Tensor:
    """The mean of every block of (out, in): (out / side, in / side)."""
    rows, columns = (size // side for size in values.shape)
    return values.reshape(rows, side, columns, side).mean((1, 3))


def whole_blocks(entries: Support, side: int) -> Tensor:
    """Bool (out / side, in / side), the blocks of which all entries are marked."""
    return block_means(entries.double(), side) == 1


def spread(blocks: Tensor, side: int) -> Support:
    """What is said of every block, of each of its entries."""
    return blocks.repeat_interleave(side, 0).repeat_interleave(side, 1)


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
