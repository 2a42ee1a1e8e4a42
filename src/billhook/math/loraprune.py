"""LoRAPrune's importance: what units are worth, from the gradients of low-rank adapters alone (arXiv:2305.18403).

W (rows, columns) is a frozen weight; B A its adapter, B (rows, r), A (r, columns), which adds s B A.

1. Gradient    G = dB A + B dA - dB dA        what one step of the adapter would change, in place of W's own gradient
2. Importance  |G * (W + s B A)|, summed over the entries of a unit along each weight that it owns rows or columns of;
               each weight's vector has length 1; a unit's importance is their sum
3. Average     0.9 of what was, 0.1 of what is
4. Schedule    the share that is gone after step t:  1 - (1 - t')^3,  t' from 0 to 1 between warm-up and cool-down

The paper's text squares step 2; the published code, which is under licences that conflict and of which nothing is here,
does not.
"""

from torch import Tensor

from billhook.tensors import DownAdapter, Index, Scores, UpAdapter, Weight, precise

REMEMBERED = 0.9  # step 3
STILL = 0.1  # share of the steps at the start, and at the end, that take nothing away


def estimated(A: DownAdapter, B: UpAdapter, dA: DownAdapter, dB: UpAdapter) -> Weight:
    """Step 1."""
    return dB @ A + B @ dA - dB @ dA


def importance(G: Weight, W: Weight, dim: int, index: Index) -> Scores:
    """Step 2 for one weight: a number for each unit, which owns the entries index[u] along `dim`; length 1, or 0.

    Args:
        W: with its adapter.
    """
    entries = (precise(G) * precise(W)).abs().sum(1 - dim)
    found = entries[index.to(entries.device)].sum(1)
    length = found.norm()
    return found / length if length > 0 else found


def averaged(before: Tensor, now: Tensor, first: bool) -> Tensor:
    """Step 3; the first step begins it.  Where `now` is no number the step is left out."""
    if not now.isfinite().all():
        return before
    return now if first else REMEMBERED * before + (1 - REMEMBERED) * now


def share_gone(step: int, steps: int) -> float:
    """Step 4: of what will be gone, the share that is after `step` of `steps`."""
    begins, ends = STILL * steps, (1 - STILL) * steps
    through = min(1.0, max(0.0, (step - begins) / (ends - begins)))
    return 1 - (1 - through) ** 3
