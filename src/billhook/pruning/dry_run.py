"""What a prune will come to, before it:
parameters, memory, disk, operations and time, from a rehearsal on this machine."""

import os
import shutil
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import psutil
import torch

from billhook import data
from billhook.checkpoints.load import (
    DTYPES,
    Opened,
    check_folder,
    check_positions,
    load_tokenizer,
    locate,
    open_skeleton,
    resolve_device,
    too_large,
)
from billhook.checkpoints.save import stored_bytes
from billhook.checkpoints.shards import weight_files
from billhook.checkpoints.streaming import open_paged
from billhook.errors import BillhookError
from billhook.models import sizes
from billhook.models.families import layers
from billhook.planning.method import LOOKED, Passes, Planned, Price
from billhook.planning.recipe import Recipe
from billhook.planning.texts import Texts
from billhook.pruning import preflight, rehearsal
from billhook.pruning.rehearsal import Cost, Rehearsed
from billhook.runtime.memory import free_bytes, peak_growth
from billhook.runtime.offload import finite
from billhook.runtime.progress import Clock, Tick, least_seconds, quiet
from billhook.runtime.run import Run

PROBED = 1 << 25  # bytes that are read, copied and written to see how fast this machine does it
STEPS = 96  # passes of one token that verify a result, over all generations
BATCHES = 40  # passes of 32 tokens that verify a result
LOADS = 4  # times that a result is opened to verify it; once less where it is stored in float32
PAGED = 6  # passes that verify a result whose weights stay in their files
TRAINED = 3  # forward passes whose operations training takes: forth, and back by states and by weights
READ = 2  # times that weights in files are read while they are pruned: for use, and to see whether they were edited


def estimate(
    name: str,
    recipe: Recipe,
    output: Path,
    *,
    stream_weights: bool | None = None,
    hidden_budget: int | None = None,
    tick: Tick = quiet,
) -> dict[str, Any]:
    """The cost of `prune` by a recipe, as plain data; a stage's time and operations, bytes of memory and disk.

    Nothing of the model is loaded: its shapes are, and the calibration text, which is read as the prune will.

    Raises:
        BillhookError: the prune could not be done, or what it costs cannot be told beforehand.
    """
    if why := _why_not(recipe):
        raise BillhookError(f"--dry-run: {why}: what that costs cannot be told beforehand")
    started = time.time() - psutil.Process().create_time()
    clock, device = Clock(), resolve_device(recipe.compute.device)
    folder = locate(name, tick)
    if not folder.is_dir():
        raise BillhookError(f"--dry-run: {name} is no folder of safetensors, which alone says its sizes unread")
    model = open_skeleton(name, tick, recipe.compute.family_row)
    found = check_folder(folder, name)
    stored = found.dtype
    dtype = DTYPES.get(recipe.compute.dtype, torch.float32 if device.type == "cpu" else stored)
    stream = too_large(found, dtype, device) if stream_weights is None else stream_weights
    if stream:
        open_paged(found, dtype, device)  # which says what cannot be read by parts
    peak, tokens = psutil.Process().memory_info().rss, 0
    with clock("reading the text"), peak_growth(torch.device("cpu")) as growth:
        opened, text = Opened(model, None, name, folder, stored), recipe.calibration
        if recipe.reads:
            opened.tokenizer = load_tokenizer(folder, name)
            check_positions(opened, text.seq_len)
            read = recipe.method.draw(opened, recipe, data.calibration_text(text.source, tick), Run(tick))
            tokens = read.calibration.numel()
            text = text.model_copy(update={"samples": len(read.calibration) or None})  # as many as it has
            recipe = replace(recipe, calibration=text)
    peak, rss = peak + growth(), psutil.Process().memory_info().rss
    tick("rehearsing", 0, 1)
    planned = _planned(opened, recipe)
    price = cache(lambda: rehearsal.window_seconds(model, dtype, device, recipe.calibration.seq_len))
    beside, read = recipe.method.foreseen(opened, recipe, planned, price, stream), recipe.calibration
    windows = beside.windows or recipe.samples
    played = beside.rehearsed if tokens else None
    rehearsed = rehearsal.rehearse(model, (windows, read.seq_len), played, dtype, device) if played else None
    total, cut = sizes.total_parameters(model), sizes.saved_by(model, planned.plan)
    held, written = dtype.itemsize * total, stored.itemsize * (total - cut)
    speeds = _speeds(folder, output, started)
    stages = {"starting": Cost(started, 0.0), "reading the text": Cost(clock.seconds["reading the text"], 0.0)}
    stages["loading"] = Cost((READ if stream else 1) * stored_bytes(folder) / speeds.load, 0.0)
    if rehearsed:
        cut_whole = set(planned.plan.layers)
        stages |= _pruning(
            rehearsed, len(layers(model)), len(set(rehearsal.cut_layers(model, planned.plan)) - cut_whole)
        )
    passes = dict(beside.stages if tokens else {})
    if recipe.compute.look and not stream:
        passes["look"] = Passes(LOOKED * len(layers(model)), LOOKED)
    stages |= _priced(passes, model, read.seq_len, price) if passes else {}
    stages["writing and verifying"] = Cost(
        _verifying(model, 1 - cut / total, written, speeds, dtype, device, stream), 0.0
    )
    tick("rehearsing", 1, 1)
    states = tokens * model.get_input_embeddings().weight.shape[1] * dtype.itemsize
    states *= (
        2 if getattr(planned.settings, "stream", "") == "dense_target" else 1
    )  # the unpruned model's beside the pruned one's
    states = states if hidden_budget is None else min(states, hidden_budget)
    pruning = states + max(beside.memory, rehearsed.work_bytes if rehearsed else 0)
    if stream:
        layer = dtype.itemsize * sizes.layer_parameters(model, len(layers(model)) - 1)
        ends = dtype.itemsize * model.get_input_embeddings().weight.numel()
        highest = rss + max(ends, layer + pruning)
    else:
        highest = rss + max(held + stored_bytes(folder), held + pruning, 2 * (held - dtype.itemsize * cut))
    decoder = sizes.decoder_parameters(model)
    return {
        "parameters": {"before": total, "after": total - cut},
        "decoder_parameters": {"before": decoder, "after": decoder - cut},
        "stages": {stage: {"seconds": one.seconds, "flops": one.flops} for stage, one in stages.items()},
        "seconds": sum(one.seconds for one in stages.values()),
        "flops": sum(one.flops for one in stages.values()),
        "peak_bytes": max(peak, highest),
        "free_bytes": free_bytes(device),
        "disk_bytes": preflight.disk_bytes(model, recipe, dtype, stored, cut),
        "disk_free_bytes": shutil.disk_usage(preflight.above(output)).free,
        "streamed": stream,
        "rehearsed_widths": rehearsed and f"1/{rehearsed.shrunk}",
    }


def _why_not(recipe: Recipe) -> str:
    """Why a cost cannot be told beforehand, or ''."""
    return recipe.method.why_unforeseen(recipe) or preflight.why_whole(recipe)


def _planned(opened: Opened, recipe: Recipe) -> Planned:
    recipe.method.check(opened, recipe)
    nothing = torch.zeros(0, recipe.calibration.seq_len, dtype=torch.long)
    return recipe.method.plan(opened, recipe, Texts(nothing, nothing), Run())


def _pruning(found: Rehearsed, total: int, cut: int) -> dict[str, Cost]:
    """Every stage: forward over all layers, the others over those that are cut."""
    stages = {}
    for stage, first in found.first.items():
        further, times = found.further[stage], (total if stage == "forward" else cut) - 1
        stages[stage] = Cost(first.seconds + times * further.seconds, first.flops + times * further.flops)
    return stages


def _priced(stages: Mapping[str, Passes], model: Any, length: int, price: Price) -> dict[str, Cost]:
    """What was counted in windows, by the seconds of one here."""
    seconds = price()
    logits = 2 * length * model.get_output_embeddings().weight.numel()
    each = (2 * length * sizes.macs_per_token(model, 0) - logits) / len(layers(model))
    return {
        name: Cost(one.seconds(*seconds), one.seconds(each, logits, TRAINED * each)) for name, one in stages.items()
    }


@dataclass(frozen=True)
class Speeds:
    """Bytes a second: loading (read, copied, looked through), writing to the disk of the output; and a start."""

    load: float
    write: float
    start: float  # seconds that a process takes until it works


def _speeds(folder: Path, output: Path, started: float) -> Speeds:
    file = max(weight_files(folder, str(folder))[0], key=lambda one: one.stat().st_size)
    count = min(PROBED, file.stat().st_size)

    def load() -> None:
        with file.open("rb") as opened:
            whole = torch.frombuffer(bytearray(opened.read(count)), dtype=torch.uint8)
        half = whole[: count // 4 * 4].view(torch.float32).to(torch.float32, copy=True)
        finite(half)

    def write() -> None:
        with tempfile.TemporaryFile(dir=preflight.above(output)) as made:
            made.write(bytes(count))
            made.flush()
            os.fsync(made.fileno())

    return Speeds(count / least_seconds(load), count / least_seconds(write), started)


def _verifying(
    model: Any,
    kept: float,
    size: int,
    speeds: Speeds,
    dtype: torch.dtype,
    device: torch.device,
    stream: bool,
) -> float:
    """Seconds: written, loaded again and compared;
    and in a process of its own, which starts and generates, unless layers stream.

    Args:
        kept: share of the model that is left.
        size: bytes of what is written.
    """
    step, batch = rehearsal.passes(model, dtype, device)
    weight = model.get_output_embeddings().weight
    rows = torch.randn(min(len(weight), rehearsal.ROWS), weight.shape[1], dtype=dtype, device=device)
    one, many = (torch.randn(weight.shape[1], count, dtype=dtype, device=device) for count in (2, 64))
    parts, depth = len(weight) / len(rows), kept * len(layers(model))
    step = step * depth + parts * least_seconds(lambda: rows @ one)
    batch = batch * depth + parts * least_seconds(lambda: rows @ many)
    if stream:
        return size / speeds.write + PAGED * (size / speeds.load + batch)
    return size / speeds.write + LOADS * size / speeds.load + speeds.start + STEPS * step + BATCHES * batch
