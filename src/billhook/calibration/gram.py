"""Gram matrices of the inputs of a weight: summed block by block, upper triangle alone.

Of numbers in half precision every product is exact in float32, and a GPU's matrix units sum them in float32: there such
inputs are multiplied as they are, ten times as fast as in float32 and as exact.  Sums of chunks are in float64.
"""

import torch
from torch import Tensor

from billhook.calibration.forward import BATCH_TOKENS
from billhook.tensors import Gram, float64_device

HALVES = (torch.bfloat16, torch.float16)
SUMS_IN_FLOAT32 = "dtype" in torch.ops.aten.mm.overloads()  # since torch 2.8 a result may be wider than what it is of
GRAM_BLOCKS = 4  # block rows of the symmetric product, so that 10 of 16 blocks are computed


def gram_of(x: Tensor) -> Gram:
    """X^T X in float64 of x (tokens, in): products in float32 of at most `2 * BATCH_TOKENS` rows, summed in float64."""
    return mirrored(add_upper(None, x))


def add_upper(total: Gram | None, x: Tensor) -> Gram:
    """Add the upper block triangle of X^T X to `total`, in place; None starts a new sum."""
    x = x.flatten(0, -2)
    size = x.shape[1]
    if total is None:
        total = torch.zeros(size, size, dtype=torch.float64, device=float64_device(x.device))
    step = -(-size // GRAM_BLOCKS)
    for chunk in x.split(2 * BATCH_TOKENS):
        for i in range(0, size, step):
            total[i : i + step, i:] += product(chunk[:, i : i + step], chunk[:, i:]).to(total.device)
    return total


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
