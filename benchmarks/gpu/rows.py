"""The rows of the table: each measures one thing that billhook does, beside its floor and beside a bare loop."""

import gc
import itertools
import shutil
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import bare
import floors
import shapes
import torch
from floors import Card, Shape, Work
from shapes import Sizes
from transformers import AutoModelForCausalLM

import billhook
from billhook.checkpoints.load import open_model
from billhook.cuts.masking import Masking, mask
from billhook.cuts.narrowing import Settings, narrow
from billhook.data import Windows
from billhook.evaluation.perplexity import perplexities
from billhook.evaluation.speed import speeds, synchronise
from billhook.math import layerwise
from billhook.math.pattern import Pattern
from billhook.models.axes import axes
from billhook.models.plan import Plan
from billhook.models.sizes import decoder_parameters
from billhook.models.surgery import remove
from billhook.planning.planners import even_planner
from billhook.planning.sensitivity import POINTS, curves
from billhook.planning.texts import Texts
from billhook.pruning.recipe import recipe
from billhook.runtime.memory import peak_growth
from billhook.runtime.precision import autocast_dtype
from billhook.runtime.quiet import quiet_transformers
from billhook.runtime.run import Run
from billhook.search.evaluator import masked_losses
from billhook.training.early_stopping import EarlyStopping
from billhook.training.schedule import Schedule
from billhook.training.throughput import training_pace
from billhook.training.trainer import RecoveryTrainer

RATIO = 0.2
TRIAL = (4, 128)  # windows of a search's first trials, and their tokens
ZEROS = ("wanda", "sparsegpt", "admm")
BARE_ZEROS = {"wanda": bare.wanda, "sparsegpt": bare.sweep}
TWO_OF_FOUR = Pattern(zeros=2, group=4)
ROLES = ("q", "k", "v", "o", "gate", "up", "down")
NEW_TOKENS = 16
BATCHES = (1, 32)
CARRIED = Path(__file__).parents[2] / ".carry" / "model.gguf"


@dataclass(frozen=True)
class Line:
    """One line of the table, in seconds."""

    what: str
    seconds: float
    floor: float | None = None
    bare: float | None = None
    peak: int | None = None  # bytes beyond the model
    said: str = ""


@dataclass(frozen=True)
class Bench:
    """What all rows share."""

    device: torch.device
    card: Card
    sizes: Sizes
    scratch: Path

    def timed(self, act: Callable[[], Any]) -> tuple[float, int]:
        """Seconds of one run, and the bytes that it took at most."""
        free(self.device)
        with peak_growth(self.device) as growth:
            synchronise(self.device)
            start = time.perf_counter()
            act()
            synchronise(self.device)
            found = time.perf_counter() - start
        return found, growth()

    def seconds(self, act: Callable[[], Any]) -> float:
        return self.timed(act)[0]

    def folder(self, name: str) -> Path:
        """A folder of that name, empty and not there."""
        shutil.rmtree(self.scratch / name, ignore_errors=True)
        return self.scratch / name

    @cached_property
    def counted(self) -> dict[str, Work]:
        return counted(self.sizes)

    def floor(self, what: str) -> float:
        """The least seconds of a line that is counted."""
        return self.counted[what].seconds(self.card)


Row = Callable[[Bench], Iterator[Line]]


def counted(sizes: Sizes) -> dict[str, Work]:
    """The work of every line that can be counted, by its name."""
    large, tokens, length = sizes.large, sizes.windows * sizes.length, sizes.length
    few, opt, huge = shapes.first(large, sizes.few), sizes.opt, shapes.first(sizes.huge, sizes.few)
    short, narrow_width = sizes.short, large.width - large.gone(RATIO)
    found = {f"FASP of {large.name}, {one}": floors.fasp(large, tokens, length, RATIO, one) for one in floors.STREAMS}
    found[f"FASP of {opt.name}"] = floors.fasp(opt, tokens, length, RATIO, "dense_target")
    found |= {f"{one} 2:4, {few.name}": floors.zeros(few, tokens, length, one) for one in ZEROS}
    found[f"perplexity, {large.name}"] = floors.forward(large, tokens, length, head=True)
    step = min(sizes.length, 1024)
    found[f"a step of recovery, {sizes.trained.name}"] = floors.training(sizes.trained, sizes.batch * step, step)
    found[f"FASP streamed, {huge.name}"] = floors.fasp(huge, tokens, length, RATIO, "dense_target")
    trial = floors.forward(large, TRIAL[0] * TRIAL[1], TRIAL[1], head=True, width=narrow_width)
    found[f"{sizes.trials} trials, {large.name}"] = trial * sizes.trials
    found[f"sensitivity, {large.name}"] = floors.curves(large, tokens, short, sizes.probes * short)
    for batch in BATCHES:
        for name, width in (("dense", large.width), ("20 % uniform", narrow_width), ("20 % uneven", narrow_width)):
            found[f"prefill {batch} x {short}, {name}"] = floors.forward(large, batch * short, short, width=width)
            found[f"decode {batch}, a step, {name}"] = floors.decoding(large, batch, short, width)
    return found


def free(device: torch.device) -> None:
    """Give back what a row has taken."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def plan_of(model: Any, bench: Bench) -> Plan:
    chosen = recipe(method="fasp", ratio=RATIO, multiple_of=bench.sizes.multiple_of)
    return even_planner(model, chosen).make(RATIO * decoder_parameters(model))


def narrowed(bench: Bench, shape: Shape, stream: str, windows: torch.Tensor) -> tuple[float, int]:
    """FASP's fifth of a fresh model."""
    model = shapes.made(shape, bench.device)
    plan = plan_of(model, bench)
    return bench.timed(lambda: narrow(model, windows, plan, Settings(stream=stream), Run()))


def passed(bench: Bench, shape: Shape, windows: torch.Tensor) -> float:
    """Seconds of transformers' forward pass of a fresh model."""
    model = shapes.made(shape, bench.device)
    bare.forward(model, windows[:1])
    return bench.seconds(lambda: bare.forward(model, windows))


def warm_up(bench: Bench) -> None:
    """What a first call alone costs: libraries, handles, kernels."""
    windows = shapes.tokens(bench.sizes.small, 10, bench.sizes.length)
    narrowed(bench, bench.sizes.small, "dense_target", windows)


def fasp(bench: Bench) -> Iterator[Line]:
    """A fifth of the large model in every stream, beside transformers' forward passes."""
    shape, sizes = bench.sizes.large, bench.sizes
    windows = shapes.tokens(shape, sizes.windows, sizes.length)
    once = passed(bench, shape, windows)
    for stream, passes in floors.STREAMS.items():
        seconds, peak = narrowed(bench, shape, stream, windows)
        least = floors.forward(shape, windows.numel(), sizes.length).seconds(bench.card) * passes
        said = f"{seconds / least:.2f} x the floor of its forward passes, {passes}"
        what = f"FASP of {shape.name}, {stream}"
        yield Line(what, seconds, bench.floor(what), once * passes, peak, said)


def command(bench: Bench) -> Iterator[Line]:
    """Open, prune, write, verify; beside transformers reading and writing the same."""
    shape, sizes, out = bench.sizes.large, bench.sizes, bench.folder("pruned")
    folder = shapes.written(shape, bench.folder("large"), bench.device)
    free(bench.device)
    asked: dict[str, Any] = dict(method="fasp", ratio=RATIO, multiple_of=sizes.multiple_of, look=False, quiet=True)
    asked |= dict(calibration=str(shapes.prose(bench.scratch)), samples=sizes.windows, seq_len=sizes.length)

    def plain() -> None:
        with quiet_transformers():
            model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
            model.to(bench.device).save_pretrained(bench.folder("plain"))

    beside = bench.seconds(plain)
    shutil.rmtree(bench.folder("plain"), ignore_errors=True)
    free(bench.device)
    parts: dict[str, float] = {}

    def whole() -> None:
        result = billhook.prune(str(folder), device=str(bench.device), dtype="bfloat16", **asked)
        parts["saved"] = -time.perf_counter()
        result.save(out)
        parts["saved"] += time.perf_counter()

    seconds, peak = bench.timed(whole)
    floor = bench.floor(f"FASP of {shape.name}, dense_target")
    said = f"written and verified in {parts['saved']:.1f} s; the bare loop opens and writes alone"
    shutil.rmtree(out)
    shutil.rmtree(folder)
    yield Line(f"the whole command, {shape.name}", seconds, floor, beside, peak, said)


def zeros(bench: Bench) -> Iterator[Line]:
    """2:4 zeros in a few layers of the large model."""
    shape, sizes = shapes.first(bench.sizes.large, bench.sizes.few), bench.sizes
    windows = shapes.tokens(shape, sizes.windows, sizes.length)
    for method in ZEROS:
        beside = None
        if method in BARE_ZEROS:
            model = shapes.made(shape, bench.device)
            beside = bench.seconds(lambda model=model, way=BARE_ZEROS[method]: bare.sparsegpt(model, windows, way))
        model = shapes.made(shape, bench.device)
        how = Masking(method, TWO_OF_FOUR, ROLES, "sequential", layerwise.Settings())
        seconds, peak = bench.timed(lambda model=model, how=how: mask(model, windows, how, Run()))
        whole = seconds / sizes.few * sizes.large.layers
        what, said = f"{method} 2:4, {shape.name}", f"all {sizes.large.layers} layers: {whole:.0f} s"
        yield Line(what, seconds, bench.floor(what), beside, peak, said)


def sensitivity(bench: Bench) -> Iterator[Line]:
    """The curves of all FFNs of the large model; beside the forward passes that they are made of, by transformers."""
    shape, sizes = bench.sizes.large, bench.sizes
    calibration = shapes.tokens(shape, sizes.windows * sizes.length // sizes.short, sizes.short)
    probes = shapes.tokens(shape, sizes.probes, sizes.short, 1)
    model = shapes.made(shape, bench.device)
    passes = len(POINTS) * shape.layers / 2
    beside = bench.seconds(lambda: bare.forward(model, calibration))
    beside += passes * bench.seconds(lambda: bare.forward(model, probes))
    seconds, peak = bench.timed(lambda: curves(model, Texts(calibration, probes), ("ffn",), Settings(), Run()))
    what = f"sensitivity, {shape.name}"
    yield Line(what, seconds, bench.floor(what), beside, peak)


def trials(bench: Bench) -> Iterator[Line]:
    """Trials of a search: a random cut in place, a forward pass, everything back."""
    shape = bench.sizes.large
    model, windows = shapes.made(shape, bench.device), shapes.tokens(shape, *TRIAL)
    gone, draw = shape.gone(RATIO), torch.Generator().manual_seed(0)
    masks = [
        {
            (axis.layer, axis.kind): torch.randperm(axis.units, generator=draw)[:gone].sort().values
            for axis in axes(model, ("ffn",))
        }
        for _ in range(bench.sizes.trials)
    ]
    masked_losses(model, masks[0], windows, None, None, None)

    def tried() -> None:
        for one in masks:
            masked_losses(model, one, windows, None, None, None)

    def plain() -> None:
        for _ in masks:
            with torch.inference_mode():
                model(windows.to(bench.device), use_cache=False)

    seconds, peak = bench.timed(tried)
    what, said = f"{len(masks)} trials, {shape.name}", f"{seconds / len(masks) * 1000:.0f} ms a trial"
    yield Line(what, seconds, bench.floor(what), bench.seconds(plain), peak, said)


def perplexity(bench: Bench) -> Iterator[Line]:
    """Losses of every window."""
    shape, sizes = bench.sizes.large, bench.sizes
    model, windows = shapes.made(shape, bench.device), shapes.tokens(shape, sizes.windows, sizes.length)
    bare.losses(model, windows[:2])
    beside = bench.seconds(lambda: bare.losses(model, windows).tolist())
    seconds, peak = bench.timed(lambda: perplexities([model], Windows("random", windows, len(windows), "", "")))
    what, said = f"perplexity, {shape.name}", f"{windows.numel() / seconds:,.0f} tokens/s"
    yield Line(what, seconds, bench.floor(what), beside, peak, said)


def recovery(bench: Bench) -> Iterator[Line]:
    """Training on text: billhook's Trainer beside a bare loop, weights in float32, products in bfloat16."""
    shape, sizes = bench.sizes.trained, bench.sizes
    length, work = min(sizes.length, 1024), bench.folder("work")
    windows = shapes.tokens(shape, sizes.steps * sizes.batch, length)
    autocast = autocast_dtype("auto", bench.device)
    step_tokens = sizes.batch * length
    model = shapes.made(shape, bench.device, torch.float32).requires_grad_(True)
    beside = step_tokens / training_pace(model, length, sizes.batch, autocast, sizes.paced)
    schedule = Schedule(
        windows, range(len(windows)), sizes.batch, 1e-6, micro_batch=sizes.batch, autocast=autocast,
        cpu=bench.device.type == "cpu",
    )  # fmt: skip
    ticks: list[float] = []

    def tick(stage: str, done: int, total: int) -> None:
        synchronise(bench.device)
        ticks.append(time.perf_counter())

    trainer = RecoveryTrainer(model, schedule, None, EarlyStopping(()), work, tick)
    _, peak = bench.timed(lambda: trainer.train_or_resume(lambda line: None))
    each = statistics.median(b - a for a, b in itertools.pairwise(ticks[1:]))
    what = f"a step of recovery, {shape.name}"
    share = bench.counted[what].bf16 / each / bench.card.bf16
    said = f"{step_tokens / each:,.0f} tokens/s, {share:.0%} of the measured bf16 rate"
    yield Line(what, each, bench.floor(what), beside, peak, said)


def opt(bench: Bench) -> Iterator[Line]:
    """The paper's small model (17 s on an RTX 4090)."""
    shape, sizes = bench.sizes.opt, bench.sizes
    windows = shapes.tokens(shape, sizes.windows, sizes.length)
    once = passed(bench, shape, windows)
    seconds, peak = narrowed(bench, shape, "dense_target", windows)
    what, said = f"FASP of {shape.name}", "the paper: 17 s on an RTX 4090"
    yield Line(what, seconds, bench.floor(what), once * floors.STREAMS["dense_target"], peak, said)


def streamed(bench: Bench) -> Iterator[Line]:
    """A few layers of the largest model, whose weights stay in their files."""
    shape, sizes = shapes.first(bench.sizes.huge, bench.sizes.few), bench.sizes
    folder = shapes.written(shape, bench.folder("huge"), bench.device)
    free(bench.device)
    windows = shapes.tokens(shape, sizes.windows, sizes.length)
    model = open_model(str(folder), device=str(bench.device), dtype="bfloat16", stream=True).model
    plan = plan_of(model, bench)
    seconds, peak = bench.timed(lambda: narrow(model, windows, plan, Settings(), Run()))
    shutil.rmtree(folder)
    whole = seconds / sizes.few * bench.sizes.huge.layers / 60
    said = f"all {bench.sizes.huge.layers} layers: {whole:.1f} min; the paper: 15 min on an RTX 4090"
    what = f"FASP streamed, {shape.name}"
    yield Line(what, seconds, bench.floor(what), None, peak, said)


def same(bench: Bench) -> Iterator[Line]:
    """A model end to end, in float32, on the CPU and on the device: the same units go, perplexities are equal.

    It is `.carry/model.gguf` (carry.sh makes it of SmolLM2), or a random one.
    """
    sizes, text = bench.sizes, shapes.prose(bench.scratch)
    real = CARRIED.exists() and sizes is shapes.FULL
    cpu = torch.device("cpu")
    model = CARRIED if real else shapes.written(sizes.small, bench.folder("small"), cpu, torch.float32)
    asked: dict[str, Any] = dict(method="fasp", ratio=RATIO, multiple_of=sizes.multiple_of, look=False, quiet=True)
    asked |= dict(calibration=str(text), samples=16, seq_len=sizes.short, dtype="float32")
    found = []
    for device in (cpu, bench.device):
        start = time.perf_counter()
        result = billhook.prune(str(model), device=str(device), **asked)
        seconds = time.perf_counter() - start
        judged = billhook.data.windows(billhook.data.Text("prose", text.read_text()), result.tokenizer, sizes.short, 8)
        (score,) = perplexities([result.model], judged)
        found.append((seconds, score.perplexity, [cut["score_dropped"] for cut in result.record["cuts"]]))
    (on_cpu, one, cuts), (seconds, other, others) = found
    apart = max(abs(a / b - 1) for a, b in zip([one, *cuts], [other, *others], strict=True))
    what = "the carried model" if real else sizes.small.name
    said = f"perplexity {one:.6g} on the CPU, {other:.6g} on the device; cuts and losses apart by {apart:.1e} at most"
    yield Line(f"{what}, end to end in float32", seconds, None, on_cpu, None, said)


def speed(bench: Bench) -> Iterator[Line]:
    """Prefill and decode of the large model, and of it without a fifth, evenly and unevenly."""
    shape, sizes = bench.sizes.large, bench.sizes
    gone = shape.gone(RATIO) // sizes.multiple_of * sizes.multiple_of
    half = gone // 2 // sizes.multiple_of * sizes.multiple_of
    drops = {
        "dense": [0] * shape.layers,
        "20 % uniform": [gone] * shape.layers,
        "20 % uneven": [gone + half * sign for _ in range(shape.layers // 2) for sign in (-1, 1)],
    }
    models = []
    for counts in drops.values():
        model = shapes.made(shape, bench.device)
        for axis, count in zip(axes(model, ("ffn",)), counts, strict=True):
            remove(model, axis, torch.arange(count))
        models.append(model)
    timed = speeds(models, [(batch, sizes.short) for batch in BATCHES], NEW_TOKENS, sizes.repeats)
    for at, batch in enumerate(BATCHES):
        dense = timed[0][at]
        whole = bench.counted[f"prefill {batch} x {sizes.short}, dense"]
        for name, found in zip(drops, timed, strict=True):
            own = found[at]
            step, prefill = f"decode {batch}, a step, {name}", f"prefill {batch} x {sizes.short}, {name}"
            gain, less = dense.first_token_seconds / own.first_token_seconds, whole.bf16 / bench.counted[prefill].bf16
            said = "" if own is dense else f"{gain:.2f} x as fast as dense; by operations {less:.2f} x"
            beside = (None, None) if own is dense else (dense.first_token_seconds, dense.token_seconds)
            yield Line(prefill, own.first_token_seconds, bench.floor(prefill), beside[0], None, said)
            yield Line(step, own.token_seconds, bench.floor(step), beside[1])


ROWS: dict[str, Row] = {  # the most wanted first: what there is no time for is left out
    "fasp": fasp,
    "opt": opt,
    "zeros": zeros,
    "perplexity": perplexity,
    "recovery": recovery,
    "speed": speed,
    "streamed": streamed,
    "trials": trials,
    "sensitivity": sensitivity,
    "command": command,
    "same": same,
}
