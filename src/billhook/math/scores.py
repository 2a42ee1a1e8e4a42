"""Importance of the columns of a reader: what the layer's output loses when one goes.

W (out, in) reads the axis; X (tokens, in) is what enters it; G = X^T X, so ||X_j||_2 = sqrt(G_jj).
Scores compare columns of one reader; across readers their scales differ.
"""

from collections.abc import Callable, Hashable, Mapping
from typing import TypeVar

import torch
from torch import Tensor

from billhook.math.linalg import factor
from billhook.tensors import Columns, Gram, Scores, Weight

BLOCK = 512  # rows and columns of L^-1 at a time
ROWS = 512  # of a reader: in float64 a whole one may take as much as its Gram


def wanda_columns(W: Weight, G: Gram, damping: float = 0.0) -> Columns:
    """s_j = ||W_:,j||_1 ||X_j||_2: Wanda (arXiv:2306.11695) summed down a column, FASP's own score (arXiv:2501.09412)."""
    return W.double().abs().sum(0) * G.diagonal().sqrt()


def energy_columns(W: Weight, G: Gram, damping: float = 0.0) -> Columns:
    """s_j = ||W_:,j||_2^2 G_jj: the squared output error of zeroing column j, the others left as they are."""
    return W.double().square().sum(0) * G.diagonal()


def obs_columns(W: Weight, G: Gram, damping: float = 1e-3) -> Columns:
    """s_j = sum_i W_ij^2 / [(G + delta I)^-1]_jj: the squared error of removing column j *after* the best repair.

    Optimal brain surgery (Hassibi & Stork 1993) over whole columns, as in OSSCAR (arXiv:2403.12983).
    """
    energy = sum((rows.double().square().sum(0) for rows in W.split(ROWS)), torch.zeros(()))
    lower, _ = factor(G, damping)
    # (L L^T)^-1 has the squared column norms of L^-1 on its diagonal: a third of the work of forming the inverse, and less memory
    return energy / torch.cat([_inverse_columns(lower, at).square_().sum(0) for at in range(0, len(G), BLOCK)])


def _inverse_columns(lower: Gram, at: int) -> Tensor:
    """The columns of L^-1 from `at` on, a block of them, from row `at` down, above which they are zero."""
    width = min(BLOCK, len(lower) - at)
    found = torch.eye(len(lower) - at, width, dtype=lower.dtype, device=lower.device)
    for row in range(at, len(lower), BLOCK):
        here = slice(row - at, row - at + BLOCK)
        found[here] -= lower[row : row + BLOCK, at:row] @ found[: row - at]
        block = lower[row : row + BLOCK, row : row + BLOCK]
        found[here] = torch.linalg.solve_triangular(block, found[here], upper=False)
    return found


COLUMN_SCORES: dict[str, Callable[[Weight, Gram, float], Columns]] = {
    "obs": obs_columns,
    "wanda": wanda_columns,
    "energy": energy_columns,
}
Key = TypeVar("Key", bound=Hashable)


def fluctuation_columns(W: Weight, variance: Columns) -> Columns:
    """s_j = Var(x_j) ||W_:,j||_2^2: FLAP's WIFV (arXiv:2312.11983), the squared output error of holding input j at its mean.

    No gradient: `variance` (in,) is the sample variance over tokens of what enters the reader.  The output's scale is in it:
    compares within a reader, across layers after `standardised` alone.
    """
    return W.double().square().sum(0) * variance


def standardised(scores: Mapping[Key, Scores]) -> dict[Key, Scores]:
    """(s - mean s) / deviation of s, layer by layer, so that layers compare: FLAP's adaptive search (arXiv:2312.11983).

    The deviation is the sample's; scores that do not deviate, a single one among them, become zeros.  It assumes that every
    layer matters alike: scores that compare without it lose by it.  FLAP standardises the columns of o, not the heads, and
    takes the mean over those of a head after.
    """
    return {key: _standardised(each) for key, each in scores.items()}


def _standardised(scores: Scores) -> Scores:
    away = scores.double() - scores.double().mean()
    deviation = (away.square().sum() / max(len(scores) - 1, 1)).sqrt()
    return away / deviation if deviation > 0 else torch.zeros_like(away)
