"""Gram matrices of the inputs of a weight: summed block by block, upper triangle alone."""

import torch
from torch import Tensor

from billhook.calibration.forward import BATCH_TOKENS
from billhook.tensors import Gram, float64_device

GRAM_BLOCKS = 4  # block rows of the symmetric product, so that 10 of 16 blocks are computed


def gram_of(x: Tensor) -> Gram:
    """X^T X in float64 of x (tokens, in): float32 products of at most `2 * BATCH_TOKENS` rows, summed in float64."""
    return mirrored(add_upper(None, x))


def add_upper(total: Gram | None, x: Tensor) -> Gram:
    """Add the upper block triangle of X^T X to `total`, in place; None starts a new sum."""
    x = x.flatten(0, -2).float()
    size = x.shape[1]
    if total is None:
        total = torch.zeros(size, size, dtype=torch.float64, device=float64_device(x.device))
    step = -(-size // GRAM_BLOCKS)
    for chunk in x.split(2 * BATCH_TOKENS):
        for i in range(0, size, step):
            total[i : i + step, i:] += (chunk[:, i : i + step].T @ chunk[:, i:]).to(total.device)
    return total


def mirrored(upper: Gram) -> Gram:
    """Complete a Gram from its upper block triangle, in place."""
    step = -(-len(upper) // GRAM_BLOCKS)
    for i in range(0, len(upper), step):
        block = upper[i : i + step, i : i + step]
        block.copy_(block.triu() + block.triu(1).T)
        upper[i + step :, i : i + step] = upper[i : i + step, i + step :].T
    return upper
