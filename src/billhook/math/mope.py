"""The table of MoPE-CLIP (Lin et al. 2024, arXiv:2403.07839): what a model loses without each of its modules.

    MoPE(module) = Z(f) - Z(f without it),   Z the model's metric, higher where it does better

A module is a head, a part of a layer's FFN, or a whole layer.  The channels of an FFN are parted by a score, since each
alone would cost a forward pass.  A module's loss is shared out among its units, and those of the modules that cost
least go first.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from billhook.tensors import Scores

HAIR = 1e-6  # by how much units of one module differ, as a share of what each is worth: only their order counts


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
