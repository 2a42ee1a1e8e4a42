"""How long a decoder layer takes at candidate sizes, on this machine: what a budget in speed is solved by."""

import copy
import statistics
import time
from collections.abc import Callable

import torch
from scipy.interpolate import PchipInterpolator
from transformers import PreTrainedModel

from billhook.calibration.forward import enter, run_layer
from billhook.errors import BillhookError
from billhook.evaluation.speed import synchronise
from billhook.models.axes import Axis, axes
from billhook.models.families import layers, row_of
from billhook.models.plan import Plan
from billhook.models.surgery import remove
from billhook.planning.sensitivity import counts
from billhook.runtime.progress import Tick, quiet

PROMPT = 512  # tokens of the prefill that is timed, one prompt at a time: as `billhook evaluate` measures it
POINTS = (0.25, 0.5, 0.75)  # shares of an axis that are tried
REPEATS = 9


def layer_times(model: PreTrainedModel, kinds: tuple[str, ...], tick: Tick = quiet) -> Callable[[Plan], float]:
    """A function from a plan to the seconds that a prefill of `PROMPT` tokens would take.

    The first layer stands for all: it is timed whole and with each axis cut alone, in turns; what an axis saves is
    interpolated between the sizes that were tried, and adds up over axes and layers.

    Raises:
        BillhookError: the layers are not alike.
    """
    row = row_of(model)
    if row.experts or row.beside:
        kind = "a mixture of experts" if row.experts else "a hybrid"
        raise BillhookError(
            f"--speedup times the first layer for all, and those of {kind} are not alike: give --ratio or --params"
            + (" or --memory" if row.attention else "")
        )
    length = min(PROMPT, getattr(model.config, "max_position_embeddings", PROMPT))
    tokens = torch.randint(model.config.vocab_size, (1, length), generator=torch.Generator().manual_seed(0)).to(
        model.device
    )
    first = [axis for axis in axes(model, kinds) if axis.layer == 0]
    tried = [(axis, count) for axis in first for count in counts(axis, POINTS)]
    candidates = [layers(model)[0], *(_cut_copy(model, axis, count) for axis, count in tried)]
    (state,), (calls,) = enter(model, [tokens])
    tasks: list[Callable[[], object]] = [lambda: model(tokens, use_cache=False, logits_to_keep=1)]
    tasks += [lambda layer=layer: run_layer(layer, state, calls[0]) for layer in candidates]
    whole, layer, *others = _in_turns(tasks, model.device, tick)
    saves = {}
    for axis in first:
        points = [(count, layer - seconds) for (one, count), seconds in zip(tried, others, strict=True) if one is axis]
        if not points:  # nothing of it can go
            continue
        gone, gains = zip((0, 0.0), *points, strict=True)
        saves[axis.kind] = PchipInterpolator(gone, gains, extrapolate=True)

    def seconds(plan: Plan) -> float:
        cut = sum(float(saves[kind](count)) for (_, kind), count in plan.drops.items() if count)
        return whole - cut - layer * len(plan.layers)

    return seconds


def _cut_copy(model: PreTrainedModel, axis: Axis, count: int) -> torch.nn.Module:
    """A copy of the axis's layer without `count` units, the same from each block; the model keeps its own."""
    found = layers(model)
    own, each = found[axis.layer], axis.units // axis.blocks
    found[axis.layer] = copy.deepcopy(own)
    try:
        drop = torch.cat([torch.arange(count // axis.blocks) + each * b for b in range(axis.blocks)])
        remove(model, axis, drop)
        return found[axis.layer]
    finally:
        found[axis.layer] = own


@torch.inference_mode()
def _in_turns(tasks: list[Callable[[], object]], device: torch.device, tick: Tick) -> list[float]:
    """Median seconds of each task, run in turns so that a drifting machine favours none; one round warms up."""
    found: list[list[float]] = [[] for _ in tasks]
    for turn in range(REPEATS + 1):
        tick("timing layers", turn, REPEATS + 1)
        for seconds, task in zip(found, tasks, strict=True):
            synchronise(device)
            start = time.perf_counter()
            task()
            synchronise(device)
            seconds.append(time.perf_counter() - start)
    tick("timing layers", REPEATS + 1, REPEATS + 1)
    return [statistics.median(seconds[1:]) for seconds in found]
