"""Closed-form reconstruction of the kept weights: no training, no gradients."""

from collections.abc import Callable, Iterator

import torch

from billhook.math.linalg import factor
from billhook.tensors import Cross, Gram, Kept, Narrowed, Weight

BLOCKS = 16  # block rows of D^T D, so that 17 of 32 parts of it are computed
ROWS = 512  # rows of a reader in float64 at a time: a whole one takes as much memory as its Gram


def least_squares(W: Weight, G: Gram, kept: Kept, damping: float, C: Cross | None = None) -> tuple[Narrowed, float]:
    """The kept columns that best reproduce the whole reader, and the damping used.

        V = argmin_V ||V X_S^T - (W X^T + E^T)||_F^2 + delta ||V - W_S||_F^2
          = W_S + (W_P G_PS + C_S) (G_SS + delta I)^-1

    with S kept, P pruned, delta = damping * mean(diag G_SS), and C = E^T X for an output E that the reader should gain
    (None: E = 0).  FASP's restoration (arXiv:2501.09412), with the ridge toward the kept weights rather than toward
    zero: as delta grows V becomes W_S, plain pruning.  float64 inside; V has W's dtype.
    """
    kept_set = _mask(len(G), kept)
    lower, used = factor(G, damping, kept)
    across = G[(~kept_set).nonzero(), kept]
    V = W[:, kept]
    for start in range(0, len(W), ROWS):
        rows = slice(start, start + ROWS)
        pull = W[rows, ~kept_set].double() @ across
        if C is not None:
            pull += C[rows, kept]
        V[rows] = torch.cholesky_solve(pull.T, lower).T + V[rows]
    return V, used


def toward(W: Weight, T: Cross, G: Gram, damping: float, share: float = 1.0) -> tuple[Weight, float]:
    """The whole weight on its way to an output, and the damping used.

        V = W + s (T - W G)(G + delta I)^-1,  T = Y^T X, G = X^T X, delta = damping * mean(diag G)

    With s = 1 it is argmin_V ||V X^T - Y^T||_F^2 + delta ||V - W||_F^2; with s = 0 it is W.  float64 inside and out.
    """
    lower, used = factor(G, damping)
    lacks = share * (T - W.double() @ G)
    return W.double() + torch.cholesky_solve(lacks.T, lower).T, used


def energy(W: Weight, G: Gram) -> float:
    """||W X^T||_F^2, the energy of a reader's output."""
    return _quadratic(lambda rows: W[rows].double(), len(W), G).item()


def squared_error(
    W: Weight, V: Narrowed | None, G: Gram, kept: Kept, C: Cross | None = None, lack: float = 0.0
) -> float:
    """||V X_S^T - (W X^T + E^T)||_F^2 from sums alone; lack = ||E||_F^2; V None stands for the unchanged kept columns.

    With D = V - W, zero-filled: tr(D G D^T) - 2 tr(D C^T) + ||E||^2.
    """
    pruned = ~_mask(len(G), kept)
    if V is None:  # D is zero in the kept columns, which saves most of the work
        G, C = G[pruned][:, pruned], None if C is None else C[:, pruned]

    def difference(rows: slice) -> torch.Tensor:
        if V is None:
            return -W[rows, pruned].double()
        D = -W[rows].double()
        D[:, kept] += V[rows].double()
        return D

    total = lack + _quadratic(difference, len(W), G)
    if C is not None:
        for rows in _slices(len(W), ROWS):
            total -= 2 * (difference(rows) * C[rows]).sum()
    return max(total.item(), 0.0)


def _quadratic(rows_of: Callable[[slice], torch.Tensor], count: int, G: Gram) -> torch.Tensor:
    """tr(D G D^T), the sum of all entries of G * D^T D, which is symmetric: half of it is computed, block by block.

    Args:
        rows_of: some rows of D, in float64.
        count: rows of D.
    """
    total = G.new_zeros(())
    for rows in _slices(count, ROWS):
        D = rows_of(rows)
        for columns in _slices(len(G), -(-len(G) // BLOCKS)):
            after = slice(columns.start, len(G))
            terms = (D[:, columns].T @ D[:, after]).mul_(G[columns, after])
            total += 2 * terms.sum() - terms[:, : len(terms)].sum()
    return total


def _slices(size: int, step: int) -> Iterator[slice]:
    return (slice(at, at + step) for at in range(0, size, max(step, 1)))


def _mask(size: int, chosen: Kept) -> torch.Tensor:
    mask = torch.zeros(size, dtype=torch.bool, device=chosen.device)
    mask[chosen] = True
    return mask
