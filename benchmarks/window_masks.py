"""Do masks of windows follow losses, or the order of reading?  python benchmarks/window_masks.py

No model: every window has a loss of its own kind, e^(0.4 z), which a reading finds with an error of 15 % and which
falls by 30 % over the training.  Masks are learned in --passes from losses read in --orders orders, in two ways: every
mask moves at every step, by the last loss of its window, as `recover --keep-data` does; or a mask is pushed when its
window is read, as AdaPruner's code does.  The table has the share of windows that two orders keep alike, of all that
either keeps, and the same of one order and the windows that are truly pushed least.
"""

import argparse
from collections.abc import Callable, Sequence
from itertools import combinations
from statistics import mean

import torch

from billhook.math import window_masks
from billhook.math.window_masks import Learning, State
from billhook.training.text_windows import order_of
from billhook.training.window_masks import WindowMasks

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--windows", type=int, default=140)
parser.add_argument("--passes", type=int, default=3)
parser.add_argument("--keep", type=float, default=0.7)
parser.add_argument("--orders", type=int, default=5)
args = parser.parse_args()

READINGS, COUNT = args.passes * args.windows, round(args.keep * args.windows)


def readings(seed: int) -> list[tuple[int, float]]:
    """Windows in the order they are read in, and what loss each is found with."""
    order, errors = order_of(args.windows, READINGS, seed), torch.Generator().manual_seed(1000 + seed)
    noise = (0.15 * torch.randn(READINGS, generator=errors)).exp()
    return [(w, float(true[w] * noise[n]) * (1 - 0.3 * n / READINGS)) for n, w in enumerate(order)]


def at_every_step(read: Sequence[tuple[int, float]]) -> set[int]:
    masks = WindowMasks(args.windows, args.keep, [window for window, _ in read], 1)
    masks.replay([{"window_losses": [each]} for each in read])
    return set(masks.kept(COUNT).tolist())


def when_read(read: Sequence[tuple[int, float]]) -> set[int]:
    learning = Learning(args.keep, READINGS, args.windows)
    state, losses = State.first(args.windows), torch.full((args.windows,), torch.nan, dtype=torch.float64)
    for window, loss in read:
        losses[window] = loss
        relative = losses[window] / losses.nanmedian()
        pulls = torch.zeros_like(losses)  # as hard for the window that is read as for all of them in a pass
        pulls[window] = args.windows * (relative - (relative + window_masks.SMALLEST).log())
        state = window_masks.moved(state, pulls, learning)
    return set(window_masks.largest(state, COUNT).tolist())


true = (0.4 * torch.randn(args.windows, generator=torch.Generator().manual_seed(0), dtype=torch.float64)).exp()
best = set(window_masks.pull(true).argsort()[:COUNT].tolist())
WAYS: dict[str, Callable[[Sequence[tuple[int, float]]], set[int]]] = {
    "at every step, by their last losses": at_every_step,
    "when their window is read": when_read,
}
print("| masks move | two orders alike | as the true losses |\n|---|---|---|")
for name, kept_by in WAYS.items():
    kept = [kept_by(readings(seed)) for seed in range(args.orders)]
    alike = mean(len(one & other) / len(one | other) for one, other in combinations(kept, 2))
    right = mean(len(one & best) / len(one | best) for one in kept)
    print(f"| {name} | {alike:.2f} | {right:.2f} |")
chance = args.keep / (2 - args.keep)
print(f"| (drawn by lot) | {chance:.2f} | {chance:.2f} |")
