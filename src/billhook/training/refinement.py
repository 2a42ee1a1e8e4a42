"""Block-local refinement: what a cut has left is moved
by gradient until it puts out what the unpruned model does there.

A span is a few layers of the cut model that follow each other.  Its inputs x (tokens, hidden) are what the cut model
puts out before it, its goal y what the unpruned model has after it:

    minimise over all weights of the span  E ||s(x) - y||^2 / ||y||^2

by Adam, a few passes over the calibration windows, span after span, so that each sees what those before it have become
(Free Lunch, arXiv:2510.14444; the last step of AA-SVD).  No graph is larger than a span, and no logit is computed.
Matrix products of goals and steps are in bfloat16 where the device is faster so.
What was tried of other norms, and lost: docs/LOG.md.
"""

import math
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from billhook.calibration.forward import enter, run_layer
from billhook.errors import BillhookError
from billhook.evaluation.speed import synchronise
from billhook.models.families import layers
from billhook.models.plan import Plan
from billhook.runtime.activations import State
from billhook.runtime.offload import is_offloaded, loaded
from billhook.runtime.precision import autocast_dtype, computing
from billhook.runtime.run import Run
from billhook.tensors import Tokens

HELD_OUT = 0.1  # share of the windows, the last ones, that judge a span before and after
STAGE = "refining"
TIMED = 3  # steps by which it is said how many fit into the time


@dataclass(frozen=True)
class Refining:
    """What may be chosen; why these defaults: docs/LOG.md."""

    passes: float | int = 2  # over the windows that are trained on
    rate: float = 3e-4  # peak; a cosine to zero follows
    length: int = 10  # layers in a span
    rows: int = 1  # windows in a step
    seconds: float | None = None  # that all spans together may take, if the passes take longer
    precision: str = "auto"  # of matrix products in goals and steps; weights and their judging stay in float32


@dataclass(frozen=True)
class Span:
    """Layers of the cut model that are refined together, and the unpruned model's layer whose input is their goal."""

    first: int
    last: int
    after: int  # the number of layers stands for what the last one puts out


Goal = Sequence[State]  # what a span is to put out: (rows, length, hidden) of every step's windows


@dataclass(frozen=True)
class Aims:
    """What is wanted of spans, from the input to the output, and what enters the first: nothing before it is cut."""

    spans: Sequence[Span]
    goals: Sequence[Goal]
    entering: Sequence[State]


@dataclass(frozen=True)
class Refined:
    """What became of a span: relative errors on windows that it was not trained on."""

    first: int
    last: int
    before: float
    after: float
    kept: bool  # whether it was better, and the weights stay


def spans(kept: Sequence[int], touched: Collection[int], total: int, length: int) -> list[Span]:
    """Spans that cover all touched layers and what stands before a gap, which a patch touches.

    Args:
        kept: the layers that stay, as numbered before the cut, ascending.
        touched: those of `kept` whose weights were changed.
        total: layers before the cut.
        length: layers in a span, at most.
    """
    places = [n for n, layer in enumerate(kept) if layer in touched]
    beside = [n for n in range(len(kept) + 1) if _gap(kept, n, total)]
    if not places and not beside:
        return []
    around = sorted({min(max(0, n - max(1, length // 2)), max(0, len(kept) - length)) for n in beside})
    if all(any(start <= n < start + length for start in around) for n in places):
        starts = around
    else:  # spread over the model: tile it
        ends = [*places, *(n - 1 for n in beside if n), *(n for n in beside if n < len(kept))]
        starts = range(min(ends), max(ends) + 1, length)
    found: list[Span] = []
    for start in starts:
        first = max(start, found[-1].last + 1) if found else start
        last = min(start + length, len(kept)) - 1
        if first <= last:
            after = kept[last + 1] if last + 1 < len(kept) else total
            found.append(Span(first, last, after))
    return found


def spans_of(model: PreTrainedModel, plan: Plan, length: int) -> list[Span]:
    """What a refinement moves of a model that is to be cut; where weights are streamed what stands around a gap."""
    total = len(layers(model))
    kept = [n for n in range(total) if n not in plan.layers]
    narrowed = set() if is_offloaded(model) else {n for (n, _), count in plan.drops.items() if count}
    return spans(kept, narrowed, total, length)


def _gap(kept: Sequence[int], n: int, total: int) -> bool:
    """Whether layers are missing before the n-th of those that stay, or after the last."""
    before = kept[n - 1] if n else -1
    return (kept[n] if n < len(kept) else total) != before + 1


def aims(model: PreTrainedModel, tokens: Tokens, wanted: Sequence[Span], settings: Refining, run: Run) -> Aims:
    """What each span is to put out, and what enters the first, of the unpruned model: one pass over the windows."""
    batches, last = list(tokens.split(settings.rows)), max(span.after for span in wanted)
    places = {wanted[0].first, *(span.after for span in wanted)}
    found: dict[int, Sequence[State]] = {}
    products = autocast_dtype(settings.precision, model.device)
    with run.clock("goals"), torch.no_grad(), computing(model.device, products):
        states, calls = enter(model, batches, run.hidden.keep)
        for n in range(last + 1):
            run.tick("goals of refinement", n, last)
            if n in places:
                found[n] = states
            if n < last:
                states = _advanced(model, states, calls, range(n, n + 1), run)
    return Aims(wanted, [found[span.after] for span in wanted], found[wanted[0].first])


def refine(model: PreTrainedModel, tokens: Tokens, wanted: Aims, settings: Refining, run: Run) -> list[Refined]:
    """Refine the spans of a cut model, in place, from the input to the output."""
    batches, found = list(tokens.split(settings.rows)), []
    with run.clock("refinement"):
        with torch.no_grad():
            _, calls = enter(model, batches, lambda _: None)
        states, at = wanted.entering, wanted.spans[0].first
        for number, (span, goal) in enumerate(zip(wanted.spans, wanted.goals, strict=True)):
            states = _advanced(model, states, calls, range(at, span.first), run)

            def tick(_: str, done: int, total: int, number: int = number) -> None:
                run.tick(STAGE, number * total + done, len(wanted.spans) * total)

            share = (span.last + 1 - span.first) / sum(one.last + 1 - one.first for one in wanted.spans)
            own = replace(settings, seconds=settings.seconds and settings.seconds * share)
            found.append(_refine(model, span, goal, (states, calls), replace(run, tick=tick), own))
            at = span.first
    return found


@contextmanager
def rehearsed(model: PreTrainedModel, n: int, state: Tensor, call: dict[str, Any]) -> Iterator[Callable[[], None]]:
    """While open, a step of training of the n-th layer; its weights are what they were in the end."""
    module, settings = layers(model)[n], Refining()
    with loaded(module, edits=False), _in_float32([module]) as weights:
        whole = [weight.detach().clone() for weight in weights]
        optimizer, products = _optimizer(weights, settings.rate), autocast_dtype(settings.precision, weights[0].device)
        try:
            yield lambda: _step(optimizer, lambda: _error(_run([module], state, [call]), state), products)
        finally:
            _put_back(weights, whole)


def _refine(
    model: PreTrainedModel,
    span: Span,
    goal: Goal,
    given: tuple[Sequence[State], Sequence[list[dict[str, Any]]]],
    run: Run,
    settings: Refining,
) -> Refined:
    states, calls = given
    modules = list(layers(model)[span.first : span.last + 1])
    trained = len(states) - max(1, int(HELD_OUT * len(states)))
    if not trained:
        raise BillhookError("one step's windows cannot be refined on and judged by: give more")
    steps = max(1, round(settings.passes * trained))

    def off(b: int) -> Tensor:
        return _error(_run(modules, states[b].read(), calls[b][span.first :]), goal[b].read())

    def held_out() -> float:
        with torch.no_grad():
            errors = torch.stack([off(b) for b in range(trained, len(states))]).tolist()  # waited for once
        return math.sqrt(sum(errors) / len(errors))

    with _loaded(modules), _in_float32(modules) as weights:
        device = weights[0].device
        products = autocast_dtype(settings.precision, device)
        whole = [weight.detach().clone() for weight in weights]
        started = time.perf_counter()
        before = held_out()  # whose numbers are waited for
        judged = time.perf_counter() - started
        optimizer = _optimizer(weights, settings.rate)
        for step, b in enumerate(_order(trained, steps)):
            if step == TIMED and settings.seconds:
                synchronise(device)
                each = (time.perf_counter() - started - judged) / TIMED
                steps = min(steps, max(TIMED + 1, int((settings.seconds - 2 * judged) / each)))
            if step == steps:
                break
            run.tick(STAGE, step, steps)
            for group in optimizer.param_groups:
                group["lr"] = settings.rate * min(1, (step + 1) / 5) * (1 + math.cos(math.pi * step / steps)) / 2
            _step(optimizer, partial(off, b), products)
        run.tick(STAGE, steps, steps)
        after = held_out()
        better = after < before  # false also where it is no longer a number
        if not better:
            _put_back(weights, whole)
    return Refined(span.first, span.last, before, after, better)


def _put_back(weights: Sequence[nn.Parameter], whole: Sequence[Tensor]) -> None:
    for weight, old in zip(weights, whole, strict=True):
        weight.data.copy_(old)


def _optimizer(weights: Sequence[nn.Parameter], rate: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(weights, lr=rate, betas=(0.9, 0.99), weight_decay=0.0)


def _step(optimizer: torch.optim.Optimizer, loss: Callable[[], Tensor], products: torch.dtype | None) -> None:
    """Args: products: the dtype of matrix products, or None for the weights' own."""
    weights = optimizer.param_groups[0]["params"]
    optimizer.zero_grad()
    with torch.enable_grad():
        with computing(weights[0].device, products):
            off = loss()
        off.backward()
    torch.nn.utils.clip_grad_norm_(weights, 1.0)
    optimizer.step()


def _order(count: int, steps: int) -> Iterator[int]:
    """`steps` numbers of batches, all of them once before any is twice."""
    drawn, generator = 0, torch.Generator().manual_seed(0)
    while drawn < steps:
        for b in torch.randperm(count, generator=generator).tolist()[: steps - drawn]:
            drawn += 1
            yield b


def _error(output: Tensor, goal: Tensor) -> Tensor:
    """The relative squared error, mean over tokens but each window's first, which is an attention sink."""
    y = goal[:, 1:].to(output)
    return ((output[:, 1:] - y).square().sum(-1) / y.square().sum(-1)).mean()


def _run(modules: Sequence[nn.Module], state: Tensor, calls: Sequence[dict[str, Any]]) -> Tensor:
    state = state.float()
    for module, call in zip(modules, calls, strict=False):
        state = _through(module, state, {name: _as_float32(value) for name, value in call.items()})
    return state


def _through(module: nn.Module, state: Tensor, call: dict[str, Any]) -> Tensor:
    """The output of a layer, with a graph."""
    out = module(state, **call)
    return out[0] if isinstance(out, tuple) else out


def _advanced(
    model: PreTrainedModel,
    states: Sequence[State],
    calls: Sequence[list[dict[str, Any]]],
    numbers: range,
    run: Run,
) -> list[State]:
    """The states after some layers."""
    moved = list(states)
    for n in numbers:
        with loaded(layers(model)[n], edits=False):
            moved = [
                run.hidden.keep(run_layer(layers(model)[n], x.read(), call[n]))
                for x, call in zip(moved, calls, strict=True)
            ]
    return moved


def _as_float32(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.float() if value.is_floating_point() else value
    return tuple(map(_as_float32, value)) if isinstance(value, tuple) else value


@contextmanager
def _loaded(modules: Sequence[nn.Module]) -> Iterator[None]:
    """While open, layers are in memory together; what they have become is kept."""
    with ExitStack() as stack:
        for module in modules:
            stack.enter_context(loaded(module))
        yield


@contextmanager
def _in_float32(modules: Sequence[nn.Module]) -> Iterator[list[nn.Parameter]]:
    """While open, layers are in float32 and their weights, which are yielded, ask for gradients."""
    weights = [weight for module in modules for weight in module.parameters() if weight.is_floating_point()]
    before = [(weight.dtype, weight.requires_grad) for weight in weights]
    for weight in weights:
        weight.data = weight.data.float()
        weight.requires_grad_(True)
    try:
        yield weights
    finally:
        for weight, (dtype, asked) in zip(weights, before, strict=True):
            weight.data, weight.grad = weight.data.to(dtype), None
            weight.requires_grad_(asked)
