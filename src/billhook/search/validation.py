"""The validation windows of a search: those that drop candidates, those that try them, and those that decide."""

from dataclasses import dataclass

import torch
from torch import Tensor

from billhook.errors import BillhookError
from billhook.tensors import Tokens

SHORT = 128  # tokens of a short window
FINAL = 16  # windows of full length that decide; a third of the text where it is short
PROXY = 32  # short windows of the proxy that drops candidates untried; a third of the rest where it is short
LEAST = 12  # windows of full length that a search needs


@dataclass(frozen=True)
class Validation:
    """Windows (windows, length) that candidates are tried on; no window is in two parts, and none in the pool."""

    proxy: Tensor  # short windows for the proxy
    rungs: Tensor  # short windows for the rungs, in the order of use
    final: Tensor  # windows of full length that decide


class RungWindows:
    """Hands out the short windows in turn, from the start again when all were used."""

    def __init__(self, windows: Tensor) -> None:
        self._windows, self.used = windows, 0

    def take(self, count: int) -> Tokens:
        """The next `count` windows, or all of them if they are fewer."""
        count = min(count, len(self._windows))
        numbers = [n % len(self._windows) for n in range(self.used, self.used + count)]
        self.used += count
        return self._windows[numbers]


def split(windows: Tokens, seed: int, leading: int = 0) -> Validation:
    """Split windows of full length, in an order drawn by `seed`: some decide, the others are cut into short ones.

    Args:
        leading: number of special tokens that begin every window, and then every short one.

    Raises:
        BillhookError: there are fewer than `LEAST`.
    """
    if len(windows) < LEAST:
        raise BillhookError(
            f"the validation text has {len(windows)} windows of {windows.shape[1]} tokens, and a search needs {LEAST}: "
            "name a longer --validation, or lower --seq-len"
        )
    final, short = min(FINAL, len(windows) // 3), min(SHORT, windows.shape[1])
    generator = torch.Generator().manual_seed(seed)
    windows = windows[torch.randperm(len(windows), generator=generator)]
    first, text, room = windows[:1, :leading], windows[final:, leading:], short - leading
    pieces = text[:, : text.shape[1] // room * room].reshape(-1, room)
    pieces = torch.cat([first.expand(len(pieces), -1), pieces], 1)
    pieces = pieces[torch.randperm(len(pieces), generator=generator)]
    proxy = min(PROXY, len(pieces) // 3)
    return Validation(pieces[:proxy], pieces[proxy:], windows[:final])
