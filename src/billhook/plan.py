"""What a prune will cut: units of every axis of every layer, whole layers, channels of the residual stream."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field


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


def even(layers: int, drops: Mapping[str, int], spared: Collection[int] = (), gone: Collection[int] = ()) -> Plan:
    """The same units from every layer but those spared, and those that go whole."""
    cut = [n for n in range(layers) if n not in gone]
    each = {(n, kind): 0 if n in spared else count for n in cut for kind, count in drops.items()}
    return Plan(each, tuple(sorted(gone)))
