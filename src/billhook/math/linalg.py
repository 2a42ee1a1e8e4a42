"""Symmetric positive definite systems: the one place that damps and factors a Gram."""

import torch
from torch import Tensor

from billhook.errors import BillhookError
from billhook.tensors import Gram, Kept

DAMPING_START = 1e-12  # where a damping of zero starts to grow
DAMPING_LIMIT = 1.0  # past this share of the mean diagonal the "solution" is the damping, not the data


def damped(gram: Gram, damping: float, among: Kept | None = None) -> Tensor:
    """G + delta I with delta = damping * mean(diag G), of the columns `among` alone; a Gram of zeros becomes the identity."""
    found = gram.clone() if among is None else gram[among.unsqueeze(1), among]
    mean = found.diagonal().mean()
    found.diagonal().add_(damping * mean if mean > 0 else found.new_ones(()))
    return found


def factor(gram: Gram, damping: float, among: Kept | None = None) -> tuple[Tensor, float]:
    """Lower Cholesky factor of the damped Gram, and the damping that it took.

    The damping grows tenfold, up to `DAMPING_LIMIT`, while the factorisation fails.

    Args:
        among: the Gram of these columns alone.

    Raises:
        BillhookError: the Gram is not positive definite even then (it is not a Gram).
    """
    while True:
        # LAPACK's order, so that the factor takes its place: a Gram may be a tenth of memory
        lower = damped(gram, damping, among).mT
        failed = torch.empty((), dtype=torch.int32, device=gram.device)
        torch.linalg.cholesky_ex(lower, out=(lower, failed))
        if not failed.item():
            return lower, damping
        if damping >= DAMPING_LIMIT:
            raise BillhookError(f"a Gram of size {len(gram)} cannot be factored even with damping {damping:g}")
        damping = min(max(damping * 10, DAMPING_START), DAMPING_LIMIT)
