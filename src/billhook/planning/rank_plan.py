"""Ranks of linear weights that become two thin ones, by shares of their entries and a budget of parameters."""

from collections.abc import Callable, Mapping

from transformers import PreTrainedModel

from billhook.errors import BillhookError, ModelError
from billhook.math.low_rank import rank_for
from billhook.models import limits
from billhook.models.families import attention, layers, linear, linears, shape
from billhook.models.plan import Plan
from billhook.models.sizes import saved_by, saved_by_rank

Shares = Mapping[str, float]  # share of the entries of each weight, by path, that its factors may hold; 1: it stays
HALVINGS = 40  # of a bisection between no share and all


def check(model: PreTrainedModel, layout: str) -> None:
    """Refuse a model whose weights cannot become two thin ones.  Raises BillhookError."""
    limits.check_kinds(model, (), layout)
    for n in range(len(layers(model))):
        for path in (path for group in linears(model, n) for path in group.values()):
            linear(model, path)
        sizes = attention(model, n)
        if not sizes.value_dim == sizes.key_dim == sizes.head_dim:
            raise ModelError(
                f"layer {n} has narrower value heads or key heads, whose projections stay whole: factor another model"
            )


def weights(model: PreTrainedModel) -> dict[str, tuple[int, str]]:
    """Layer and role of every linear weight of the decoder layers, by path."""
    every = ((n, group) for n in range(len(layers(model))) for group in linears(model, n))
    return {path: (n, role) for n, group in every for role, path in group.items()}


def rank_plan(model: PreTrainedModel, shares: Shares) -> Plan:
    """The plan of such shares; a weight that its factors would not make smaller stays."""
    ranks = {path: max(1, rank_for(share, *shape(linear(model, path)))) for path, share in shares.items() if share < 1}
    return Plan(ranks={path: rank for path, rank in ranks.items() if saved_by_rank(linear(model, path), rank) > 0})


def fitting(model: PreTrainedModel, plan_of: Callable[[float], Plan], saving: float | int) -> Plan:
    """The plan of the largest scale from 0 to 1 that saves no less than `saving` parameters.

    Args:
        plan_of: the plan at a scale; what is kept grows with it.

    Raises:
        BillhookError: even the smallest saves less.
    """
    low, high = 0.0, 1.0
    if (most := saved_by(model, plan_of(low))) < saving:
        raise BillhookError(
            f"the budget asks for {saving:,.0f} parameters, and the smallest ranks save {most:,}: ask for less"
        )
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        if saved_by(model, plan_of(middle)) >= saving:
            low = middle
        else:
            high = middle
    return plan_of(low)
