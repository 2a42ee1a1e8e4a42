"""What a prune will cut: units of every axis of every layer, whole layers, channels of the residual stream."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from billhook.tensors import Scores


@dataclass(frozen=True)
class Plan:
    """`drops`: units to drop, by (layer, kind), layers numbered as before the cut; `layers`: those that go whole.

    `residual`: channels of the residual stream that go, once it is rotated if `rotate`.
    """

    drops: Mapping[tuple[int, str], int] = field(default_factory=dict)
    layers: tuple[int, ...] = ()
    residual: int = 0
    rotate: bool = False

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of axis that lose anything, each once."""
        return tuple(dict.fromkeys(kind for (_, kind), count in self.drops.items() if count))


def even_plan(layers: int, drops: Mapping[str, int], spared: Collection[int] = (), gone: Collection[int] = ()) -> Plan:
    """The same units from every layer but those spared, and those that go whole."""
    cut = [n for n in range(layers) if n not in gone]
    each = {(n, kind): 0 if n in spared else count for n in cut for kind, count in drops.items()}
    return Plan(each, tuple(sorted(gone)))


UnitScores = Mapping[tuple[int, str], Scores]  # by (layer, kind)
# (layer, kind) -> units dropped -> nats a token; of kind `layers`, {1: what the whole layer costs}
Curves = dict[tuple[int, str], dict[int, float]]


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


AxisKey = tuple[int, str]  # (layer, kind)
