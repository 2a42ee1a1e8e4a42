"""What a method did to one axis of one layer: the record that every report is made of."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Cut:
    """Errors are relative, ||V X_S^T - W X^T||_F / ||W X^T||_F, of the layer's reader on the calibration text."""

    layer: int
    kind: str
    units: int  # before the cut
    dropped: int
    damping: float  # that the restoration took, 0 without one
    error_without: float  # kept weights as they were
    error: float  # after the restoration
    error_held_out: float | None  # after the restoration, on windows that it did not see
    score_dropped: float  # share of the sum of all scores that the dropped units held
