"""Blocks of layers that a search may drop whole: which one of each length, and what makes up for it while candidates are tried."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from billhook.calibration.layer_importance import losses_without_blocks
from billhook.calibration.walk import walk
from billhook.cuts import restoration
from billhook.cuts.chopping import Settings
from billhook.models.axes import axes, reader_weight
from billhook.runtime.precision import computing
from billhook.runtime.progress import Tick, quiet
from billhook.tensors import Probes, Tokens

Block = tuple[int, int]  # the first of the layers that go whole, and how many
LENGTHS = 6  # different ones, at most


@dataclass(frozen=True)
class Patch:
    """The FFN's last projection before a block, refitted to add what the block would have (`--patch linear` of layerchop)."""

    param: str
    weight: Tensor
    sha256: str


def lengths(longest: int) -> range:
    """From the first step to the longest, in steps that are alike."""
    step = max(1, -(-longest // LENGTHS))
    return range(step, longest + 1, step)


def cheapest(
    model: PreTrainedModel, probe: Probes, counts: Sequence[int], autocast: torch.dtype | None, tick: Tick = quiet
) -> tuple[Block, ...]:
    """Of every length the block without which the model loses least on `probe` (windows, length); the first and last layer stay."""
    found = []
    with computing(model.device, autocast):
        for count in counts:
            losses = losses_without_blocks(model, probe, count, tick)
            found.append((1 + min(range(len(losses)), key=losses.__getitem__), count))
    return tuple(found)


@torch.no_grad()
def patch(model: PreTrainedModel, tokens: Tokens, block: Block) -> Patch | None:
    """What makes up for a block, in closed form; None where no FFN's output is added to the layer's as it is."""
    before = block[0] - 1
    axis = next(axis for axis in axes(model, ("ffn",)) if axis.layer == before)
    if not axis.ends_layer:
        return None
    gone = range(block[0], sum(block))
    stops = walk(model, tokens, ("ffn",), stream="dense_target", dropped=gone, only={before}, held_out=0.0)
    evidence = next(iter(stops)).fit[axis.reader_module]
    W = reader_weight(model, axis)
    there = evidence.gram.device  # where the Gram is, which may be elsewhere than the model
    weight, _ = restoration.fitted(W.to(there), evidence, torch.arange(W.shape[1], device=there), Settings.damping)
    weight = weight.to(W.device).movedim(-1, axis.reader.dim).contiguous()
    return Patch(axis.reader.param, weight, hashlib.sha256(weight.cpu().float().numpy().tobytes()).hexdigest())
