"""Importance of the columns of a reader: what the layer's output loses when one goes.

W (out, in) reads the axis; X (tokens, in) is what enters it; G = X^T X, so ||X_j||_2 = sqrt(G_jj).
Scores compare columns of one reader; across readers their scales differ.
"""

from collections.abc import Callable

import torch

from billhook.linalg import factor
from billhook.tensors import Columns, Gram, Weight

OBS_COLUMNS = 512  # of L^-1 at a time


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
    energy = W.double().square().sum(0)
    lower, _ = factor(G, damping)
    # (L L^T)^-1 has the squared column norms of L^-1 on its diagonal: half the work of forming the inverse, and less memory
    norms = []
    for start in range(0, len(G), OBS_COLUMNS):
        unit = torch.zeros(len(G), min(OBS_COLUMNS, len(G) - start), dtype=G.dtype, device=G.device)
        unit[start:].fill_diagonal_(1)
        norms.append(torch.linalg.solve_triangular(lower, unit, upper=False).square_().sum(0))
    return energy / torch.cat(norms)


SCORES: dict[str, Callable[[Weight, Gram, float], Columns]] = {
    "obs": obs_columns,
    "wanda": wanda_columns,
    "energy": energy_columns,
}
