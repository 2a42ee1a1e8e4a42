"""The knee of a curve of loss against ratio, where it turns steep: a change-point, with its confidence interval."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import fdtri  # importing scipy.stats in its place would take half a second

GRID = 400  # change-points tried, between the second and the last but one ratio
CONFIDENCE = 0.9  # probability that the interval holds
BEND = 1.5  # least quotient of the second slope and the first
FEWEST = 5  # points needed to fit four numbers


@dataclass(frozen=True)
class Knee:
    """The fit y = a + b x + c max(0, x - ratio), y the log perplexity and x the achieved ratio."""

    ratio: float
    low: float
    high: float
    below: float  # slope b, in nats for the whole of the decoder
    above: float  # slope b + c


def knee(ratios: Sequence[float | int], losses: Sequence[float | int]) -> Knee | None:
    """The change-point of a continuous line of two pieces, by least squares over a grid.

    The interval holds every change-point whose squared error an F test (1 and n - 4 degrees of freedom, 90 %) cannot
    tell from the least; with few ratios it is wide.

    Args:
        ratios: achieved ratios, ascending, the unpruned model's 0 among them if it was measured.
        losses: log perplexity at each.

    Returns:
        None where there are fewer than 5 points, or the second piece is not at least 1.5 times as steep as the first.
    """
    x, y = np.asarray(ratios, dtype=np.float64), np.asarray(losses, dtype=np.float64)
    usable = np.isfinite(y)
    x, y = x[usable], y[usable]
    if len(x) < FEWEST:
        return None
    places = np.linspace(x[1], x[-2], GRID)
    fits = [_fit(x, y, place) for place in places]
    errors = np.array([error for error, _ in fits])
    best = int(errors.argmin())
    _, (_, below, bend) = fits[best]
    if bend <= 0 or below + bend < BEND * below:
        return None
    slack = 1 + fdtri(1, len(x) - 4, CONFIDENCE) / (len(x) - 4)
    likely = places[errors <= max(errors[best] * slack, 1e-12)]
    return Knee(float(places[best]), float(likely[0]), float(likely[-1]), float(below), float(below + bend))


def _fit(x: np.ndarray, y: np.ndarray, place: float) -> tuple[float, np.ndarray]:
    """Squared error and (a, b, c)."""
    A = np.stack([np.ones_like(x), x, np.maximum(0, x - place)], 1)
    coefficients, *_ = np.linalg.lstsq(A, y, rcond=None)
    return float(((A @ coefficients - y) ** 2).sum()), coefficients
