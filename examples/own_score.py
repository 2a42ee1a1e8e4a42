"""A method of one's own: which channels go, by a score of six lines.

    python examples/own_score.py [MODEL]

A score reads the weight W (out, in) that consumes the channels and the Gram matrix G = X^T X (in, in) of what enters
it, and gives one number a channel: the lowest go.  All else (budget, layouts, least squares, reports, stock
checkpoints) is billhook's. This one is a channel's share of the output that nothing else carries: its energy, times one
minus the largest squared cosine between its inputs and another channel's.  It prints what is left of the output's
energy unexplained, by each score.
"""

import sys
from statistics import fmean
from typing import Any

import billhook
from billhook.tensors import Columns, Gram, Weight


def unlike_others(W: Weight, G: Gram, damping: float = 0.0) -> Columns:
    """s_j = ||W_:,j||^2 G_jj (1 - max_k cos^2(X_j, X_k)), over k other than j."""
    norms = G.diagonal().sqrt().clamp_min(1e-12)
    cosines = (G / norms / norms[:, None]).fill_diagonal_(0)
    likeness = cosines.square().amax(0).clamp_max(1)
    return W.double().square().sum(0) * G.diagonal() * (1 - likeness)


def main(model: str = "demo", **settings: Any) -> None:
    for score in ("wanda", "obs", unlike_others):
        report = billhook.prune(model, method="fasp", score=score, **{"ratio": 0.2, "samples": 16, **settings}).report
        errors = [cut.error_held_out for cut in report.cuts if cut.error_held_out is not None]
        name = score if isinstance(score, str) else score.__name__
        print(f"{name:14} error on held-out text, mean of {len(errors)} layers: {fmean(errors):.4f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
