"""Run a model layer by layer and sum over the inputs of the readers of its axes.

    for layer in walk(model, tokens, ("ffn",), run, Route(stream="dense")):
        G = layer.fit[axis.reader_module].gram  # for each axis of layer.axes
        ...                                     # edit the layer; in all streams but "dense" later layers see the edit

Memory holds one hidden state per token (two in the stream dense_target) and the sums of one layer, never of all layers.
"""

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from billhook.calibration.forward import BATCH_TOKENS, enter, run_layer
from billhook.calibration.gram import add_upper, mirrored
from billhook.calibration.passage import Route
from billhook.errors import BillhookError
from billhook.models.axes import Axis, axes
from billhook.models.families import layers
from billhook.runtime.activations import State
from billhook.runtime.cache import Grams
from billhook.runtime.memory import return_freed
from billhook.runtime.offload import loaded
from billhook.runtime.progress import Clock
from billhook.runtime.run import Run
from billhook.tensors import Cross, Gram, Tokens, precise


@dataclass
class ReaderSums:
    """Sums over tokens of one reader's input, X (tokens, in), and of what its output should gain, E (tokens, out).

    E is zero in all streams but `dense_target`, and there for all readers whose output is not added to the layer's
    output unchanged.  For the other it is `correction` times the unpruned model's output of the layer minus this
    model's, plus everything that dropped layers right after this one would have added.
    """

    gram: Gram  # X^T X
    cross: Cross | None = None  # E^T X
    energy: float = 0.0  # ||E||_F^2

    def __add__(self, other: "ReaderSums") -> "ReaderSums":
        cross = self.cross if self.cross is None or other.cross is None else self.cross + other.cross
        return ReaderSums(self.gram + other.gram, cross, self.energy + other.energy)


@dataclass(frozen=True)
class Layer:
    """One layer of the walk: its axes and, by reader module, the sums over the windows to fit and over those held
    out."""

    number: int
    axes: list[Axis]
    fit: dict[str, ReaderSums]
    held_out: dict[str, ReaderSums]


def walk(
    model: PreTrainedModel, tokens: Tokens, kinds: tuple[str, ...], run: Run, route: Route = Route()
) -> Iterator[Layer]:
    """Yield the decoder layers of a route with the sums of their axes' readers.

    Layers that an earlier run has finished are restored and passed through, not yielded.

    Args:
        tokens: calibration windows (windows, length).

    Raises:
        BillhookError: an activation is not finite; the message names the module.
    """
    clock, finished, stream, dropped = run.clock, run.finished, route.stream, route.dropped
    count = len(tokens) - int(route.held_out * len(tokens))
    rows = max(1, BATCH_TOKENS // tokens.shape[1])
    batches = [(batch, False) for batch in tokens[:count].split(rows)]
    batches += [(batch, True) for batch in tokens[count:].split(rows) if len(batch)]
    all_axes = axes(model, kinds)
    by_layer = [[axis for axis in all_axes if axis.layer == n] for n in range(len(layers(model)))]
    end = len(by_layer) if route.only is None else max(route.only, default=-1) + 1
    cached = finished.grams if stream == "dense" else None
    wanted = [n for n in range(end) if n not in dropped and (route.only is None or n in route.only)]
    if cached and cached.has(axis.reader_module for n in wanted for axis in by_layer[n]):
        yield from _recalled(model, cached, {n: by_layer[n] for n in wanted}, run)
        return
    with clock("forward"):
        states, calls = enter(model, [batch for batch, _ in batches], run.hidden.keep)
        first_dropped = _dropped_from(0, dropped)
        unpruned = (
            [_through(model, first_dropped, state, calls[b], run) for b, state in enumerate(states)]
            if first_dropped
            else states
        )
    targets = unpruned if stream == "dense_target" else []
    states = unpruned if stream == "dense" else list(states)
    for n, module in enumerate(layers(model)[:end]):
        if n in dropped:
            continue
        run.tick("statistics", n, end)
        passage = _Passage(model, n, module, states, targets, calls, _dropped_from(n + 1, dropped), route, run)
        if n in finished.records:
            with clock("forward"), loaded(module):
                passage.unpruned()
            finished.reload(n)
            with clock("forward"), loaded(module):
                passage.pruned()
            continue
        with loaded(module):
            if n not in wanted:
                passage.gather([], batches, onward=True)
                continue
            # a layer's Grams may be most of the memory: this generator keeps no reference once it has yielded them
            yield Layer(n, by_layer[n], *_stored(cached, passage.gather(by_layer[n], batches), clock))
            return_freed()  # holes that the cuts leave would pile up (docs/LOG.md)
            if n + 1 < end:
                with clock("forward"):
                    passage.pruned()
    run.tick("statistics", end, end)


def _stored(
    grams: Grams | None, sums: tuple[dict[str, ReaderSums], dict[str, ReaderSums]], clock: Clock
) -> tuple[dict[str, ReaderSums], dict[str, ReaderSums]]:
    """The same sums, once they are in the cache, if there is one."""
    with clock("gram"):
        for name, fit in sums[0].items() if grams else ():
            assert grams is not None
            grams.keep(name, fit.gram, sums[1][name].gram if name in sums[1] else None)
    return sums


def _recalled(model: PreTrainedModel, grams: Grams, wanted: Mapping[int, list[Axis]], run: Run) -> Iterator[Layer]:
    """The layers `wanted` with their axes, by the cached Grams of an earlier walk in the dense stream."""

    def read(layer_axes: list[Axis]) -> tuple[dict[str, ReaderSums], dict[str, ReaderSums]]:
        sums: tuple[dict[str, ReaderSums], dict[str, ReaderSums]] = ({}, {})
        with run.clock("gram"):
            for name in {axis.reader_module for axis in layer_axes}:
                for side, gram in zip(sums, grams.read(name, model.device), strict=True):
                    if gram is not None:
                        side[name] = ReaderSums(gram)
        return sums

    for n, layer_axes in wanted.items():
        if n in run.finished.records:
            run.finished.reload(n)
            continue
        run.tick("statistics", n, len(wanted))
        with loaded(layers(model)[n]):
            yield Layer(n, layer_axes, *read(layer_axes))
        return_freed()
    run.tick("statistics", len(wanted), len(wanted))


@dataclass
class _Passage:
    """All batches at layer n: their `states`, and `targets`, the states in the unpruned model; both change in place."""

    model: PreTrainedModel
    n: int
    module: nn.Module
    states: list[State]
    targets: list[State]  # empty in all streams but dense_target
    calls: list[list[dict[str, Any]]]  # arguments of each layer, by batch
    after_it: list[int]  # dropped layers right after this one
    route: Route
    run: Run

    def gather(
        self, layer_axes: list[Axis], batches: list[tuple[Tensor, bool]], onward: bool = False
    ) -> tuple[dict[str, ReaderSums], dict[str, ReaderSums]]:
        """Run every batch through the layer as it is, and sum over the windows to fit and those held out.

        Args:
            layer_axes: axes whose readers are summed.
            onward: nothing will be cut here, so that the sequential streams take the outputs at once.
        """
        sums: tuple[dict[str, ReaderSums], dict[str, ReaderSums]] = ({}, {})
        for b in range(len(self.states)):
            with self.run.clock("forward"):
                with _tapped(self.model, layer_axes) as inputs:
                    after = run_layer(self.module, self.states[b].read(), self.calls[b][self.n])
                lack = self.step(b, after)
                if onward and self.route.stream != "dense":
                    self.states[b] = self.run.hidden.keep(after)
            with self.run.clock("gram"):
                _add(sums[batches[b][1]], layer_axes, inputs, lack)
        with self.run.clock("gram"):
            _complete(sums)
        return_freed()
        return sums

    def step(self, b: int, after: Tensor) -> Tensor | None:
        """Move batch b on; `after` is the layer's output.  Returns what that should gain, if there is a target."""
        if self.route.stream == "dense":
            self.states[b] = self.run.hidden.keep(_past(self.model, self.after_it, after, self.calls[b]))
        if not self.targets:
            return None
        same = self.targets[b] is self.states[b]  # nothing was cut so far
        dense = after if same else run_layer(self.module, self.targets[b].read(), self.calls[b][self.n])
        target = _past(self.model, self.after_it, dense, self.calls[b])
        self.targets[b] = self.run.hidden.keep(target)
        return self.route.correction * (dense - after) + (target - dense)

    def unpruned(self) -> None:
        """Take the states that see the unpruned layer through it."""
        following = self.states if self.route.stream == "dense" else self.targets
        for b, state in enumerate(following):
            following[b] = _through(self.model, [self.n, *self.after_it], state, self.calls[b], self.run)

    def pruned(self) -> None:
        """Take the states that see the pruned layer through it."""
        for b, state in enumerate(self.states if self.route.stream != "dense" else ()):
            self.states[b] = self.run.hidden.keep(run_layer(self.module, state.read(), self.calls[b][self.n]))


def _add(sums: dict[str, ReaderSums], layer_axes: list[Axis], inputs: dict[str, Tensor], lack: Tensor | None) -> None:
    """Add one batch to the sums of every reader; Grams stay upper triangles until the layer is done."""
    for name, ends in {axis.reader_module: axis.ends_layer for axis in layer_axes}.items():
        x = inputs[name].flatten(0, -2).float()
        before = sums.get(name)
        total = ReaderSums(add_upper(before.gram if before else None, x))
        if lack is not None and ends:
            e = lack.flatten(0, -2).float()
            total.cross = precise(e.T @ x) + (before.cross if before and before.cross is not None else 0.0)
            total.energy = precise(e.square()).sum().item() + (before.energy if before else 0.0)
        sums[name] = total


@contextmanager
def _tapped(model: PreTrainedModel, layer_axes: list[Axis]) -> Iterator[dict[str, Tensor]]:
    """Yield a dict that, while the context is open, records the input of each axis's reader."""
    inputs: dict[str, Tensor] = {}

    def tap(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _, args: inputs.update({name: args[0]})

    with ExitStack() as hooks:
        for name in {axis.reader_module for axis in layer_axes}:
            hooks.callback(model.get_submodule(name).register_forward_pre_hook(tap(name)).remove)
        yield inputs


def _complete(sums: tuple[dict[str, ReaderSums], dict[str, ReaderSums]]) -> None:
    for name, total in (*sums[0].items(), *sums[1].items()):
        total.gram = mirrored(total.gram)
        _check_finite(name, total)


def _check_finite(name: str, total: ReaderSums) -> None:
    if not total.gram.diagonal().isfinite().all():  # the diagonal overflows first
        raise BillhookError(f"the input of {name} is not finite: weights or dtype overflow; try --dtype float32")
    if not math.isfinite(total.energy) or (total.cross is not None and not total.cross.isfinite().all()):
        raise BillhookError(f"the output of {name} is not finite: weights or dtype overflow; try --dtype float32")


def _dropped_from(start: int, dropped: Collection[int]) -> list[int]:
    """The consecutive layers of `dropped` that begin with `start`."""
    numbers = []
    while start + len(numbers) in dropped:
        numbers.append(start + len(numbers))
    return numbers


def _through(
    model: PreTrainedModel, numbers: Iterable[int], state: State, calls: list[dict[str, Any]], run: Run
) -> State:
    """A state after the layers `numbers`."""
    return run.hidden.keep(_past(model, numbers, state.read(), calls))


def _past(model: PreTrainedModel, numbers: Iterable[int], state: Tensor, calls: list[dict[str, Any]]) -> Tensor:
    for n in numbers:
        state = run_layer(layers(model)[n], state, calls[n])
    return state
