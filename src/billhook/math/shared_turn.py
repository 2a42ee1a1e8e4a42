"""One turn for the query heads that share a KV head, fitted to the channels that stay: alternating least squares.

a = [a_1; ...; a_H] is what attention makes of a KV head's values in each of its query heads, M = sum a a^T over tokens;
O = [O_1 ... O_H] reads them, Q = O^T O.  Values T v, T (kept, channels), read by any projection R = [R_1 ... R_H], lose

    || O a - sum_h R_h T a_h ||^2     summed over tokens

1. R = O M B (B^T M B)^-1, B = I_H (x) T^T: the best projection of such values.
2. T: the best values for such a projection solve sum_hg R_h^T R_g T M_gh = sum_hg R_h^T O_g M_gh, by some steps of
   conjugate gradients from the T that is there.

Neither step raises the loss.  Of one query head, principal axes are the end of it already.
"""

import torch
from torch import Tensor

from billhook.tensors import Stacked, ValueRows, ValueTurn

SWEEPS, STEPS = 12, 10  # of both steps, and of conjugate gradients in each
RIDGE = 1e-9  # of the first step, as a share of the mean diagonal


def fitted_turn(onto: ValueTurn, back: ValueTurn, M: Stacked, Q: Stacked, kept: int) -> tuple[ValueTurn, ValueTurn]:
    """Another turn and its inverse, float64, whose first `kept` channels are those of step 2, from the first of `onto`.

    It differs from `onto` by a rotation.

    Args:
        M, Q: of all query heads, one behind another, before any turn.
    """
    heads = len(M) // len(onto)
    across, undo = torch.block_diag(*[onto] * heads), torch.block_diag(*[back] * heads)
    start = torch.eye(len(onto), dtype=onto.dtype, device=onto.device)[:kept]
    T = fitted_rows(start, across @ M.double() @ across.mT, undo.mT @ Q.double() @ undo)
    rotation = torch.linalg.qr(T.mT, mode="complete").Q
    return rotation.mT @ onto, back @ rotation


def fitted_rows(T: ValueRows, M: Stacked, Q: Stacked) -> ValueRows:
    """T after `SWEEPS` of both steps; float64.

    Args:
        T: where it starts: principal axes, for example.
        M, Q: of all query heads, one behind another.
    """
    for _ in range(SWEEPS):
        T = _values(T, _read(T, M), M, Q)
    return T


def loss(T: ValueRows, M: Stacked, Q: Stacked) -> float:
    """What the best projection of values T v loses."""
    lacks = torch.eye(len(M), dtype=M.dtype, device=M.device) - _spread(T, M) @ _read(T, M)
    return float(((lacks.mT @ M @ lacks) * Q).sum())


def _spread(T: ValueRows, M: Stacked) -> Tensor:
    """B, of as many heads as M has."""
    return torch.block_diag(*[T.mT] * (len(M) // T.shape[1]))


def _read(T: ValueRows, M: Stacked) -> Tensor:
    """(B^T M B)^-1 B^T M, so that R = O times its transpose."""
    B = _spread(T, M)
    inner = B.mT @ M @ B
    inner.diagonal().add_(RIDGE * inner.diagonal().mean())
    return torch.linalg.solve(inner, B.mT @ M)


def _values(T: ValueRows, read: Tensor, M: Stacked, Q: Stacked) -> ValueRows:
    """Step 2."""
    (kept, channels), heads = T.shape, len(M) // T.shape[1]
    by_head = M.view(heads, channels, heads, channels)
    squares = (read @ Q @ read.mT).view(heads, kept, heads, kept)
    wanted = torch.einsum("hrgd,gdhe->re", (read @ Q).view(heads, kept, heads, channels), by_head)

    def applied(rows: Tensor) -> Tensor:
        return torch.einsum("hrgs,sd,gdhe->re", squares, rows, by_head)

    left = wanted - applied(T)
    direction, size = left, left.square().sum()
    for _ in range(STEPS):
        if size <= torch.finfo(T.dtype).tiny:
            break
        moved = applied(direction)
        step = size / (direction * moved).sum()
        T, left = T + step * direction, left - step * moved
        direction, size = left + left.square().sum() / size * direction, left.square().sum()
    return T
