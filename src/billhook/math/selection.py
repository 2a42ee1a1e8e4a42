"""From scores to which units go."""

from billhook.tensors import Kept, Scores, Units


def lowest(scores: Scores, drop: int, blocks: int = 1) -> tuple[Units, Kept]:
    """Numbers of the `drop` units of lowest score, and of those kept; both ascending.

    With `blocks`, the units form that many equal contiguous blocks and each gives up drop/blocks of its own.  Ties go
    to the lower number, so that the same scores always give the same cut.
    """
    order = scores.view(blocks, -1).argsort(dim=1, stable=True)
    order = order + (len(scores) // blocks) * order.new_tensor(range(blocks)).unsqueeze(1)
    each = drop // blocks
    return order[:, :each].flatten().sort().values, order[:, each:].flatten().sort().values
