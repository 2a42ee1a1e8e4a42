"""Magnitude pruning: the smallest weights go (Han et al. 2015, arXiv:1506.02626).

One threshold for the whole matrix, or the N smallest of every M.  No calibration text, unless a refit is asked for.
"""

from billhook.math import sparsity
from billhook.math.layerwise import Settings, SparseWeight, Target, finish
from billhook.math.pattern import Pattern
from billhook.tensors import Weight


def prune(W: Weight, target: Target, pattern: Pattern, settings: Settings) -> SparseWeight:
    """Zero the smallest |W_ij|.  Reads of the settings: zeros, refit."""
    mask = sparsity.keep_mask(W.abs(), pattern, "matrix", settings.zeros)
    return SparseWeight(finish(W, W, target, mask, settings), settings.damping, {})
