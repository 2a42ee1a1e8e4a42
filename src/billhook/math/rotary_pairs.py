"""Which pairs of query and key channels matter (the query and key half of MoDeGPT, Lin et al. 2024, arXiv:2408.09632).

Rotary positions turn channels i and i + d/2 of a head, one pair, by an angle of their own, so that a score is a sum
over pairs, and a pair may go from queries and keys together.  With the energies of a head's channels over the text,

    e_i = sum of y_i^2,   y = W x + b,          E_p = e_p + e_(p + d/2)      of pair p, which no turn changes,
    s_p = E_p(keys) * sum over the query heads that share them of E_p(queries)

The paper adds up products of channels, e_i(queries) e_i(keys); turns mix the two of a pair, so that here pairs are
multiplied.
"""

from collections.abc import Sequence

import torch

from billhook.math.low_rank import InputSums
from billhook.tensors import Bias, ChannelEnergies, KeyEnergies, PairScores, RotaryPairs, Weight, precise


def energies(W: Weight, bias: Bias | None, sums: InputSums, heads: int) -> ChannelEnergies:
    """e of the channels that a weight writes, float64; its rows are head by head."""
    W = precise(W).to(sums.gram.device)
    found = ((W @ sums.gram) * W).sum(1)
    if bias is not None:
        b = precise(bias).to(W.device)
        found = found + 2 * b * (W @ sums.total) + sums.count * b.square()
    return found.view(heads, -1)


def pair_scores(queries: ChannelEnergies, keys: KeyEnergies) -> PairScores:
    """s of each KV head's pairs."""
    of_queries = queries.unflatten(1, (2, -1)).sum(1).unflatten(0, (len(keys), -1)).sum(1)
    return of_queries * keys.unflatten(1, (2, -1)).sum(1)


def in_common(scores: Sequence[PairScores]) -> PairScores:
    """Scores for pairs that all heads of all layers keep or lose together: the mean of each head's shares."""
    shares = torch.cat([one / one.sum(1, keepdim=True).clamp(min=torch.finfo(one.dtype).tiny) for one in scores])
    return shares.mean(0).expand_as(scores[0])


def best(scores: PairScores, count: int) -> RotaryPairs:
    """The pairs of the highest scores, `count` of each head."""
    order = scores.argsort(dim=1, descending=True, stable=True)
    return tuple(tuple(sorted(one)) for one in order[:, :count].tolist())
