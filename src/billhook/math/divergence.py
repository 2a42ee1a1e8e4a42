"""How alike attention maps are, and which heads that makes redundant.

Greedy Output Approximation (arXiv:2407.19126), its criterion of similarity.
"""

import math

import torch

from billhook.tensors import AttentionMaps, Pairs, Scores, precise

MOST = math.log(2)  # of a divergence, in nats


def jensen_shannon(maps: AttentionMaps) -> Pairs:
    """D_ij = sum over rows r of JS(P_ir || P_jr) in nats, for the units i and j of every block.

    JS(P || Q) = H((P + Q) / 2) - (H(P) + H(Q)) / 2 with the entropy H: 0 for equal chances, at most ln 2.  In the dtype
    of the maps, summed over rows in float64.
    """
    own = torch.special.entr(maps).sum(-1)
    blocks, units = own.shape[:2]
    found = precise(own.new_zeros(blocks, units, units))
    for i in range(units - 1):
        middle = torch.special.entr((maps[:, i : i + 1] + maps[:, i + 1 :]) / 2).sum(-1)
        apart = middle - (own[:, i : i + 1] + own[:, i + 1 :]) / 2
        found[:, i, i + 1 :] = precise(apart.clamp(0, MOST)).sum(-1)
    return found + found.mT


def redundancy(D: Pairs) -> Scores:
    """s_i = min over j > i of D_ij, the blocks one after another; ln 2 for the last unit of a block.

    The paper's scan (Algorithm 2) goes through all i, and for each through all j: i is listed where D_ij < tau and
    neither is listed yet.  When it comes to i, none of those after it is listed, and one before it that is not has no
    D_ji < tau.  So i is listed just where s_i < tau, the last unit never, and the first of a larger tau are those of a
    smaller one: a count takes the place of tau.
    """
    after = torch.ones_like(D, dtype=torch.bool).triu(1)
    return D.masked_fill(~after, MOST).amin(-1).clamp(max=MOST).flatten()
