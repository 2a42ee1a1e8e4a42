"""Experts that do the same become one: UNCURL's reduction (arXiv:2409.01483) on weights and router logits alone.

L (tokens, experts) are router logits on the text of the task;  f_i how often expert i is chosen.
1. Similarity   of two experts: the cosine of their columns of L.
2. Groups       spectral clustering of the similarities into as many as experts stay.
3. Alignment    the channels of an expert are permuted to match those of its group's most frequent one.
4. Merge        W = sum f_i W_i / sum f_i over a group.
The paper's code was not found; what its abstract and readers leave open (the clustering's last step, the similarity's range) is
as written here.
"""

from collections.abc import Sequence

import torch
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from billhook.tensors import Gram, Scores, Units, precise


def groups(logits: Gram, count: int) -> list[list[int]]:
    """Steps 1 and 2: the members of each of `count` groups, from L^T L.

    The rows of the first `count` eigenvectors of the normalised Laplacian, joined bottom up by Ward's criterion: as many groups
    as asked for, none empty, the same every time.
    """
    if count == len(logits):
        return [[n] for n in range(count)]
    norms = logits.diagonal().clamp(min=torch.finfo(logits.dtype).tiny).sqrt()
    alike = (1 + logits / norms / norms[:, None]) / 2  # a graph wants weights that are not negative
    scale = alike.sum(1).rsqrt()
    vectors = torch.linalg.eigh(torch.eye(len(alike), dtype=alike.dtype) - alike * scale * scale[:, None])[1][:, :count]
    rows = vectors / vectors.norm(dim=1, keepdim=True).clamp(min=torch.finfo(alike.dtype).tiny)
    labels = fcluster(linkage(rows.numpy(), "ward"), count, "maxclust").tolist()
    found = [[n for n, label in enumerate(labels) if label == one] for one in dict.fromkeys(labels)]
    while len(found) < count:  # rows that are equal
        largest = max(found, key=len)
        found.append([largest.pop()])
    return found


def aligned(rows: Sequence[tuple[Tensor, Tensor]]) -> Units:
    """Step 3: which of an expert's channels stands where, from (reference, expert) pairs of its weights as (channels, other)."""
    alike = sum((reference.double() @ other.double().T for reference, other in rows), torch.zeros(()))
    return torch.from_numpy(linear_sum_assignment(alike.numpy(), maximize=True)[1])


def weighted(weights: Sequence[Tensor], frequency: Scores) -> Tensor:
    """Step 4; a plain mean where none was ever chosen."""
    shares = frequency / frequency.sum() if frequency.sum() > 0 else torch.full_like(frequency, 1 / len(frequency))
    total = sum((share * precise(one) for share, one in zip(shares, weights, strict=True)), torch.zeros(()))
    return total.to(weights[0].dtype).to(weights[0].device)
