"""What may be chosen of each cut; why these defaults: docs/LOG.md.  Loads no torch."""

from dataclasses import dataclass

SOLVER_DAMPING = 1e-2  # ridge of a solver of sparse weights, as a share of the mean diagonal of the Gram


@dataclass(frozen=True)
class Narrowing:
    """What may be chosen; why these defaults, and which were only tried in passing: docs/LOG.md."""

    score: str = "obs"
    damping: float = 1e-3  # ridge as a share of the mean diagonal of G, for score and restoration
    restoration: bool = True
    correction: float = 0.3  # share of what the layers before have cost to make up, in the dense_target stream
    stream: str = "dense_target"


@dataclass(frozen=True)
class Approximating:
    """How modules are refitted, and by what their units go."""

    score: str = "analytic"
    recovery: bool = True
    share: float = 1.0  # of the way to the least squares
    after: bool = False  # whether what reads a cut axis is refitted once more
    damping: float = 1e-3  # ridge as a share of the mean diagonal of the Gram


@dataclass(frozen=True)
class Chopping:
    """How a cut is patched; why these defaults: docs/LOG.md."""

    patch: str = "none"
    damping: float = 0.1  # ridge toward W, as a share of the mean diagonal of X^T X
    correction: float = 0.3  # share of what the cuts before have cost that a patch also makes up for


@dataclass(frozen=True)
class Slicing:
    """What may be chosen of step 5; why these defaults: docs/LOG.md."""

    restoration: bool = True
    damping: float = 0.1  # ridge as a share of the mean diagonal
    correction: float = 0.3  # share of the way to the least squares


@dataclass(frozen=True)
class Factoring:
    """By what weights are factored."""

    moment: str = "whitened"  # of billhook.math.low_rank
    stream: str = "sequential"


@dataclass(frozen=True)
class Reducing:
    """What may be chosen."""

    way: str = "reap"
    seed: int = 0  # seed of `random`
    stream: str = "dense"
