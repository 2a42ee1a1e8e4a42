"""The plan that meets a budget: a share of parameters, a number of them, bytes, or speed on this machine."""

import torch
from transformers import PreTrainedModel

from billhook.models import sizes
from billhook.models.plan import Plan
from billhook.pruning import budget
from billhook.pruning.budget import Planner
from billhook.pruning.latency import layer_times
from billhook.pruning.recipe import Recipe
from billhook.runtime.progress import Tick


def solved(model: PreTrainedModel, chosen: Recipe, planner: Planner, dtype: torch.dtype, tick: Tick) -> Plan:
    """What `planner` makes of the recipe's budget; `dtype`: what a budget in bytes is stored in.

    Raises:
        BillhookError: the budget cannot be met; says what can.
    """
    total = sizes.total_parameters(model)
    if chosen.ratio is not None:
        return planner.make(chosen.ratio * sizes.decoder_parameters(model))
    if chosen.params is not None:
        kept, say = (lambda plan: total - sizes.saved_by(model, plan)), "{:,.0f} parameters".format
        return budget.reach(planner, kept, chosen.params, say, parameters=not chosen.slices)
    if chosen.memory is not None:

        def held(plan: Plan) -> int:
            cached = sizes.kv_cache_entries(model, plan, chosen.context, chosen.batch)
            return dtype.itemsize * (total - sizes.saved_by(model, plan) + cached)

        return budget.reach(planner, held, chosen.memory, "{:,.0f} bytes".format)
    assert chosen.speedup is not None
    seconds = layer_times(model, chosen.unit_kinds, tick=tick)
    dense = seconds(Plan())
    return budget.reach(
        planner,
        seconds,
        dense / chosen.speedup,
        lambda found: f"{found:.2g} s for a prefill ({dense / found:,.2f} times as fast)",
    )
