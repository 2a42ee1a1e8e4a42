"""Value channels turned to their principal axes (the value half of MoDeGPT, Lin et al. 2024, arXiv:2408.09632).

A KV head's values v, and what attention makes of them, a = sum_t p_t v_t, live in the same space, and the output
projection reads a linearly.  So any invertible T turns values into T v and the projection O into O T^-1 without
changing the model.  With S_h = sum of a a^T over tokens for each query head h that shares the KV head, O_h its columns
of the projection, S = sum of the S_h, w_h = tr S_h / tr S, and

    U diag(s^2) U^T = S^(-1/2) (sum_h S_h O_h^T O_h S_h / w_h) S^(-1/2),   T = diag(s) U^T S^(-1/2)

the turned channels do not correlate, and a channel's share of the projection's output is about its s^2.  Of one query
head it is just that: dropping the last channels is the least that a projection of that rank can lose (Eckart, Young).
The paper has a turn for each head; to share one is what grouped queries ask for.
"""

import torch
from torch import Tensor

from billhook.math.linalg import damped
from billhook.tensors import ValueMoments, ValueTurn

DEAD = 1e-6  # the least s, as a share of the largest: what is never read, or never there, still turns back


def principal_turn(moments: ValueMoments, reads: ValueMoments, damping: float) -> tuple[ValueTurn, ValueTurn]:
    """T and its inverse, float64; the turned channel that the output needs most comes first.

    T is scaled so that the columns of O T^-1 are about as long as one another, and as O's.

    Args:
        moments: S_h of each query head, summed over tokens.
        reads: O_h^T O_h.
        damping: what is added to S's diagonal, as a share of its mean.
    """
    moments, reads = moments.double(), reads.double()
    S = damped(moments.sum(0), damping)
    variances, directions = torch.linalg.eigh(S)
    half = directions * variances.sqrt() @ directions.mT
    inverse = directions / variances.sqrt() @ directions.mT
    weights = _above(moments.diagonal(dim1=1, dim2=2).sum(1) / S.trace())
    needed = (moments @ reads @ moments / weights[:, None, None]).sum(0)
    squares, turned = torch.linalg.eigh(inverse @ needed @ inverse)
    squares, turned = squares.flip(0), turned.flip(1)
    strengths = _above(squares.clamp(min=0).sqrt())
    strengths = strengths / _above(reads.diagonal(dim1=1, dim2=2).sum(0).mean().sqrt())
    return strengths[:, None] * turned.mT @ inverse, half @ turned / strengths


def _above(values: Tensor) -> Tensor:
    """None of them zero."""
    largest = values.max()
    return values.clamp(min=float(DEAD * largest)) if largest > 0 else torch.ones_like(values)
