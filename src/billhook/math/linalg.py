"""Symmetric positive definite systems: the one place that damps and factors a Gram."""

import torch
from torch import Tensor

from billhook.errors import BillhookError
from billhook.tensors import Gram, Kept

DAMPING_START = 1e-12  # first value of a damping that grows from zero
DAMPING_LIMIT = 1.0  # share of the mean diagonal beyond which a solution shows the damping, not the data


def damped(gram: Gram, damping: float, among: Kept | None = None) -> Tensor:
    """G + delta I with delta = damping * mean(diag G), for the columns `among`;
    a Gram of zeros becomes the identity."""
    result = gram.clone() if among is None else gram[among.unsqueeze(1), among]
    mean = result.diagonal().mean()
    result.diagonal().add_(damping * mean if mean > 0 else result.new_ones(()))
    return result


def factor(gram: Gram, damping: float, among: Kept | None = None) -> tuple[Tensor, float]:
    """Lower Cholesky factor of the damped Gram, and the damping that was needed.

    While the factorisation fails the damping grows tenfold, up to `DAMPING_LIMIT`.

    Args:
        among: columns of the Gram to factor; None for all.

    Raises:
        BillhookError: the Gram is not positive definite even with the largest damping.
    """
    while True:
        # column-major, as LAPACK wants it, so that the factor is computed in place: a Gram may be a tenth of memory
        lower = damped(gram, damping, among).mT
        failed = torch.empty((), dtype=torch.int32, device=gram.device)
        torch.linalg.cholesky_ex(lower, out=(lower, failed))
        if not failed.item():
            return lower, damping
        if damping >= DAMPING_LIMIT:
            raise BillhookError(f"a Gram of size {len(gram)} cannot be factored even with damping {damping:g}")
        damping = min(max(damping * 10, DAMPING_START), DAMPING_LIMIT)
