"""From scores to what goes, and from a budget to how much."""

from collections.abc import Sequence
from dataclasses import dataclass

from billhook.errors import BillhookError
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


@dataclass(frozen=True)
class Candidates:
    """How many units of one kind of axis may go from every layer, and what each is worth.

    `price` is the parameters saved by dropping one unit in every layer; `drops` the counts that the layout allows,
    ascending, 0 first.
    """

    kind: str
    units: int
    price: int
    drops: Sequence[int]
    limit: str = "a layer loses all units"  # what a larger cut would come to


def solve(candidates: Sequence[Candidates], target: float | int) -> dict[str, int]:
    """Units of each kind to drop from every layer so that about `target` parameters go.

    Every axis is asked for the same share of itself.  The coarsest goes first and takes the allowed count nearest to
    its share; what that misses, the finer ones make up.

    Raises:
        BillhookError: the axes together hold too little, or the target is below half of the smallest step.
    """
    most = sum(c.drops[-1] * c.price for c in candidates)
    # up to half a step beyond the largest cut is rounding; more is a cut that would leave a layer without units
    slack = min(c.price * (c.drops[1] - c.drops[0]) for c in candidates if len(c.drops) > 1) / 2 if most else 0
    if target > most + slack:
        raise BillhookError(
            f"the budget asks for {target:,.0f} parameters, but {' and '.join(c.kind for c in candidates)} can give up at "
            f"most {most:,} before {candidates[0].limit}: lower the ratio or name more axes"
        )
    counts: dict[str, int] = {}
    rest = sorted(candidates, key=lambda c: c.price * (c.drops[1] if len(c.drops) > 1 else 0), reverse=True)
    while rest:
        axis, *rest_after = rest
        share = target / sum(c.price * c.units for c in rest)
        most_after = sum(c.drops[-1] * c.price for c in rest_after)
        reachable = [d for d in axis.drops if -slack <= target - d * axis.price <= most_after + slack]
        count = min(reachable or axis.drops, key=lambda drop: (abs(drop - share * axis.units), drop))
        counts[axis.kind], target, rest = count, target - count * axis.price, rest_after
    if not any(counts.values()):
        smallest = min(c.price * c.drops[1] for c in candidates if len(c.drops) > 1)
        raise BillhookError(
            f"the budget is less than half of the smallest step ({smallest:,} parameters): raise the ratio, or lower --multiple-of"
        )
    return {c.kind: counts[c.kind] for c in candidates}
