"""Closed-form repair of the kept weights: no training, no gradients."""

import torch

from billhook.linalg import factor
from billhook.tensors import Cross, Gram, Kept, Narrowed, Weight


def least_squares(W: Weight, G: Gram, kept: Kept, damping: float, C: Cross | None = None) -> tuple[Narrowed, float]:
    """The kept columns that best reproduce the whole reader, and the damping used.

        V = argmin_V ||V X_S^T - (W X^T + E^T)||_F^2 + delta ||V - W_S||_F^2
          = W_S + (W_P G_PS + C_S) (G_SS + delta I)^-1

    with S kept, P pruned, delta = damping * mean(diag G_SS), and C = E^T X for an output E that the reader should add to
    its own (none: E = 0).  FASP's restoration (arXiv:2501.09412), with the ridge drawn toward the kept weights rather
    than toward zero: as delta grows V becomes W_S, plain pruning.  float64 inside; V has W's dtype.
    """
    kept_set = _mask(len(G), kept)
    lower, used = factor(G[kept.unsqueeze(1), kept], damping)
    pull = W[:, ~kept_set].double() @ G[~kept_set][:, kept]
    if C is not None:
        pull = pull + C[:, kept]
    V = torch.cholesky_solve(pull.T, lower).T
    V += W[:, kept]
    return V.to(W.dtype), used


def relative_error(W: Weight, V: Narrowed, G: Gram, kept: Kept, C: Cross | None = None, energy: float = 0.0) -> float:
    """||V X_S^T - (W X^T + E^T)||_F / ||W X^T||_F from sums alone, energy = ||E||_F^2.

    With D = V - W, zero-filled: the square is tr(D G D^T) - 2 tr(D C^T) + ||E||^2.
    """
    D = -W.double()
    D[:, kept] += V.double()
    square = ((D @ G) * D).sum() + energy - (2 * (D * C).sum() if C is not None else 0.0)
    whole = ((W.double() @ G) * W.double()).sum()
    return float((square.clamp(min=0) / whole).sqrt()) if whole > 0 else 0.0


def _mask(size: int, chosen: Kept) -> torch.Tensor:
    mask = torch.zeros(size, dtype=torch.bool, device=chosen.device)
    mask[chosen] = True
    return mask
