"""Similar experts are merged into one: UNCURL's reduction (arXiv:2409.01483), from weights and router logits alone.

L (tokens, experts) are router logits on the text of the task;  f_i is how often expert i is chosen.
1. Similarity   of two experts: the cosine of their columns of L.
2. Groups       spectral clustering of the similarities, one cluster for each expert that stays.
3. Alignment    the channels of an expert are permuted to match those of its group's most frequent one.
4. Merge        W = sum f_i W_i / sum f_i over a group.
The paper's code was not found: what its abstract and readers leave open (the clustering's last step, the range of the
similarity) is our choice.
"""

from collections.abc import Sequence

import torch
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from billhook.tensors import Gram, Scores, Units, precise


def groups(logits: Gram, count: int) -> list[list[int]]:
    """Steps 1 and 2: the members of each of `count` groups, from L^T L.

    The rows of the first `count` eigenvectors of the normalised Laplacian are joined bottom up by Ward's criterion.
    That is deterministic, and leaves no group empty.
    """
    if count == len(logits):
        return [[n] for n in range(count)]
    norms = logits.diagonal().clamp(min=torch.finfo(logits.dtype).tiny).sqrt()
    similarity = (1 + logits / norms / norms[:, None]) / 2  # weights of a graph must not be negative
    scale = similarity.sum(1).rsqrt()
    vectors = torch.linalg.eigh(
        torch.eye(len(similarity), dtype=similarity.dtype) - similarity * scale * scale[:, None]
    )[1][:, :count]
    rows = vectors / vectors.norm(dim=1, keepdim=True).clamp(min=torch.finfo(similarity.dtype).tiny)
    labels = fcluster(linkage(rows.numpy(), "ward"), count, "maxclust").tolist()
    members = [[n for n, label in enumerate(labels) if label == group] for group in dict.fromkeys(labels)]
    while len(members) < count:  # equal rows have one label
        largest = max(members, key=len)
        members.append([largest.pop()])
    return members


def aligned(rows: Sequence[tuple[Tensor, Tensor]]) -> Units:
    """Step 3: the permutation of an expert's channels,
    from (reference, expert) pairs of weights as (channels, other)."""
    similarity = sum((reference.double() @ weight.double().T for reference, weight in rows), torch.zeros(()))
    return torch.from_numpy(linear_sum_assignment(similarity.numpy(), maximize=True)[1])


def weighted(weights: Sequence[Tensor], frequency: Scores) -> Tensor:
    """Step 4; a plain mean if none of the experts was ever chosen."""
    shares = frequency / frequency.sum() if frequency.sum() > 0 else torch.full_like(frequency, 1 / len(frequency))
    total = sum((share * precise(weight) for share, weight in zip(shares, weights, strict=True)), torch.zeros(()))
    return total.to(weights[0].dtype).to(weights[0].device)
