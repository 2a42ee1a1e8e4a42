"""Which layers a walk through a model visits, and what they see there."""

from collections.abc import Collection
from dataclasses import dataclass


@dataclass(frozen=True)
class Route:
    """What a walk yields of a model, and by which activations."""

    stream: str = "dense"  # whose activations a layer sees (billhook.choices)
    held_out: float = 0.1  # share of the windows, the last ones, that are summed separately
    only: Collection[int] | None = None  # layers to yield, None for all; the walk ends with the last of them
    dropped: Collection[int] = ()  # layers that will go: not yielded, and skipped in all streams but `dense`
    correction: float = 1.0  # in `dense_target`: share of the difference to the unpruned model to make up
