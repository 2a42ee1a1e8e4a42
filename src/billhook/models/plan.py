"""What a prune will cut: units of axes, whole layers, channels of the residual stream."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from billhook.tensors import RotaryPairs, Scores

WHOLE = "layers"  # the kind of a place that stands for a whole layer


@dataclass(frozen=True)
class Plan:
    """What to cut; layers are numbered as before the cut."""

    drops: Mapping[tuple[int, str], int] = field(default_factory=dict)  # units to drop, by (layer, kind)
    layers: tuple[int, ...] = ()  # layers to drop as a whole
    residual: int = 0  # channels of the residual stream to drop
    rotate: bool = False  # whether the residual stream is rotated first
    ranks: Mapping[str, int] = field(default_factory=dict)  # of linear weights that become two thin ones, by path
    pairs: Mapping[int, RotaryPairs] = field(default_factory=dict)  # that stay, by layer; others keep all

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of axis that lose anything, each once."""
        return tuple(dict.fromkeys(kind for (_, kind), count in self.drops.items() if count))

    @property
    def empty(self) -> bool:
        """Whether nothing goes."""
        return not (self.kinds or self.layers or self.residual or self.rotate or self.ranks or self.pairs)


def even_plan(layers: int, drops: Mapping[str, int], spared: Collection[int] = (), gone: Collection[int] = ()) -> Plan:
    """The same number of units from every layer but those `spared`; layers in `gone` are dropped as a whole."""
    staying = [n for n in range(layers) if n not in gone]
    drops_by_axis = {(n, kind): 0 if n in spared else count for n in staying for kind, count in drops.items()}
    return Plan(drops_by_axis, tuple(sorted(gone)))


UnitScores = Mapping[tuple[int, str], Scores]  # keys are (layer, kind)
# (layer, kind) -> units dropped -> nats a token; for the kind `layers` {1: cost of the whole layer}
Curves = dict[tuple[int, str], dict[int, float]]


@dataclass(frozen=True)
class Cut:
    """One cut.  Errors are relative, ||V X_S^T - W X^T||_F / ||W X^T||_F,
    of the axis's reader on the calibration text."""

    layer: int
    kind: str
    units: int  # before the cut
    dropped: int
    damping: float  # damping that the restoration took, 0 without one
    error_without: float  # error with the kept weights unchanged
    error: float  # after the restoration
    error_held_out: float | None  # after the restoration, on held-out windows
    score_dropped: float  # share of the sum of all scores that the dropped units held


AxisKey = tuple[int, str]  # (layer, kind)
