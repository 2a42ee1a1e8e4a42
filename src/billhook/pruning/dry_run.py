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
    locate,
    open_skeleton,
    resolve_device,
    too_large,
)
from billhook.checkpoints.save import stored_bytes
from billhook.checkpoints.shards import weight_files
from billhook.checkpoints.streaming import open_paged
from billhook.checkpoints.tokenizers import load_tokenizer
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
    clock = Clock()
    seen = _subject(name, recipe, stream_weights, tick, clock)
    rss = psutil.Process().memory_info().rss
    tick("rehearsing", 0, 1)
    stages = {"starting": Cost(started, 0.0), "reading the text": Cost(clock.seconds["reading the text"], 0.0)}
    known = _known(seen, _speeds(seen.folder, output, started))
    stages |= known.stages
    tick("rehearsing", 1, 1)
    model, stored = seen.opened.model, seen.opened.dtype
    total, decoder = sizes.total_parameters(model), sizes.decoder_parameters(model)
    return {
        "parameters": {"before": total, "after": total - known.cut},
        "decoder_parameters": {"before": decoder, "after": decoder - known.cut},
        "will": known.words,
        "stages": {stage: {"seconds": one.seconds, "flops": one.flops} for stage, one in stages.items()},
        "seconds": sum(one.seconds for one in stages.values()),
        "flops": sum(one.flops for one in stages.values()),
        "peak_bytes": max(seen.peak, rss + _held(seen, known, hidden_budget)),
        "free_bytes": free_bytes(seen.device),
        "disk_bytes": preflight.disk_bytes(model, seen.recipe, seen.dtype, stored, known.cut),
        "disk_free_bytes": shutil.disk_usage(preflight.above(output)).free,
        "streamed": seen.stream,
        "rehearsed_widths": known.rehearsed and f"1/{known.rehearsed.shrunk}",
    }


@dataclass(frozen=True)
class Subject:
    """What a prune would work on."""

    opened: Opened  # the shapes of the model alone
    folder: Path
    recipe: Recipe  # with as many windows as the text has
    dtype: torch.dtype  # to compute in
    device: torch.device
    stream: bool  # whether weights stay in their files until a layer needs them
    tokens: int  # of calibration text
    peak: int  # bytes of memory that reading it took


@dataclass(frozen=True)
class Known:
    """What is known of its prune."""

    stages: dict[str, Cost]
    cut: int  # parameters that go
    states: int  # how many hidden states of each token are held
    work: int  # bytes, besides model and hidden states
    rehearsed: Rehearsed | None
    words: str  # what will be done, where the method says


def _subject(name: str, recipe: Recipe, stream_weights: bool | None, tick: Tick, clock: Clock) -> Subject:
    device, folder = resolve_device(recipe.compute.device), locate(name, tick)
    if not folder.is_dir():
        raise BillhookError(f"--dry-run: {name} is no folder of safetensors, which alone says its sizes unread")
    model = open_skeleton(name, tick, recipe.compute.family_row)
    found = check_folder(folder, name)
    dtype = DTYPES.get(recipe.compute.dtype, torch.float32 if device.type == "cpu" else found.dtype)
    stream = too_large(found, dtype, device) if stream_weights is None else stream_weights
    if stream:
        open_paged(found, dtype, device)  # which says what cannot be read by parts
    peak, tokens = psutil.Process().memory_info().rss, 0
    with clock("reading the text"), peak_growth(torch.device("cpu")) as growth:
        opened, text = Opened(model, None, name, folder, found.dtype), recipe.calibration
        if recipe.reads:
            opened.tokenizer = load_tokenizer(folder, name)
            check_positions(opened, text.seq_len)
            read = recipe.method.draw(opened, recipe, data.calibration_text(text.source, tick), Run(tick))
            tokens = read.calibration.numel()
            text = text.model_copy(update={"samples": len(read.calibration) or None})  # as many as it has
            recipe = replace(recipe, calibration=text)
    return Subject(opened, folder, recipe, dtype, device, stream, tokens, peak + growth())


def _known(seen: Subject, speeds: "Speeds") -> Known:
    """Plan the prune, and rehearse what layers show of it."""
    model, recipe, length = seen.opened.model, seen.recipe, seen.recipe.calibration.seq_len
    planned = _planned(seen.opened, recipe)
    price = cache(lambda: rehearsal.window_seconds(model, seen.dtype, seen.device, length))
    beside = recipe.method.foreseen(seen.opened, recipe, planned, price, seen.stream)
    read = (beside.windows or recipe.samples, length)
    played = beside.rehearsed if seen.tokens else None
    rehearsed = rehearsal.rehearse(model, read, played, seen.dtype, seen.device) if played else None
    cut, every = sizes.saved_by(model, planned.plan), len(layers(model))
    stages = {"loading": Cost((READ if seen.stream else 1) * stored_bytes(seen.folder) / speeds.load, 0.0)}
    if rehearsed:
        narrowed = set(rehearsal.cut_layers(model, planned.plan)) - set(planned.plan.layers)
        stages |= _pruning(rehearsed, every, len(narrowed))
    passes = dict(beside.stages if seen.tokens else {})
    if recipe.compute.look and not seen.stream:
        passes["look"] = Passes(LOOKED * every, LOOKED)
    stages |= _priced(passes, model, length, price) if passes else {}
    stages["writing and verifying"] = Cost(_verifying(seen, cut, speeds), 0.0)
    both = getattr(planned.settings, "stream", "") == "dense_target"  # the unpruned model's beside the pruned one's
    work = max(beside.memory, rehearsed.work_bytes if rehearsed else 0)
    return Known(stages, cut, 2 if both else 1, work, rehearsed, beside.words)


def _held(seen: Subject, known: Known, hidden_budget: int | None) -> int:
    """Bytes that the prune holds at its highest, besides what this process holds now."""
    model, each = seen.opened.model, seen.dtype.itemsize
    embedding = model.get_input_embeddings().weight
    states = known.states * seen.tokens * embedding.shape[1] * each
    pruning = (states if hidden_budget is None else min(states, hidden_budget)) + known.work
    if seen.stream:
        layer = each * sizes.layer_parameters(model, len(layers(model)) - 1)
        return max(each * embedding.numel(), layer + pruning)
    held = each * sizes.total_parameters(model)
    return max(held + stored_bytes(seen.folder), held + pruning, 2 * (held - each * known.cut))


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


def _verifying(seen: Subject, cut: int, speeds: Speeds) -> float:
    """Seconds: written, loaded again and compared;
    and in a process of its own, which starts and generates, unless layers stream."""
    model, on = seen.opened.model, {"dtype": seen.dtype, "device": seen.device}
    total = sizes.total_parameters(model)
    kept, size = 1 - cut / total, seen.opened.dtype.itemsize * (total - cut)
    step, batch = rehearsal.passes(model, seen.dtype, seen.device)
    weight = model.get_output_embeddings().weight
    rows = torch.randn(min(len(weight), rehearsal.ROWS), weight.shape[1], **on)
    one, many = (torch.randn(weight.shape[1], count, **on) for count in (2, 64))
    parts, depth = len(weight) / len(rows), kept * len(layers(model))
    step = step * depth + parts * least_seconds(lambda: rows @ one)
    batch = batch * depth + parts * least_seconds(lambda: rows @ many)
    if seen.stream:
        return size / speeds.write + PAGED * (size / speeds.load + batch)
    return size / speeds.write + LOADS * size / speeds.load + speeds.start + STEPS * step + BATCHES * batch
