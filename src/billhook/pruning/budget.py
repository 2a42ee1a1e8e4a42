"""From a goal (parameters, bytes, speed) to the ratio that reaches it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from billhook.errors import BillhookError
from billhook.models.plan import Plan

TOLERANCE = 0.005  # a goal so little below what can be had is met by it


@dataclass(frozen=True)
class Planner:
    """How an allocation turns parameters to save into a plan, the most that it can save, and the smallest difference."""

    make: Callable[[float], Plan]
    most: float | int
    step: float | int


def reach(
    planner: Planner,
    cost: Callable[[Plan], float],
    goal: float | int,
    say: Callable[[Any], str],
    parameters: bool = False,
) -> Plan:
    """The plan that brings `cost`, which falls as more is saved, down to `goal`: nearest to it, by bisection.

    A plan can take the solver seconds: the search ends where it cannot tell two savings apart, and there is none where the
    cost is counted in `parameters`.

    Raises:
        BillhookError: the model costs less already, or more than that whatever is cut; says what is possible.
    """
    whole, least = cost(Plan()), cost(planner.make(planner.most))
    if goal >= whole:
        raise BillhookError(f"{say(goal)} is no less than the model's own {say(whole)}: nothing is left to cut")
    if goal < least * (1 - TOLERANCE):
        raise BillhookError(
            f"{say(goal)} is below the smallest possible here, {say(least)}: ask for a smaller cut, or name more axes"
        )
    if parameters:
        return planner.make(min(whole - goal, planner.most))
    low, high, best, nearest = 0.0, planner.most, Plan(), whole - goal
    while high - low > planner.step / 4:
        middle = (low + high) / 2
        try:
            plan = planner.make(middle)
        except BillhookError:  # less than half of a step
            low = middle
            continue
        if abs((found := cost(plan)) - goal) < nearest:
            best, nearest = plan, abs(found - goal)
        low, high = (middle, high) if found > goal else (low, middle)
    if best == Plan():
        raise BillhookError(
            f"{say(goal)} is less than half of the smallest step below the model's own {say(whole)}: ask for a larger cut"
        )
    return best
