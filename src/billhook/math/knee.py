"""Where a curve of loss against ratio turns from bearable to steep: a change-point, with its interval."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import fdtri  # of scipy.stats alone the import takes half a second

GRID = 400  # places between the second and the last but one ratio that are tried
CONFIDENCE = 0.9
BEND = 1.5  # the second slope over the first, from which on there is a knee to speak of
FEWEST = 5  # points, for four numbers to be fitted


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

    The interval holds every place whose squared error an F test (1 and n - 4 degrees of freedom, 90 %) does not tell from
    the least: with few ratios it is wide, as it should be.

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
    tried = np.linspace(x[1], x[-2], GRID)
    fits = [_fit(x, y, place) for place in tried]
    errors = np.array([error for error, _ in fits])
    best = int(errors.argmin())
    _, (_, below, more) = fits[best]
    if more <= 0 or below + more < BEND * below:
        return None
    slack = 1 + fdtri(1, len(x) - 4, CONFIDENCE) / (len(x) - 4)
    likely = tried[errors <= max(errors[best] * slack, 1e-12)]
    return Knee(float(tried[best]), float(likely[0]), float(likely[-1]), float(below), float(below + more))


def _fit(x: np.ndarray, y: np.ndarray, place: float) -> tuple[float, np.ndarray]:
    """Squared error and (a, b, c)."""
    A = np.stack([np.ones_like(x), x, np.maximum(0, x - place)], 1)
    found, *_ = np.linalg.lstsq(A, y, rcond=None)
    return float(((A @ found - y) ** 2).sum()), found
