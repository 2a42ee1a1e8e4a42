"""Shares of several texts in training, by distributionally robust optimisation (DRPruning, arXiv:2411.14055).

    p    base shares;  e  excess of each text: the student's loss above its reference, in nats
    q  = p c / sum p c,   c = max(relu(e - eta) / sum p relu(e - eta), 0.2)
    eta such that q is as far from p as the radius allows:   1/2 sum p (q / p - 1)^2 = rho

So a text that lags behind the others gets more windows, at most so many more.  e - eta is all that counts: what all
excesses have in common changes no share.
"""

import torch

from billhook.tensors import Excess, TextShares

RADIUS = 0.1  # rho
LEAST = 0.2  # a text's share is not below this part of its base share, before all are scaled to sum to 1
PACE = 0.1  # of the base shares towards those of a judgement
REACH = 2.0  # base shares stay within this factor of those they began with
HALVINGS = 40


def robust(base: TextShares, excess: Excess) -> TextShares:
    """q: no text below the least base share, and all scaled to sum to 1 (the paper's code).

    Where even the excess of the worst text alone stays within the radius, q is what that gives.
    """
    above = excess - excess.min()
    low, high = -float(above.max()) / ((2 * RADIUS + 1) ** 0.5 - 1), float(above.max())
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        within = _distance(base, _tilted(base, above, middle)) <= RADIUS
        low, high = (middle, high) if within else (low, middle)
    q = _tilted(base, above, low).maximum(base.min())
    return q / q.sum()


def follow(base: TextShares, q: TextShares, first: TextShares) -> TextShares:
    """The base shares after a judgement: a tenth of the way to q, within bounds of those they began with.

    The bounds are [1/2, 2] times its first share for each text, and the least and the largest of all first shares.
    """
    low = (first / REACH).maximum(first.min())
    high = (first * REACH).minimum(first.max())
    moved = (1 - PACE) * base + PACE * q
    least, most = float((low / moved).min()), float((high / moved).max())
    for _ in range(HALVINGS):  # the factor at which shares within their bounds sum to 1
        middle = (least + most) / 2
        is_less = float((middle * moved).clamp(low, high).sum()) < 1
        least, most = (middle, most) if is_less else (least, middle)
    return (least * moved).clamp(low, high)


def largest(first: TextShares) -> TextShares:
    """The largest share that any judgements can give each text: p + sqrt(2 rho p (1 - p)) at its largest base share."""
    p = (first * REACH).minimum(first.max())
    return (p + (2 * RADIUS * p * (1 - p)).sqrt()).clamp(max=1)


def _tilted(base: TextShares, above: Excess, eta: float) -> TextShares:
    over = (above - eta).relu()
    mean = (base * over).sum()
    c = (over / mean).clamp(min=LEAST) if mean > 0 else torch.ones_like(base)
    return base * c / (base * c).sum()


def _distance(base: TextShares, q: TextShares) -> float:
    return float((base * (q / base - 1) ** 2).sum()) / 2
