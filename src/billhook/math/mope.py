"""The table of MoPE-CLIP (Lin et al. 2024, arXiv:2403.07839): what a model loses without each of its modules.

    MoPE(module) = Z(f) - Z(f without it),   Z the model's metric, higher where it does better

A module is a head, a part of a layer's FFN, or a whole layer.  The channels of an FFN are parted by a score, since each
alone would cost a forward pass.  A module's loss is shared out among its units, and those of the modules that cost
least go first.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from billhook.errors import BillhookError
from billhook.tensors import Scores

HAIR = 1e-6  # by how much units of one module differ, as a share of what each is worth: only their order counts
LAYER = "layers"  # the kind of a step that takes a whole layer
SHORT = 0.005  # share of a saving that may be missing


def parts(scores: Scores, count: int) -> list[Tensor]:
    """The units in at most `count` nearly equal parts: by their scores, the lowest first, in and between parts."""
    return list(scores.argsort(stable=True).tensor_split(min(count, len(scores))))


def worth(modules: Sequence[Sequence[int]], losses: Sequence[float | int]) -> Scores:
    """What each unit is worth, float64: an equal share of its module's loss, in a module the first a hair less.

    The units of a module sum to its loss.

    Args:
        modules: the units of each, which together are all units.
    """
    found = torch.zeros(sum(map(len, modules)), dtype=torch.float64)
    for units, loss in zip(modules, losses, strict=True):
        away = (torch.arange(len(units), dtype=torch.float64) + 0.5) / len(units) - 0.5  # sums to 0
        found[torch.tensor(list(units))] = (loss + HAIR * abs(loss) * away) / len(units)
    return found


def ties_broken(losses: Sequence[float | int], finer: Sequence[float | int]) -> list[float]:
    """`losses`, and where they are equal the order of `finer`, which is not negative.

    All that `finer` adds together is less than half of the least difference of two losses: no sum changes its place.
    """
    steps = [b - a for a, b in pairwise(sorted(set(losses)))]
    share = min(steps, default=1.0) / (2 * max(sum(finer), 1e-300)) if any(finer) else 0.0
    return [loss + share * more for loss, more in zip(losses, finer, strict=True)]


@dataclass(frozen=True)
class Step:
    """A little more from one axis of a layer, or the layer as a whole."""

    layer: int
    kind: str
    count: int  # units of the axis that are gone after it
    saving: float | int  # of all of them; of a whole layer, all its parameters
    loss: float  # of the module that it takes units of


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
        if step.layer in gone or (step.kind == LAYER and len(gone) + 1 == layers):
            continue
        before = of_layer.values() if step.kind == LAYER else [of_layer[step.kind]] if step.kind in of_layer else []
        more = step.saving - sum(one.saving for one in before)
        if saved + more - target > max(target - saved, 0.0):
            left_out = True
            continue
        saved += more
        if step.kind == LAYER:
            gone.append(step.layer)
            of_layer.clear()
        else:
            of_layer[step.kind] = step
    if saved < target * (1 - SHORT) and not left_out:
        raise BillhookError(f"the budget asks to save {target:,.0f}, but the axes can save at most {saved:,.0f} here")
    counts = {(n, kind): step.count for n, of_layer in taken.items() for kind, step in of_layer.items()}
    return counts, sorted(gone)
