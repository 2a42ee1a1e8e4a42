"""Masks that move while a model trains: annealed SR-STE of AST (Huang et al. 2024, arXiv:2407.20584), its naive row.

The model computes with W o M, where M keeps the largest |W| of every group, or the largest |W_ij| ||X_j|| of inputs X
as they were before the training (Wanda's score).  With g = dL/d(W o M), l the decay of the step and b1, b2, lr, eps as
in Adam (o: entry by entry):

    m <- b1 m + (1 - b1) g                     straight through: a masked weight gets the gradient of its place
    u  = m + l (1 - M) o W                     the decay pulls masked weights to zero, and is no part of m
    v <- b2 v + (1 - b2) u^2
    W <- W - lr u / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps)

v averages the squares of u, not of g: where gradients are noise, steps are about four times as large as Adam's.  For
b1 = 0 and l = 0 the weights that stay move as Adam's.

The released code for GPT-2 takes the complement of an integer mask, which is -1 where a weight is masked and -2 where
it is not, so that all weights grow; here are the paper's equations.
"""

import torch
from torch import Tensor

from billhook.math import sparsity
from billhook.math.pattern import Pattern
from billhook.math.sparsity import Support
from billhook.tensors import Columns, Weight

BETAS = 0.9, 0.95  # b1 and b2
EPS = 1e-8


class _Masked(torch.autograd.Function):
    """W o M, with a gradient for all of W."""

    @staticmethod
    def forward(ctx: object, W: Weight, mask: Support) -> Weight:
        return W.masked_fill(~mask, 0)

    @staticmethod
    def backward(ctx: object, *slopes: Tensor) -> tuple[Tensor, None]:
        return slopes[0], None


def masked(W: Weight, mask: Support) -> Weight:
    """W o M, straight through."""
    return _Masked.apply(W, mask)


def largest(W: Weight, pattern: Pattern, norms: Columns | None = None) -> Support:
    """M: true where a weight is among the largest of its group, times the norm of its input if norms are given."""
    scores = W.detach().abs()
    return sparsity.keep_mask(scores if norms is None else scores * norms, pattern)


def holds(W: Weight, pattern: Pattern) -> bool:
    """Whether every group of a weight has as many zeros as an N:M pattern asks for, or more."""
    zeros = (W == 0).reshape(-1, pattern.group or 1)
    return bool((zeros.sum(1) >= (pattern.zeros or 0)).all())


def annealed(decay: float, step: int, rise: int) -> float:
    """l of a step, from 0 on: a line from 0 to `decay` over `rise` steps."""
    return decay * min(1.0, step / rise)


def update(m: Tensor, W: Weight, mask: Support, decay: float) -> Tensor:
    """u."""
    return W.masked_fill(mask, 0).mul_(decay).add_(m)
