"""Which layers give how much: loss curves and prices in, unit counts out; one count for all layers, too."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.interpolate import PchipInterpolator
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import lil_array

from billhook.errors import BillhookError

GAP = 1e-4  # relative gap at which the solver may stop: far below what the losses are known to
SECONDS = 60.0


@dataclass(frozen=True)
class Choice:
    """What one axis of one layer may lose: counts, what each saves in the budget's unit, and the loss it is believed to cost."""

    layer: int
    drops: Sequence[int]  # ascending, 0 first
    savings: Sequence[float | int]
    losses: Sequence[float | int]


def interpolate(measured: Mapping[int, float], drops: Sequence[int]) -> list[float]:
    """Losses at all of `drops` from those at a few counts: monotone, 0 at 0, the last slope kept beyond the last count."""
    counts = sorted({0, *measured})
    values = np.maximum.accumulate([max(measured.get(n, 0.0), 0.0) for n in counts])
    if len(counts) == 1:
        return [0.0] * len(drops)
    inside = PchipInterpolator(counts, values)(np.minimum(drops, counts[-1]))
    slope = (values[-1] - values[-2]) / (counts[-1] - counts[-2])
    return (inside + slope * np.maximum(np.asarray(drops) - counts[-1], 0)).tolist()


def largest_saving(choices: Sequence[Choice], whole: Mapping[int, tuple[float | int, float | int]]) -> float | int:
    """The most that can be saved while one layer stays."""
    own = {n: sum(max(c.savings) for c in choices if c.layer == n) for n in {c.layer for c in choices} | set(whole)}
    gains = {n: max(saving - own[n], 0) for n, (saving, _) in whole.items()}
    return sum(own.values()) + sum(gains.values()) - (min(gains.values()) if len(gains) == len(own) else 0)


def solve(
    choices: Sequence[Choice], target: float | int, whole: Mapping[int, tuple[float | int, float]] | None = None
) -> tuple[list[int], list[int]]:
    """The counts of least total loss that save `target`, to half of the smallest step: a multiple-choice knapsack.

    Args:
        whole: layers that may go as a whole, with what each then saves and costs.

    Returns:
        the count for each of `choices`, and the layers that go.

    Raises:
        BillhookError: the choices cannot save that much, or hit it.
    """
    whole = whole or {}
    width = sum(len(choice.drops) for choice in choices)
    losses, savings = np.zeros(width + len(whole)), np.zeros(width + len(whole))
    one_each, at = lil_array((len(choices), width + len(whole))), 0
    for row, choice in enumerate(choices):
        end = at + len(choice.drops)
        losses[at:end], savings[at:end] = choice.losses, choice.savings
        one_each[row, at:end] = 1
        for place, layer in enumerate(whole):
            if layer == choice.layer:
                one_each[row, width + place] = 1
        at = end
    for place, (saving, loss) in enumerate(whole.values()):
        savings[width + place], losses[width + place] = saving, loss
    steps = [b - a for choice in choices for a, b in zip(choice.savings, choice.savings[1:], strict=False)]
    step = min((s for s in (*steps, *(saving for saving, _ in whole.values())) if s > 0), default=0.0)
    stays = np.r_[np.zeros(width), np.ones(len(whole))][None]  # one layer, whatever the budget
    rest = len({choice.layer for choice in choices} | set(whole)) - 1
    scale = max(target, 1.0)  # the solver's tolerances are absolute
    for slack in (step / 2, step, 4 * step):
        budget = LinearConstraint(savings[None] / scale, (target - slack) / scale, (target + slack) / scale)
        found = milp(
            losses,
            integrality=np.ones_like(losses),
            bounds=Bounds(0, 1),
            constraints=[LinearConstraint(one_each.tocsr(), 1, 1), LinearConstraint(stays, 0, rest), budget],
            options={"mip_rel_gap": GAP, "time_limit": SECONDS},
        )
        if found.x is not None:
            break
    else:
        raise BillhookError(
            f"the budget asks to save {target:,.0f}, but the axes can save at most {largest_saving(choices, whole):,.0f} here, in steps of {step:,.0f}: "
            "lower it, or name more axes"
        )
    chosen = found.x > 0.5
    counts, at = [], 0
    for choice in choices:
        picked = np.flatnonzero(chosen[at : at + len(choice.drops)])
        counts.append(choice.drops[picked[0]] if len(picked) else 0)
        at += len(choice.drops)
    return counts, [layer for place, layer in enumerate(whole) if chosen[width + place]]


@dataclass(frozen=True)
class AxisChoices:
    """How many units of one kind of axis may go from every layer, and what each is worth.

    `price` is the parameters saved by dropping one unit in every layer; `drops` the counts that the layout allows,
    ascending, 0 first.
    """

    kind: str
    units: int
    price: int
    drops: Sequence[int]
    limit: str = "a layer loses all units"  # what a larger cut would come to


def even_widths(candidates: Sequence[AxisChoices], target: float | int) -> dict[str, int]:
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
