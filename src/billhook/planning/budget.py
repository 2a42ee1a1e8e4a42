"""The plan that meets a budget: a share of parameters, a number of them, bytes, or speed on this machine."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from billhook.checkpoints.load import Opened
from billhook.errors import BillhookError
from billhook.models import sizes
from billhook.models.families import row_of
from billhook.models.plan import Plan
from billhook.planning.latency import layer_times
from billhook.planning.recipe import Recipe
from billhook.runtime.progress import Tick, quiet

TOLERANCE = 0.005  # a goal so little below what can be had is met by it


@dataclass(frozen=True)
class Planner:
    """How an allocation turns parameters to save into a plan, the most that it can save,
    and the smallest difference."""

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

    A plan can take the solver seconds: the search ends where it cannot tell two savings apart, and there is none where
    the cost is counted in `parameters`.

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


def solved(opened: Opened, recipe: Recipe, planner: Planner, tick: Tick = quiet) -> Plan:
    """What `planner` makes of the recipe's budget.

    Raises:
        BillhookError: the budget cannot be met; says what can.
    """
    model, goal, total = opened.model, recipe.budget, sizes.total_parameters(opened.model)
    if goal.ratio is not None:
        return planner.make(goal.ratio * sizes.decoder_parameters(model))
    if goal.params is not None:
        kept, say = (lambda plan: total - sizes.saved_by(model, plan)), "{:,.0f} parameters".format
        return reach(planner, kept, goal.params, say, parameters="residual" not in recipe.kinds)
    if goal.memory is not None:
        if not row_of(model).attention:
            raise BillhookError(
                f"what the KV cache of {model.config.model_type} takes is not known here: "
                "give a ratio or a number of parameters"
            )

        def held(plan: Plan) -> int:
            cached = sizes.kv_cache_entries(model, plan, goal.context, goal.batch)
            return opened.dtype.itemsize * (total - sizes.saved_by(model, plan) + cached)

        return reach(planner, held, goal.memory, "{:,.0f} bytes".format)
    assert goal.speedup is not None
    seconds = layer_times(model, recipe.unit_kinds, tick=tick)
    dense = seconds(Plan())
    return reach(
        planner,
        seconds,
        dense / goal.speedup,
        lambda found: f"{found:.2g} s for a prefill ({dense / found:,.2f} times as fast)",
    )
