"""Grids of few bits: blocks of neighbours of a row share a scale, and each weight is a whole number of it.

    w = d q         q from `lowest` to `highest`, d signed, float16                T2, TQ2_0, Q4_0, Q5_0, Q8_0
    w = d q + m     q from 0 to `highest`, d and m float16                         Q4_1, Q5_1

A block has 32 entries, and 256 in TQ2_0.  All but the ternary T2 are block types of ggml (github.com/ggml-org/ggml,
ggml-quants.c).  Those without m are also grids of compressed-tensors' symmetric integers, in groups of a block.
Products are exact in float32, and d q + m is rounded once, so that whoever multiplies gets the same bits.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from billhook.choices import BITS_A_WEIGHT
from billhook.errors import BillhookError
from billhook.math.sparsity import Support
from billhook.tensors import Columns, Weight

BLOCK = 32  # neighbours of a row that share a scale, but where the grid says more
LARGEST = torch.finfo(torch.float16).max
SHRINKS = tuple(1 - n / 60 for n in range(16))  # shares of a block's own scale that are tried, 1 to 0.75
FURTHER = tuple(1 - n / 20 for n in range(16))  # of three levels, 1 to 0.25: most entries are far below the largest


@dataclass(frozen=True)
class Grid:
    """The levels of one type."""

    name: str
    lowest: int
    highest: int
    offset: bool  # whether a block has a minimum besides its scale; if so, zero is on no level
    block: int = BLOCK  # neighbours of a row that share a scale

    @property
    def bits(self) -> float:
        """What a weight takes, its share of the block's scales included."""
        return BITS_A_WEIGHT[self.name]


GRIDS = {
    grid.name: grid
    for grid in (
        Grid("T2", -1, 1, False),
        Grid("TQ2_0", -1, 1, False, block=256),
        Grid("Q4_0", -8, 7, False),
        Grid("Q4_1", 0, 15, True),
        Grid("Q5_0", -16, 15, False),
        Grid("Q5_1", 0, 31, True),
        Grid("Q8_0", -127, 127, False),
    )
}


@dataclass(frozen=True)
class Quantised:
    """A weight as codes and scales: what containers store, and what its values are computed from."""

    grid: Grid
    codes: Tensor  # int8 (out, in)
    scales: Tensor  # float16 (out, in / block)
    minima: Tensor | None = None  # float16 (out, in / block), where the grid has an offset

    @property
    def bytes(self) -> int:
        """What it takes in a GGUF file."""
        return round(self.codes.numel() * self.grid.bits / 8)

    def values(self) -> Weight:
        """The weight, float32."""
        minima = None if self.minima is None else self.minima.float()[..., None]
        return values_of(blocks(self.codes.float(), self.grid.block), self.scales[..., None], minima).flatten(1)


def blocks(W: Tensor, block: int = BLOCK) -> Tensor:
    """(out, in) as (out, in / block, block)."""
    return W.unflatten(1, (-1, block))


def divides(columns: int, block: int = BLOCK) -> bool:
    """Whether rows of so many entries are whole blocks."""
    return columns > 0 and columns % block == 0


def nearest(W: Weight, grid: Grid, zeros: Support | None = None) -> Quantised:
    """Round-to-nearest, by the scales that ggml takes: of each block's extremes alone.

    Args:
        zeros: entries that stay exactly zero.

    Raises:
        BillhookError: as `scales_of`.
    """
    scales, minima = scales_of(blocks(W.float(), grid.block), grid)
    return quantised(W, scales, minima, grid, zeros)


def exact(W: Weight, grid: Grid) -> Quantised | None:
    """A weight that lies on the grid's levels already, as codes and scales whose values are the weight to the bit.

    Returns:
        None where it does not lie there, or where the grid has an offset.
    """
    if grid.offset:
        return None
    X = blocks(W.float(), grid.block).flatten(0, 1)
    largest = _largest(X)
    scales, left = torch.zeros_like(largest, dtype=torch.float16), largest.nonzero().flatten()
    for level in sorted(range(grid.lowest, grid.highest + 1), key=abs, reverse=True)[:-1]:  # the last one is 0
        tried = (largest[left] / level).half()
        fit = tried.float() * level == largest[left]
        rows, d = left[fit], tried[fit, None]
        whole = (values_of(codes_of(X[rows], d, None, grid), d, None) == X[rows]).all(1)
        scales[rows[whole]] = d[whole, 0]
        left = left[scales[left] == 0]
    return None if len(left) else quantised(W, scales.unflatten(0, (len(W), -1)), None, grid)


def _largest(X: Tensor) -> Tensor:
    """The entry of largest magnitude along the last dimension, with its sign."""
    return X.gather(-1, X.abs().argmax(-1, keepdim=True)).squeeze(-1)


def scales_of(X: Tensor, grid: Grid) -> tuple[Tensor, Tensor | None]:
    """The scales of blocks (…, block), and their minima, float16: every entry of a block is within its levels.

    Raises:
        BillhookError: float16 does not hold a scale.
    """
    if grid.offset:
        lowest = X.amin(-1)
        scales, minima = (X.amax(-1) - lowest) / grid.highest, lowest
    elif grid.lowest == -grid.highest:
        scales, minima = X.abs().amax(-1) / grid.highest, None
    else:  # the entry of largest magnitude gets the lowest level, which has one step more than the highest
        scales, minima = _largest(X) / grid.lowest, None
    for stored in (scales, minima):
        if stored is not None and not bool((stored.abs() <= LARGEST).all()):
            raise BillhookError(f"a block's scale is beyond float16 ({LARGEST:g}), in which {grid.name} stores it")
    return scales.half(), None if minima is None else minima.half()


def best_scales(
    X: Tensor, grid: Grid, weights: Columns | None = None, shares: Sequence[float] = ()
) -> tuple[Tensor, Tensor | None]:
    """Scales and minima of the least squared error, among those of a row's extremes times each of the shares.

    Shares are SHRINKS, of three levels FURTHER, unless given.

    Args:
        X: rows of entries that share a scale, float (rows, entries): one block of every row of a weight.
        weights: what an error of each column counts; None: all alike.

    Raises:
        BillhookError: as `scales_of`.
    """
    own, minima = scales_of(X, grid)
    best, least = own, torch.full((len(X),), torch.inf, device=X.device)
    for share in shares or (SHRINKS if grid.highest > 1 else FURTHER):
        scales = (own.float() * share).half()
        low = None if minima is None else minima.float()[:, None]
        off = X - values_of(codes_of(X, scales[:, None], low, grid), scales[:, None], low)
        error = (off.square() if weights is None else off.square() * weights).sum(1)
        best, least = torch.where(error < least, scales, best), torch.minimum(error, least)
    return best, minima


def codes_of(X: Tensor, scales: Tensor, minima: Tensor | None, grid: Grid) -> Tensor:
    """The nearest levels of X, float; scales and minima are broadcast to it.  A scale of zero has the level 0 alone."""
    steps = scales.to(X.dtype)
    steps = torch.where(steps == 0, torch.inf, steps)
    return ((X if minima is None else X - minima) / steps).round().clamp(grid.lowest, grid.highest)


def quantised(W: Weight, scales: Tensor, minima: Tensor | None, grid: Grid, zeros: Support | None = None) -> Quantised:
    """A weight on the levels that its blocks' scales and minima say."""
    low = None if minima is None else minima.float()[..., None]
    codes = codes_of(blocks(W.float(), grid.block), scales[..., None], low, grid).flatten(1)
    if zeros is not None:
        codes = codes.masked_fill(zeros, 0.0)
    return Quantised(grid, codes.to(torch.int8), scales, minima)


def values_of(codes: Tensor, scales: Tensor, minima: Tensor | None) -> Tensor:
    """What codes stand for; scales and minima are broadcast to them."""
    values = codes * scales.to(codes.dtype)
    return values if minima is None else values + minima
