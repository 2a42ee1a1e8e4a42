"""How many channels of the residual stream a budget takes, and what a plan of them says."""

from functools import cache
from typing import Any

from transformers import PreTrainedModel

from billhook.errors import BillhookError
from billhook.models import residual, rotation
from billhook.models.families import sizes
from billhook.models.layout import layout_of, stock_holder
from billhook.models.plan import Plan
from billhook.planning.budget import Planner


def planner(model: PreTrainedModel, multiple_of: int, rotate: bool) -> Planner:
    """Parameters of the decoder to save -> the residual dimension, a multiple of `multiple_of` that a stock config
    takes, that comes nearest.

    Raises:
        BillhookError: the model cannot give up channels, or not so; `make` raises it for an impossible saving.
    """
    if layout_of(model) != "uniform":
        raise BillhookError(
            "the layers of this model differ, and axis 'residual' is of the uniform layout: name others"
        )
    channels, each = residual.residual(model).channels, residual.price(model)[0]
    residual.flow(model, residual.residual(model))
    if rotate:
        rotation.check(model)
    layer = sizes(model, 0)

    @cache
    def fits(size: int) -> bool:
        return bool(stock_holder(model, {**layer, "hidden_size": size}))

    smaller = range(multiple_of, channels, multiple_of)
    least = next((size for size in smaller if fits(size)), None)
    if least is None:
        raise BillhookError(
            f"--multiple-of {multiple_of}: no residual dimension below {channels} is a multiple of it: lower it"
        )
    most = (channels - least) * each

    def make(saving: float | int) -> Plan:
        if saving > most + multiple_of * each / 2:
            raise BillhookError(
                f"the budget asks for {saving:,.0f} parameters, but the residual stream can give up at most {most:,} before it is "
                "gone: lower the ratio"
            )
        wanted = channels - saving / each
        found = next(size for size in sorted((*smaller, channels), key=lambda n: abs(n - wanted)) if fits(size))
        if found == channels:
            raise BillhookError(
                f"the budget is less than half of the smallest step ({multiple_of * each:,} parameters): raise the ratio, or "
                "lower --multiple-of"
            )
        return Plan(residual=channels - found, rotate=rotate)

    return Planner(make, most, multiple_of * each)


def record(model: PreTrainedModel, plan: Plan) -> dict[str, Any] | None:
    """What a plan does to the residual stream of a model that is not yet cut; None where it leaves it alone."""
    if not plan.residual:
        return None
    before = residual.residual(model).channels
    return {
        "before": before,
        "kept": before - plan.residual,
        "rotated": plan.rotate,
        "untied_parameters": residual.parameters_added(model, plan.residual) if plan.rotate else 0,
    }
