"""One line that says, before the work, what will go."""

from collections.abc import Sequence

from transformers import PreTrainedModel

from billhook.math import layer_presets
from billhook.models import residual
from billhook.models.axes import axes
from billhook.models.plan import Plan
from billhook.models.sizes import decoder_parameters, saved_by, total_parameters
from billhook.planning.residual_budget import record
from billhook.reports.formatting import ranges


def plan_line(model: PreTrainedModel, plan: Plan, budget: str) -> str:
    """What a plan will cut, before it does, in one line."""
    whole, decoder, saved = total_parameters(model), decoder_parameters(model), saved_by(model, plan)
    found = {axis.kind: [] for axis in axes(model, plan.kinds)}
    for axis in axes(model, plan.kinds):
        if axis.layer not in plan.layers:
            found[axis.kind].append(axis.units - plan.drops.get((axis.layer, axis.kind), 0))
    kept = [f"{kind} {min(n):,}" + (f"-{max(n):,}" if max(n) > min(n) else "") for kind, n in found.items()]
    gone = [f"without layers {', '.join(map(str, plan.layers))}"] if plan.layers else []
    if plan.ranks:
        low, high = min(plan.ranks.values()), max(plan.ranks.values())
        gone.append(f"{len(plan.ranks)} weights as two thin ones of ranks {low}-{high}")
    if counts := {len(kept) for pairs in plan.pairs.values() for kept in pairs}:
        gone.append(f"rotary pairs of a head {min(counts)}" + (f"-{max(counts)}" if len(counts) > 1 else ""))
    return (
        f"for {budget}: {whole:,} → {whole - saved:,} parameters, -{saved / decoder:.2%} of the decoder; "
        f"left in each layer: {', '.join(kept + gone) or 'all'}"
    )


def patch_words(gone: Sequence[int]) -> str:
    """What will make up for the layers that go."""
    found = [
        f"the FFN of layer {cut[0] - 1} makes up for {ranges(cut)}"
        if cut[0]
        else f"nothing stands before {ranges(cut)}"
        for cut in layer_presets.runs_of(gone)
    ]
    return f"; {', '.join(found)}"


def residual_line(model: PreTrainedModel, plan: Plan, budget: str) -> str:
    """What a plan will cut, before it does, in one line."""
    found, whole = record(model, plan), total_parameters(model)
    assert found is not None
    share = plan.residual * residual.price(model)[0] / decoder_parameters(model)
    head = f"; its head, no longer tied, adds {found['untied_parameters']:,}" if found["untied_parameters"] else ""
    return (
        f"for {budget}: {whole:,} → {whole - saved_by(model, plan):,} parameters, -{share:.2%} of the decoder; left of the residual "
        f"stream: {found['kept']:,} of {found['before']:,} channels{', rotated' if plan.rotate else ''}{head}"
    )
