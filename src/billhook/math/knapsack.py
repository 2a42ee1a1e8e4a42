"""How much each layer gives: loss curves and prices in, unit counts out; also one count for all layers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.interpolate import PchipInterpolator
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import lil_array

from billhook.errors import BillhookError

GAP = 1e-4  # relative gap at which the solver may stop; the losses are known far less exactly
SECONDS = 60.0  # time limit of the solver


@dataclass(frozen=True)
class Choice:
    """The possible cuts of one axis of one layer."""

    layer: int
    drops: Sequence[int]  # counts of units, ascending, 0 first
    savings: Sequence[float | int]  # saving of each count, in the budget's unit
    losses: Sequence[float | int]  # estimated loss of each count


def interpolate(measured: Mapping[int, float], drops: Sequence[int]) -> list[float]:
    """Losses at all of `drops` from those at a few counts.

    Monotone, 0 at 0, and linear with the last slope beyond the last count.
    """
    counts = sorted({0, *measured})
    values = np.maximum.accumulate([max(measured.get(n, 0.0), 0.0) for n in counts])
    if len(counts) == 1:
        return [0.0] * len(drops)
    inside = PchipInterpolator(counts, values)(np.minimum(drops, counts[-1]))
    slope = (values[-1] - values[-2]) / (counts[-1] - counts[-2])
    return (inside + slope * np.maximum(np.asarray(drops) - counts[-1], 0)).tolist()


def largest_saving(choices: Sequence[Choice], whole: Mapping[int, tuple[float | int, float | int]]) -> float | int:
    """The largest possible saving if one layer has to stay."""
    of_axes = {n: sum(max(c.savings) for c in choices if c.layer == n) for n in {c.layer for c in choices} | set(whole)}
    gains = {n: max(saving - of_axes[n], 0) for n, (saving, _) in whole.items()}
    return sum(of_axes.values()) + sum(gains.values()) - (min(gains.values()) if len(gains) == len(of_axes) else 0)


def solve(
    choices: Sequence[Choice], target: float | int, whole: Mapping[int, tuple[float | int, float]] | None = None
) -> tuple[list[int], list[int]]:
    """The counts of least total loss that save `target`, within half of the smallest step: a multiple-choice knapsack.

    Args:
        whole: layers that may be dropped as a whole, with saving and loss of each.

    Returns:
        the count for each of `choices`, and the dropped layers.

    Raises:
        BillhookError: the choices cannot save that much, or no combination hits the target.
    """
    whole = whole or {}
    width = sum(len(choice.drops) for choice in choices)
    losses, savings = np.zeros(width + len(whole)), np.zeros(width + len(whole))
    one_each, start = lil_array((len(choices), width + len(whole))), 0
    for row, choice in enumerate(choices):
        end = start + len(choice.drops)
        losses[start:end], savings[start:end] = choice.losses, choice.savings
        one_each[row, start:end] = 1
        for column, layer in enumerate(whole):
            if layer == choice.layer:
                one_each[row, width + column] = 1
        start = end
    for column, (saving, loss) in enumerate(whole.values()):
        savings[width + column], losses[width + column] = saving, loss
    steps = [b - a for choice in choices for a, b in zip(choice.savings, choice.savings[1:], strict=False)]
    step = min((s for s in (*steps, *(saving for saving, _ in whole.values())) if s > 0), default=0.0)
    stays = np.r_[np.zeros(width), np.ones(len(whole))][None]  # at least one layer stays, whatever the budget
    most_dropped = len({choice.layer for choice in choices} | set(whole)) - 1
    scale = max(target, 1.0)  # the solver's tolerances are absolute
    for slack in (step / 2, step, 4 * step):
        budget = LinearConstraint(savings[None] / scale, (target - slack) / scale, (target + slack) / scale)
        solution = milp(
            losses,
            integrality=np.ones_like(losses),
            bounds=Bounds(0, 1),
            constraints=[LinearConstraint(one_each.tocsr(), 1, 1), LinearConstraint(stays, 0, most_dropped), budget],
            options={"mip_rel_gap": GAP, "time_limit": SECONDS},
        )
        if solution.x is not None:
            break
    else:
        raise BillhookError(
            f"the budget asks to save {target:,.0f}, but the axes can save at most "
            f"{largest_saving(choices, whole):,.0f} here, in steps of {step:,.0f}: lower it, or name more axes"
        )
    chosen = solution.x > 0.5
    counts, start = [], 0
    for choice in choices:
        picked = np.flatnonzero(chosen[start : start + len(choice.drops)])
        counts.append(choice.drops[picked[0]] if len(picked) else 0)
        start += len(choice.drops)
    return counts, [layer for column, layer in enumerate(whole) if chosen[width + column]]


@dataclass(frozen=True)
class AxisChoices:
    """How many units of one kind of axis may be dropped from every layer, and what that saves."""

    kind: str
    units: int
    price: int  # parameters saved by dropping one unit in every layer
    drops: Sequence[int]  # counts that the layout allows, ascending, 0 first
    limit: str = "a layer loses all units"  # what would happen with a larger cut


def even_widths(candidates: Sequence[AxisChoices], target: float | int) -> dict[str, int]:
    """Units of each kind to drop from every layer so that about `target` parameters go.

    Every axis should lose the same share of its units.  The axis with the largest steps takes the allowed count nearest
    to its share, and the finer ones make up the difference.

    Raises:
        BillhookError: the axes together hold too little, or the target is below half of the smallest step.
    """
    largest = sum(c.drops[-1] * c.price for c in candidates)
    # half a step beyond the largest cut is rounding; a larger target would leave a layer without units
    slack = min(c.price * (c.drops[1] - c.drops[0]) for c in candidates if len(c.drops) > 1) / 2 if largest else 0
    if target > largest + slack:
        raise BillhookError(
            f"the budget asks for {target:,.0f} parameters, but {' and '.join(c.kind for c in candidates)} can give up "
            f"at most {largest:,} before {candidates[0].limit}: lower the ratio or name more axes"
        )
    counts: dict[str, int] = {}
    open_axes = sorted(candidates, key=lambda c: c.price * (c.drops[1] if len(c.drops) > 1 else 0), reverse=True)
    while open_axes:
        axis, *finer = open_axes
        share = target / sum(c.price * c.units for c in open_axes)
        most_after = sum(c.drops[-1] * c.price for c in finer)
        reachable = [d for d in axis.drops if -slack <= target - d * axis.price <= most_after + slack]
        count = min(reachable or axis.drops, key=lambda drop: (abs(drop - share * axis.units), drop))
        counts[axis.kind], target, open_axes = count, target - count * axis.price, finer
    if not any(counts.values()):
        smallest = min(c.price * c.drops[1] for c in candidates if len(c.drops) > 1)
        raise BillhookError(
            f"the budget is less than half of the smallest step ({smallest:,} parameters): raise the ratio, or lower "
            "--multiple-of"
        )
    return {c.kind: counts[c.kind] for c in candidates}
