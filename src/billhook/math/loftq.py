"""LoftQ: adapters that start at what few bits took away (Li et al. 2023, arXiv:2310.08659).

    minimise over A, B  || W - Q - s B A ||_F      by the r largest singular values of W - Q

The paper then rounds W - s B A anew and goes round five times.  Here Q stays as it was packed: the base is a file that
others read, and the adapters are made for it.
"""

import torch

from billhook.tensors import Expand, Reduce, Weight, precise


def factors(W: Weight, Q: Weight, rank: int, scale: float | int) -> tuple[Reduce, Expand]:
    """A (rank, in) and B (out, rank) of the least ||W - Q - scale B A||, of equal norms; float64.

    Directions beyond the rank of W - Q are zero.
    """
    E = (precise(W) - precise(Q)) / scale
    left, sizes, right = torch.linalg.svd(E, full_matrices=False)
    found = min(rank, len(sizes))
    A, B = E.new_zeros(rank, E.shape[1]), E.new_zeros(len(E), rank)
    roots = sizes[:found].sqrt()
    A[:found], B[:, :found] = roots[:, None] * right[:found], left[:, :found] * roots
    return A, B
