"""Units to drop, by their scores."""

import torch

from billhook.tensors import Kept, Scores, Units


def lowest(scores: Scores, drop: int, blocks: int = 1) -> tuple[Units, Kept]:
    """Numbers of the `drop` units of lowest score, and of those kept; both ascending.

    With `blocks`, the units form that many equal contiguous blocks, and each loses drop/blocks of its units.  Among
    ties the lower number is dropped, so that the same scores always give the same cut.
    """
    order = scores.view(blocks, -1).argsort(dim=1, stable=True)
    order = order + (len(scores) // blocks) * torch.arange(blocks, device=order.device).unsqueeze(1)
    per_block = drop // blocks
    return order[:, :per_block].flatten().sort().values, order[:, per_block:].flatten().sort().values
