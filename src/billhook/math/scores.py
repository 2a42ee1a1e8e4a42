"""Importance of the columns of a reader: the error of the layer's output without one of them.

W (out, in) reads the axis; X (tokens, in) is its input; G = X^T X, so ||X_j||_2 = sqrt(G_jj).
Scores compare columns of one reader; across readers their scales differ.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from billhook.math.linalg import factor
from billhook.tensors import Columns, Gram, Moment, Scores, Weight, Writer

BLOCK = 512  # rows and columns of L^-1 at a time
ROWS = 512  # rows of a reader in float64 at a time: a whole one may take as much memory as its Gram


def wanda_columns(W: Weight, G: Gram, damping: float = 0.0) -> Columns:
    """s_j = ||W_:,j||_1 ||X_j||_2:
    Wanda (arXiv:2306.11695) summed down a column, FASP's own score (arXiv:2501.09412)."""
    return W.double().abs().sum(0) * G.diagonal().sqrt()


def energy_columns(W: Weight, G: Gram, damping: float = 0.0) -> Columns:
    """s_j = ||W_:,j||_2^2 G_jj: the squared output error of zeroing column j, with the others unchanged."""
    return W.double().square().sum(0) * G.diagonal()


def output_metric(B: Weight, writers: Sequence[Writer], moment: Moment) -> Columns:
    """M_j = product over the writers A of 1/2 ||B_:,j||_2^2 a_j^T Sigma a_j: what channel j puts out, by its input.

    Greedy Output Approximation (arXiv:2407.19126), the second-moment metric of f(x) = B sigma(A x): B (out, in) reads
    the channels, row a_j of A writes channel j, and Sigma = E[x x^T] is the `moment` of what enters A, of which any
    multiple gives the same order.  A gated FFN has two writers; the half stands for ReLU, GELU or SiLU.  Biases are
    left out, as in the paper.
    """
    norms, found = B.double().square().sum(0), torch.ones((), dtype=torch.float64, device=B.device)
    for A in writers:
        a = A.double()
        found = found * (0.5 * norms * ((a @ moment) * a).sum(1))
    return found


def obs_columns(W: Weight, G: Gram, damping: float = 1e-3) -> Columns:
    """s_j = sum_i W_ij^2 / [(G + delta I)^-1]_jj: the squared error of removing column j *after* reconstruction.

    Optimal brain surgery (Hassibi & Stork 1993) over whole columns, as in OSSCAR (arXiv:2403.12983).
    """
    energy = sum((rows.double().square().sum(0) for rows in W.split(ROWS)), torch.zeros(()))
    lower, _ = factor(G, damping)
    # (L L^T)^-1 has the squared column norms of L^-1 on its diagonal: a third of the work of the inverse, less memory
    return energy / torch.cat([_inverse_columns(lower, at).square_().sum(0) for at in range(0, len(G), BLOCK)])


def _inverse_columns(lower: Gram, at: int) -> Tensor:
    """A block of columns of L^-1 from `at` on, without the rows above `at`, which are zero."""
    width = min(BLOCK, len(lower) - at)
    columns = torch.eye(len(lower) - at, width, dtype=lower.dtype, device=lower.device)
    for row in range(at, len(lower), BLOCK):
        block_rows = slice(row - at, row - at + BLOCK)
        columns[block_rows] -= lower[row : row + BLOCK, at:row] @ columns[: row - at]
        block = lower[row : row + BLOCK, row : row + BLOCK]
        columns[block_rows] = torch.linalg.solve_triangular(block, columns[block_rows], upper=False)
    return columns


COLUMN_SCORES: dict[str, Callable[[Weight, Gram, float], Columns]] = {
    "obs": obs_columns,
    "wanda": wanda_columns,
    "energy": energy_columns,
}
Key = TypeVar("Key", bound=Hashable)


def fluctuation_columns(W: Weight, variance: Columns) -> Columns:
    """s_j = Var(x_j) ||W_:,j||_2^2:
    FLAP's WIFV (arXiv:2312.11983), the squared output error of input j held at its mean.

    Without gradients; `variance` (in,) is the sample variance over tokens of the reader's input.  It depends on the
    output's scale: compares within a reader, and across layers only after `standardised`.
    """
    return W.double().square().sum(0) * variance


def standardised(scores: Mapping[Key, Scores]) -> dict[Key, Scores]:
    """(s - mean s) / deviation of s, layer by layer, so that layers compare: FLAP's adaptive search (arXiv:2312.11983).

    The deviation is the sample's; equal scores (or a single one) become zeros.  It assumes that all layers are equally
    important: scores that compare across layers get worse by it.  FLAP standardises the columns of o, not heads, and
    takes the mean over a head's columns afterwards.
    """
    return {key: _standardised(values) for key, values in scores.items()}


def _standardised(scores: Scores) -> Scores:
    away = scores.double() - scores.double().mean()
    deviation = (away.square().sum() / max(len(scores) - 1, 1)).sqrt()
    return away / deviation if deviation > 0 else torch.zeros_like(away)
