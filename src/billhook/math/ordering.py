"""One order of the steps of all layers and axes: those of lowest loss go first, until enough is saved."""

from collections.abc import Sequence
from dataclasses import dataclass

from billhook.errors import BillhookError

SHORT = 0.005  # share of a saving that may be missing


@dataclass(frozen=True)
class Step:
    """A little more from one axis of a layer, or the layer as a whole."""

    layer: int
    kind: str | None  # None: the layer as a whole
    count: int  # units of the axis that are gone after it
    saving: float | int  # of all of them; of a whole layer, all its parameters
    loss: float  # of the module that it takes units of

    @property
    def whole(self) -> bool:
        """Whether the layer goes as a whole."""
        return self.kind is None


def lowest_first(
    steps: Sequence[Step], target: float | int, layers: int
) -> tuple[dict[tuple[int, str], int], list[int]]:
    """The steps of lowest loss until about `target` is saved: units gone by (layer, kind), and layers gone.

    A step that would lead further beyond the target than it is short of it is left out.

    Args:
        steps: those of one axis in the order of their counts, their losses ascending.
        layers: how many there are, of which one stays.

    Raises:
        BillhookError: all of them together save less.
    """
    taken: dict[int, dict[str, Step]] = {}
    gone, saved, left_out = list[int](), 0.0, False
    for step in sorted(steps, key=lambda step: step.loss):
        of_layer = taken.setdefault(step.layer, {})
        if step.layer in gone or (step.whole and len(gone) + 1 == layers):
            continue
        before = of_layer.values() if step.whole else [of_layer[step.kind]] if step.kind in of_layer else []
        more = step.saving - sum(one.saving for one in before)
        if saved + more - target > max(target - saved, 0.0):
            left_out = True
            continue
        saved += more
        if step.kind is None:
            gone.append(step.layer)
            of_layer.clear()
        else:
            of_layer[step.kind] = step
    if saved < target * (1 - SHORT) and not left_out:
        raise BillhookError(f"the budget asks to save {target:,.0f}, but the axes can save at most {saved:,.0f} here")
    counts = {(n, kind): step.count for n, of_layer in taken.items() for kind, step in of_layer.items()}
    return counts, sorted(gone)
