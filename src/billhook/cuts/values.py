"""Values turned before any goes: the model stays what it is, its channels differ in worth.

First to their principal axes, from which a plan is made; then to those that the plan's widths can do most with.
"""

from dataclasses import replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from billhook.calibration.passage import Route
from billhook.calibration.walk import walk
from billhook.math.shared_turn import fitted_turn
from billhook.math.value_axes import principal_turn
from billhook.models.axes import Axis, reader_weight
from billhook.models.families import layers
from billhook.models.plan import Plan
from billhook.runtime.progress import quiet
from billhook.runtime.run import Run
from billhook.tensors import Gram, Tokens

STAGE = "turning values"
DAMPING = 1e-3  # ridge of what attention puts out, as a share of its mean diagonal
ENOUGH = 8192  # tokens, for moments of as many entries as a head has


@torch.no_grad()
def turn_values(model: PreTrainedModel, tokens: Tokens, run: Run, plan: Plan | None = None) -> None:
    """Turn the value channels of every KV head, and the columns that read them, in place: equal logits to rounding.

    Args:
        tokens: calibration windows (windows, length), of which the first `ENOUGH` tokens are read.
        plan: how many channels will go; then layers that lose some are turned for the width that stays.
    """
    few, total = tokens[: max(1, ENOUGH // tokens.shape[1])], len(layers(model))
    only = None if plan is None else [n for (n, kind), count in plan.drops.items() if kind == "value" and count]
    if only == []:
        return
    for layer in walk(model, few, ("value",), replace(run, tick=quiet), Route(held_out=0.0, only=only)):
        run.tick(STAGE, layer.number, total)
        with run.clock(STAGE):
            for axis in layer.axes:
                gone = 0 if plan is None else plan.drops[axis.layer, "value"]
                _turn(model, axis, layer.fit[axis.reader_module].gram, (axis.units - gone) // axis.blocks)
    run.tick(STAGE, total, total)


def _turn(model: PreTrainedModel, axis: Axis, gram: Gram, kept: int) -> None:
    """Turn one layer's values, KV head by KV head, for `kept` channels of each, if some will go."""
    W = reader_weight(model, axis)
    by_head = axis.reader.index.view(axis.blocks, -1, axis.reader.index.shape[1])  # (KV heads, channels, query heads)
    for head, columns in enumerate(by_head.to(gram.device)):
        shared = list(columns.mT)
        own = [W[:, each.to(W.device)].to(gram) for each in shared]
        moments = torch.stack([gram[each[:, None], each] for each in shared])
        onto, back = principal_turn(moments, torch.stack([weight.mT @ weight for weight in own]), DAMPING)
        if kept < len(onto) and len(shared) > 1:
            every, reads = torch.cat(shared), torch.cat(own, 1)
            onto, back = fitted_turn(onto, back, gram[every[:, None], every], reads.mT @ reads, kept)
        for each, weight in zip(shared, own, strict=True):
            W[:, each.to(W.device)] = (weight @ back).to(W)
        for slot in axis.writers:
            rows = slot.index.view(axis.blocks, -1)[head]
            _turn_rows(model.get_parameter(slot.param).data.movedim(slot.dim, 0), rows, onto)


def _turn_rows(weight: Tensor, rows: Tensor, onto: Tensor) -> None:
    rows = rows.to(weight.device)
    weight[rows] = (onto @ weight[rows].to(onto)).to(weight)
