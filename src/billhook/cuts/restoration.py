"""How far a reader's new weight is from what it should put out, on the windows it was fitted on and on others.

What methods that restore in closed form share: `restore` on `ReaderSums`, and the three errors that a Cut records.
"""

import math
from collections.abc import Callable

from billhook.calibration.walk import ReaderSums
from billhook.math import restore
from billhook.tensors import Kept, Narrowed, Weight


def fitted(W: Weight, evidence: ReaderSums, kept: Kept, damping: float) -> tuple[Narrowed, float]:
    """`restore.least_squares` on what `evidence` asks for, and the damping used."""
    return restore.least_squares(W, evidence.gram, kept, damping, evidence.cross)


def errors(
    W: Weight,
    V: Narrowed,
    kept: Kept,
    fitted_on: ReaderSums,
    held: ReaderSums | None,
    fit: Callable[[ReaderSums], Narrowed],
) -> tuple[float, float, float | None]:
    """Relative errors of the kept columns as they were, of V,
    and off the text of a fit without the held-out windows."""
    seen = fitted_on if held is None else fitted_on + held
    whole = restore.energy(W, seen.gram)
    before, after = _error(W, None, seen, kept, whole), _error(W, V, seen, kept, whole)
    if held is None:
        return before, after, None
    return before, after, _error(W, fit(fitted_on), held, kept, restore.energy(W, held.gram))


def _error(W: Weight, V: Narrowed | None, evidence: ReaderSums, kept: Kept, whole: float) -> float:
    square = restore.squared_error(W, V, evidence.gram, kept, evidence.cross, float(evidence.energy))
    return math.sqrt(square / whole) if whole > 0 else 0.0
