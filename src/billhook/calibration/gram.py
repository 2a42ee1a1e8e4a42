"""Gram matrices of what enters a matrix: summed block by block, one triangle of them."""

import torch
from torch import Tensor

from billhook.calibration.forward import BATCH_TOKENS
from billhook.tensors import Gram, float64_device

GRAM_BLOCKS = 4  # block rows of the symmetric product: 10 of 16 blocks computed


def gram_of(x: Tensor) -> Gram:
    """X^T X in float64 of x (tokens, in): float32 products of at most `2 * BATCH_TOKENS` rows, summed in float64."""
    return mirrored(add_upper(None, x))


def add_upper(total: Gram | None, x: Tensor) -> Gram:
    """Add the upper block triangle of X^T X to `total`, in place."""
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
    """The whole Gram of its upper block triangle, in its place."""
    step = -(-len(upper) // GRAM_BLOCKS)
    for i in range(0, len(upper), step):
        here = upper[i : i + step, i : i + step]
        here.copy_(here.triu() + here.triu(1).T)
        upper[i + step :, i : i + step] = upper[i : i + step, i + step :].T
    return upper
