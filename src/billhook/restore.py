"""Closed-form repair of the kept weights: no training, no gradients."""

import torch

from billhook.linalg import factor
from billhook.tensors import Gram, Narrowed, Units, Weight


def least_squares(W: Weight, G: Gram, kept: Units, damping: float) -> tuple[Narrowed, float]:
    """The kept columns that best reproduce the whole reader, and the damping used.

        V = argmin_V ||V X_S^T - W X^T||_F^2 + delta ||V - W_S||_F^2
          = W_S + W_P G_PS (G_SS + delta I)^-1          S kept, P pruned, delta = damping * mean(diag G_SS)

    FASP's restoration (arXiv:2501.09412), with the ridge drawn toward the kept weights rather than toward zero: as
    delta grows V becomes W_S, plain pruning, and never less than that.  float64 inside; V has W's dtype.
    """
    W64, kept_set = W.double(), _mask(len(G), kept)
    lower, used = factor(G[kept][:, kept], damping)
    pull = W64[:, ~kept_set] @ G[~kept_set][:, kept]
    return (W64[:, kept] + torch.cholesky_solve(pull.T, lower).T).to(W.dtype), used


def relative_error(W: Weight, V: Narrowed, G: Gram, kept: Units) -> float:
    """||V X_S^T - W X^T||_F / ||W X^T||_F from the Gram alone: tr(D G D^T) with D = V - W."""
    D = -W.double()
    D[:, kept] += V.double()
    whole = ((W.double() @ G) * W.double()).sum()
    return float((((D @ G) * D).sum().clamp(min=0) / whole).sqrt()) if whole > 0 else 0.0


def _mask(size: int, chosen: Units) -> torch.Tensor:
    mask = torch.zeros(size, dtype=torch.bool, device=chosen.device)
    mask[chosen] = True
    return mask
