"""Symmetric positive definite systems: the one place that damps and factors a Gram."""

import torch

from billhook.errors import BillhookError
from billhook.tensors import Gram

DAMPING_START = 1e-12  # where a damping of zero starts to grow
DAMPING_LIMIT = 1.0  # past this share of the mean diagonal the "solution" is the damping, not the data


def damped(gram: Gram, damping: float) -> Gram:
    """G + delta I with delta = damping * mean(diag G); a Gram of zeros becomes the identity."""
    mean = gram.diagonal().mean()
    delta = damping * mean if mean > 0 else gram.new_ones(())
    found = gram.clone()
    found.diagonal().add_(delta)
    return found


def factor(gram: Gram, damping: float) -> tuple[Gram, float]:
    """Lower Cholesky factor of the damped Gram, and the damping that it took.

    The damping grows tenfold, up to `DAMPING_LIMIT`, while the factorisation fails.

    Raises:
        BillhookError: the Gram is not positive definite even then (it is not a Gram).
    """
    while True:
        lower = damped(
            gram, damping
        ).mT  # LAPACK's order, so that the factor takes its place: a Gram may be a tenth of memory
        failed = torch.empty((), dtype=torch.int32, device=gram.device)
        torch.linalg.cholesky_ex(lower, out=(lower, failed))
        if not failed.item():
            return lower, damping
        if damping >= DAMPING_LIMIT:
            raise BillhookError(f"a Gram of size {len(gram)} cannot be factored even with damping {damping:g}")
        damping = min(max(damping * 10, DAMPING_START), DAMPING_LIMIT)
