"""Gram matrices of the inputs of a weight: summed block by block, upper triangle alone.

Of numbers in half precision every product is exact in float32, and a GPU's matrix units sum them in float32: there such
inputs are multiplied as they are, ten times as fast as in float32 and as exact.  Sums of chunks are in float64.
"""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from billhook.calibration.forward import BATCH_TOKENS
from billhook.tensors import Gram, float64_device, precise

HALVES = (torch.bfloat16, torch.float16)
SUMS_IN_FLOAT32 = "dtype" in torch.ops.aten.mm.overloads()  # since torch 2.8 a result may be wider than what it is of
GRAM_BLOCKS = 4  # block rows of the symmetric product, so that 10 of 16 blocks are computed


def gram_of(x: Tensor) -> Gram:
    """X^T X in float64 of x (tokens, in): products in float32 of at most `2 * BATCH_TOKENS` rows, summed in float64."""
    return mirrored(add_upper(None, x))


def add_upper(total: Gram | None, x: Tensor, every: Callable[[Tensor], Iterable[Tensor]] = lambda own: (own,)) -> Gram:
    """Add the upper block triangle of X^T X to `total`, in place; None starts a new sum.

    Args:
        every: from a block row of this product to what is added: those of all processes, in one order.
    """
    x = x.flatten(0, -2)
    size = x.shape[1]
    if total is None:
        total = torch.zeros(size, size, dtype=torch.float64, device=float64_device(x.device))
    step, chunks = -(-size // GRAM_BLOCKS), x.split(2 * BATCH_TOKENS)
    for i in range(0, size, step):
        for row in every(_block_row(chunks, i, i + step)):
            total[i : i + step, i:] += row.to(total.device)
    return total


def _block_row(chunks: Sequence[Tensor], start: int, end: int) -> Tensor:
    """Rows `start` to `end` of X^T X, from the diagonal on: of one chunk in float32, of several summed in float64."""
    row = product(chunks[0][:, start:end], chunks[0][:, start:])
    for chunk in chunks[1:]:
        row = precise(row) + precise(product(chunk[:, start:end], chunk[:, start:]))
    return row


def product(a: Tensor, b: Tensor) -> Tensor:
    """a^T b in float32, summed over tokens: a (tokens, m) and b (tokens, n) -> (m, n)."""
    if a.device.type == "cuda" and a.dtype == b.dtype in HALVES and SUMS_IN_FLOAT32:
        return torch.mm(a.T, b, out_dtype=torch.float32)
    return a.T.float() @ b.float()


def mirrored(upper: Gram) -> Gram:
    """Complete a Gram from its upper block triangle, in place."""
    step = -(-len(upper) // GRAM_BLOCKS)
    for i in range(0, len(upper), step):
        block = upper[i : i + step, i : i + step]
        block.copy_(block.triu() + block.triu(1).T)
        upper[i + step :, i : i + step] = upper[i : i + step, i + step :].T
    return upper
