"""Layers to drop, by position alone: `count` of `total` layers; the first and the last stay.

LayerChop (Jha et al. 2023, arXiv:2305.14864) shows its presets in a figure that was not at hand: the indices here
follow its text.
"""

import random
from collections.abc import Callable, Collection, Sequence

from billhook.errors import BillhookError


def near_input(total: int, count: int) -> list[int]:
    """The layers right after the first: LayerChop's choice at 1.1B and 7B."""
    return list(range(1, 1 + count))


def near_output(total: int, count: int) -> list[int]:
    """The deepest layers before the last: the simple rule of Gromov et al. (arXiv:2403.17887),
    `reverse` of arXiv:2411.15558."""
    return list(range(total - 1 - count, total - 1))


def middle(total: int, count: int) -> list[int]:
    """One block in the middle, or half a layer nearer to the output if there is no exact middle."""
    start = (total - count + 1) // 2
    return list(range(start, start + count))


def both(total: int, count: int) -> list[int]:
    """A block after the first layer and one before the last; the odd one goes near the input."""
    front = (count + 1) // 2
    return near_input(total, front) + near_output(total, count - front)


def max_gap(total: int, count: int) -> list[int]:
    """As far from each other as can be: every other layer at a half, LayerChop's choice at 300M."""
    inner = total - 2
    return [1 + int((n + 0.5) * inner / count) for n in range(count)]


POSITIONS: dict[str, Callable[[int, int], list[int]]] = {
    "input": near_input,
    "output": near_output,
    "reverse": near_output,
    "middle": middle,
    "both": both,
    "max-gap": max_gap,
}


def random_layers(total: int, count: int, seed: int) -> list[int]:
    """Random layers: what the other presets should beat."""
    return sorted(random.Random(seed).sample(range(1, total - 1), count))


def lowest_layers(scores: Sequence[float | int], count: int) -> list[int]:
    """The `count` inner layers of lowest score; ties go to the lower number."""
    inner = range(1, len(scores) - 1)
    return sorted(sorted(inner, key=lambda n: scores[n])[:count])


def parse_layers(text: str, total: int) -> list[int]:
    """`10-14,20` as layers, ascending.

    Raises:
        BillhookError: no such layers, a reversed range, or one named twice.
    """
    numbers: list[int] = []
    for part in text.replace(" ", "").split(","):
        first, _, last = part.partition("-")
        if not first.isdecimal() or (last and not last.isdecimal()) or part.endswith("-"):
            raise BillhookError(f"layers {text!r}: write numbers from 0 and ranges with commas, like 10-14,20")
        start, end = int(first), int(last or first)
        if end < start:
            raise BillhookError(f"layers {text!r}: the range {part} is reversed")
        if end >= total:
            raise BillhookError(f"layers {text!r}: there is no layer {end}; the model has {total}, numbered from 0")
        numbers += range(start, end + 1)
    if twice := sorted(n for n in set(numbers) if numbers.count(n) > 1):
        raise BillhookError(f"layers {text!r}: layer {twice[0]} is named twice")
    return sorted(numbers)


def runs_of(gone: Collection[int]) -> list[list[int]]:
    """The dropped layers as runs of consecutive numbers, ascending."""
    runs: list[list[int]] = []
    for n in sorted(gone):
        if runs and n == runs[-1][-1] + 1:
            runs[-1].append(n)
        else:
            runs.append([n])
    return runs


def layers_before(gone: Collection[int]) -> list[int]:
    """The layers right before each run of dropped ones; there is none before layer 0."""
    return [cut[0] - 1 for cut in runs_of(gone) if cut[0]]
