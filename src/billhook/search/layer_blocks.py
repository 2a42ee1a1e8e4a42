"""Blocks of layers that a search may drop whole: which block of each length, and what makes up for it during trials."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from billhook.calibration.layer_importance import losses_without_blocks
from billhook.calibration.passage import Route
from billhook.calibration.walk import walk
from billhook.cuts import restoration
from billhook.cuts.chopping import Settings
from billhook.models.axes import axes, reader_weight
from billhook.runtime.precision import computing
from billhook.runtime.progress import Tick, quiet
from billhook.runtime.run import Run
from billhook.tensors import Probes, Tokens

Block = tuple[int, int]  # the first of the layers that go whole, and how many go
LENGTHS = 6  # the most lengths that are tried


@dataclass(frozen=True)
class Patch:
    """The FFN's last projection before a block, refitted to replace the block (layerchop's `--patch linear`)."""

    param: str  # name of the parameter
    weight: Tensor  # its refitted value
    sha256: str  # digest of the refitted value


def lengths(longest: int) -> range:
    """At most `LENGTHS` lengths of blocks, evenly spaced up to `longest`."""
    step = max(1, -(-longest // LENGTHS))
    return range(step, longest + 1, step)


def cheapest(
    model: PreTrainedModel, probe: Probes, counts: Sequence[int], autocast: torch.dtype | None, tick: Tick = quiet
) -> tuple[Block, ...]:
    """For each length, the block without which the model loses least on `probe` (windows, length).

    The first and the last layer always stay.
    """
    blocks = []
    with computing(model.device, autocast):
        for count in counts:
            losses = losses_without_blocks(model, probe, count, tick)
            blocks.append((1 + min(range(len(losses)), key=losses.__getitem__), count))
    return tuple(blocks)


@torch.no_grad()
def patch(model: PreTrainedModel, tokens: Tokens, block: Block, run: Run) -> Patch | None:
    """What makes up for a block, in closed form; None where no FFN's output is added to its layer's as it is."""
    before = block[0] - 1
    axis = next(axis for axis in axes(model, ("ffn",)) if axis.layer == before)
    if not axis.ends_layer:
        return None
    route = Route("dense_target", held_out=0.0, only={before}, dropped=range(block[0], sum(block)))
    evidence = next(walk(model, tokens, ("ffn",), Run(hidden=run.hidden), route)).fit[axis.reader_module]
    W = reader_weight(model, axis)
    device = evidence.gram.device  # may be another one than the model's
    weight, _ = restoration.fitted(W.to(device), evidence, torch.arange(W.shape[1], device=device), Settings.damping)
    weight = weight.to(W.device).movedim(-1, axis.reader.dim).contiguous()
    return Patch(axis.reader.param, weight, hashlib.sha256(weight.cpu().float().numpy().tobytes()).hexdigest())
