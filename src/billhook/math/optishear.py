"""OptiShear (arXiv:2502.10735): Wanda's score with its parts transformed, S = alpha(|W|) F1(|W|) * beta(X) F2(X).

W (out, in) is the weight, X (1, in) the norms of what enters it, ||X_j||_2.  F1 and F2 work entry by entry, alpha and
beta are reciprocals of sums: 7^4 points, of which billhook.search.optishear searches the best for a model.  Compared
within each output row, as Wanda does; the weights that stay are left as they are.

Our reading: norms are root mean squares over tokens times sqrt(2048), as of the published calibration, sequences of
2,048
tokens: exp, log and sigmoid have no scale of their own.  Since rows are compared, exp is softmax, and only its softmax
is computed, which cannot overflow.
"""

import math

import torch
from torch import Tensor

from billhook.errors import BillhookError
from billhook.math import sparsity
from billhook.math.layerwise import Settings, SparseWeight, Target, finish
from billhook.math.metric import Metric, parse
from billhook.math.pattern import Pattern
from billhook.tensors import Weight

SEQUENCE = 2048  # tokens


def score(W: Weight, norms: Tensor, metric: Metric) -> Weight:
    """S (out, in) of a weight (out, in) and of norms (in), up to a positive factor in each row.

    Raises:
        BillhookError: it is not finite: no order of weights.
    """
    size, X, canonical = W.abs(), norms[None], metric.canonical
    S = _scaled(_function(size, canonical.f1), size, canonical.alpha) * _scaled(
        _function(X, canonical.f2), X, canonical.beta
    )
    if S.isnan().any():
        raise BillhookError(f"the metric {metric} is not a number here")
    return S


def norms_of(gram_diagonal: Tensor, tokens: int) -> Tensor:
    """||X_j||_2 of a sequence as long as the published ones."""
    return (gram_diagonal * (SEQUENCE / max(tokens, 1))).sqrt()


def prune(W: Weight, target: Target, pattern: Pattern, settings: Settings) -> SparseWeight:
    """Zero the smallest scores of every row, or of every M.  Reads of the settings: metric, tokens, zeros, refit."""
    metric = parse(settings.metric) if settings.metric else Metric()
    scores = score(W.double(), norms_of(target.gram.diagonal(), settings.tokens), metric)
    mask = sparsity.keep_mask(scores, pattern, "row", settings.zeros)
    return SparseWeight(finish(W, W, target, mask, settings), settings.damping, {})


def _function(A: Tensor, name: str) -> Tensor:
    if name == "sqrt":
        return A.sqrt()
    if name == "square":
        return A * A
    if name == "log":
        return A.clamp(min=math.exp(-50)).log()  # finite for zero, too
    if name == "sigmoid":
        return A.sigmoid()
    return A.softmax(1) if name == "softmax" else A


def _scaled(F: Tensor, A: Tensor, name: str) -> Tensor:
    """F over what alpha or beta name, of A; no factor of a whole row is left by now."""
    if name == "none":
        return F
    columns = A.sum(0, keepdim=True)
    below = columns + A.sum(1, keepdim=True) if name == "both" else columns
    return torch.where(below > 0, F / below, 0.0)
