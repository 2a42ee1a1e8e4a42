"""Wanda: A Simple and Effective Pruning Approach for Large Language Models (Sun et al. 2023, arXiv:2306.11695).

S_ij = |W_ij| ||X_j||_2, compared within each output row; the weights that stay are left as they are.
"""

from billhook.math import sparsity
from billhook.math.layerwise import Settings, SparseWeight, Target, finish
from billhook.math.pattern import Pattern
from billhook.tensors import Weight


def prune(W: Weight, target: Target, pattern: Pattern, settings: Settings) -> SparseWeight:
    """Zero the smallest |W_ij| sqrt(G_jj) of every row, or of every M.  Reads of the settings: zeros, refit."""
    scores = W.double().abs() * target.gram.diagonal().sqrt()
    mask = sparsity.keep_mask(scores, pattern, "row", settings.zeros)
    return SparseWeight(finish(W, W, target, mask, settings), settings.damping, {})
