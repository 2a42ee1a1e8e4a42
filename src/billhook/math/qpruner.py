"""QPruner: bits by layer from mutual information (arXiv:2412.11629).

1. Worth        of a layer: I(X; Y) over calibration tokens, X its output along the first principal direction of its
                outputs, Y the loss of the same tokens in the dense model.
2. Start        all layers at the fewest bits; as long as the budget allows, raise the layer of the largest
                    I_l log2(b' / b) / (bytes that b' takes beyond b).
3. Refinement   by Bayesian optimisation of a measured loss: `billhook.pruning.bits_search`.

The paper's body was not at hand: its abstract, reviews and a third party's port say what is done.  The estimators and
constants are billhook's.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from billhook.tensors import Values, precise

BINS = 16  # of equal mass, for each of two variables


def principal(X: Tensor) -> Values:
    """Rows (tokens, hidden) as one number each: along the first principal direction of all, about their mean."""
    X = precise(X)
    X = X - X.mean(0)
    return X @ torch.linalg.eigh(X.T @ X).eigenvectors[:, -1]


def mutual_information(x: Values, y: Values) -> float:
    """I(X; Y) in nats of paired numbers, from a histogram of BINS x BINS of equal mass, at least 0.

    The histogram's bias is taken off: (B_xy - B_x - B_y + 1) / 2N for B occupied cells of N pairs (Miller and Madow).
    """
    places = torch.stack([_ranks(values) * BINS // len(values) for values in (x, y)])
    joint = torch.zeros(BINS, BINS, dtype=torch.float64)
    joint.index_put_(tuple(places.cpu()), torch.tensor(1.0, dtype=torch.float64), accumulate=True)
    p = joint / len(x)
    entropies = [float(torch.special.entr(part).sum()) for part in (p.sum(0), p.sum(1), p)]
    cells = [int((part > 0).sum()) for part in (p.sum(0), p.sum(1), p)]
    bias = (cells[2] - cells[0] - cells[1] + 1) / (2 * len(x))
    return max(entropies[0] + entropies[1] - entropies[2] - bias, 0.0)


def _ranks(values: Tensor) -> Tensor:
    return values.argsort(stable=True).argsort()


def raised(worth: Sequence[float], bits: Sequence[float], sizes: Sequence[Sequence[int]], budget: int) -> list[int]:
    """Step 2: which of the ascending `bits` each layer gets.

    Args:
        worth: I_l of each layer.
        sizes: bytes of each layer at each of the bits.
        budget: what all layers may take; at least what they take at the fewest bits.
    """
    found, left = [0] * len(worth), budget - sum(size[0] for size in sizes)
    while True:
        gains = []
        for n, k in enumerate(found):
            extra = sizes[n][k + 1] - sizes[n][k] if k + 1 < len(bits) else left + 1
            if extra <= left:
                gains.append((worth[n] * math.log2(bits[k + 1] / bits[k]) / max(extra, 1), -n))
        if not gains:
            return found
        best = -max(gains)[1]
        left -= sizes[best][found[best] + 1] - sizes[best][found[best]]
        found[best] += 1
