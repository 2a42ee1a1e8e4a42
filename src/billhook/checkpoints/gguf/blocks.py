"""Codes and scales as ggml's blocks: the bytes that a GGUF holds of a matrix of few bits.

A block of 32 entries is its scale, its minimum where the type has one, the fifth bits of all, then four bits of each,
the first sixteen in the low halves of the bytes; Q8_0 has a byte for each.  TQ2_0 has blocks of 256: of either half
two bits each, those of entry i, i + 32, i + 64 and i + 96 in one byte, and then the scale (ggml-common.h).
"""

import numpy as np
from torch import Tensor

from billhook.choices import TERNARY
from billhook.math.grids import Quantised, blocks


def packed(weight: Quantised) -> np.ndarray:
    """The rows of a matrix as bytes, uint8 (out, bytes of a row)."""
    codes, heads = blocks(weight.codes, weight.grid.block).cpu().numpy(), [_bytes(weight.scales)]
    if weight.minima is not None:
        heads.append(_bytes(weight.minima))
    if weight.grid.name == TERNARY:
        quarters = (codes - weight.grid.lowest).astype(np.uint8).reshape(*codes.shape[:2], 2, 4, 32)
        joined = np.bitwise_or.reduce(quarters << np.arange(0, 8, 2, dtype=np.uint8)[:, None], axis=-2)
        parts = [joined.reshape(*codes.shape[:2], -1), *heads]
    elif weight.grid.highest > 31:
        parts = [*heads, codes.view(np.uint8)]
    else:
        plain = (codes - weight.grid.lowest).astype(np.uint8)
        if weight.grid.highest - weight.grid.lowest > 15:
            heads.append(np.packbits(plain >> 4, axis=-1, bitorder="little"))
        low = plain & 15
        parts = [*heads, low[..., :16] | low[..., 16:] << 4]
    return np.concatenate(parts, -1).reshape(len(codes), -1)


def _bytes(halves: Tensor) -> np.ndarray:
    """One float16 for each block, as its two bytes: uint8 (out, blocks, 2)."""
    return halves.cpu().numpy()[..., None].view(np.uint8)
