"""Ranks that fall with depth by condition numbers (LoRC, Zhang et al. 2024, arXiv:2410.03111).

kappa_l = product over layers j >= l of kappa(W_k^j) kappa(W_v^j): what an error made in layer l may grow to.

    d_l = d_max [1 - x_l (1 - d_min / d_max)],   x_l = (max log kappa - log kappa_l) / (max log kappa - min log kappa)

kappa never rises with depth, so that the first layer keeps d_max and the last d_min.  Where the condition numbers of
layers are alike, log kappa is a straight line, and so are the ranks, whatever the weights are.
"""

from collections.abc import Sequence
from itertools import accumulate
from math import log

import torch

from billhook.tensors import Weight, precise

SINGULAR = 1e-6  # the least singular value that counts, as a share of the largest


def condition(W: Weight) -> float:
    """The largest singular value over the smallest; one that is nearly 0 counts as `SINGULAR`."""
    values = torch.linalg.svdvals(precise(W))
    return float(values[0] / values[-1].clamp(min=float(SINGULAR * values[0]))) if values[0] > 0 else 1.0


def depths(conditions: Sequence[float]) -> list[float]:
    """x_l of each layer, from 0 to 1, by kappa(W_k) kappa(W_v) of each; 0 where all are 1."""
    grown = list(accumulate(map(log, reversed(conditions))))[::-1]
    span = grown[0] - grown[-1]
    return [(grown[0] - one) / span if span > 0 else 0.0 for one in grown]
