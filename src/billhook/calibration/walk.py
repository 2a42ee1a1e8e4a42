"""Run a model layer by layer and keep sums of what enters the readers of its axes.

    for layer in walk(model, tokens, kinds=("ffn",), stream="dense"):
        G = layer.fit[axis.reader_module].gram  # for each axis of layer.axes
        ...                                     # edit the layer; all streams but the dense one see the edit

Nothing is kept for all layers: one hidden state per token (two where there is a dense target), the sums of one layer.
"""

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn
from transformers import PreTrainedModel

from billhook.calibration.forward import BATCH_TOKENS, enter, run
from billhook.calibration.gram import add_upper, mirrored
from billhook.errors import BillhookError
from billhook.models.axes import Axis, axes
from billhook.models.families import layers
from billhook.runtime.activations import State, keep
from billhook.runtime.cache import Grams
from billhook.runtime.memory import return_freed
from billhook.runtime.offload import loaded
from billhook.runtime.progress import Clock, Tick, quiet
from billhook.tensors import Cross, Gram, Tokens, precise


@dataclass
class ReaderSums:
    """Sums over tokens of what enters one reader, X (tokens, in), and of what the reader should add, E (tokens, out).

    E is zero but in the `dense_target` stream, and there for the readers alone whose output is added to the layer's as it
    is: `share` of the unpruned model's output of the layer minus this model's, plus all that layers right after it would
    have added which go as a whole.
    """

    gram: Gram  # X^T X
    cross: Cross | None = None  # E^T X
    energy: float = 0.0  # ||E||_F^2

    def __add__(self, other: "ReaderSums") -> "ReaderSums":
        cross = self.cross if self.cross is None or other.cross is None else self.cross + other.cross
        return ReaderSums(self.gram + other.gram, cross, self.energy + other.energy)


@runtime_checkable
class Finished(Protocol):
    """Layers that an earlier run of the same work has finished (billhook.checkpoints.resume)."""

    grams: Grams | None  # of the dense stream, kept for other work

    @property
    def records(self) -> Collection[int]: ...

    def reload(self, n: int) -> None:
        """Make layer n what it then became."""
        ...


@dataclass(frozen=True)
class Layer:
    """One stop of the walk: its axes and, by reader module, the evidence from the windows to fit and those held out."""

    number: int
    axes: list[Axis]
    fit: dict[str, ReaderSums]
    held_out: dict[str, ReaderSums]


def walk(  # noqa: PLR0913
    model: PreTrainedModel,
    tokens: Tokens,
    kinds: tuple[str, ...],
    *,
    stream: str = "dense",
    correction: float = 1.0,
    dropped: Collection[int] = (),
    only: Collection[int] | None = None,
    held_out: float = 0.1,
    finished: Finished | None = None,
    clock: Clock | None = None,
    tick: Tick = quiet,
) -> Iterator[Layer]:
    """Yield every decoder layer with the evidence on its axes, each on the inputs that `stream` says.

    Args:
        tokens: calibration windows (windows, length).
        share: how much of the difference to the unpruned model a `dense_target` asks for.
        gone: layers that will go as a whole: not yielded, and passed by but in the dense stream.
        at: the layers to gather evidence on, the others are not yielded and the walk ends with the last; None: all.
        held_out: share of the windows, the last ones, whose evidence is kept apart.
        finished: layers that are made what they became and passed through, not yielded.

    Raises:
        BillhookError: an activation is not finite; the message names the module.
    """
    clock = clock or Clock()
    count = len(tokens) - int(held_out * len(tokens))
    rows = max(1, BATCH_TOKENS // tokens.shape[1])
    batches = [(batch, False) for batch in tokens[:count].split(rows)]
    batches += [(batch, True) for batch in tokens[count:].split(rows) if len(batch)]
    every = axes(model, kinds)
    by_layer = [[axis for axis in every if axis.layer == n] for n in range(len(layers(model)))]
    end = len(by_layer) if only is None else max(only, default=-1) + 1
    kept = finished.grams if finished is not None and stream == "dense" else None
    wanted = [n for n in range(end) if n not in dropped and (only is None or n in only)]
    if finished is not None and kept and kept.has(axis.reader_module for n in wanted for axis in by_layer[n]):
        yield from _recalled(model, kept, {n: by_layer[n] for n in wanted}, finished, clock, tick)
        return
    with clock("forward"):
        states, calls = enter(model, [batch for batch, _ in batches], keep)
        leading = _gone_from(0, dropped)
        unpruned = [_through(model, leading, state, calls[b]) for b, state in enumerate(states)] if leading else states
    targets = unpruned if stream == "dense_target" else []
    states = unpruned if stream == "dense" else list(states)
    for n, module in enumerate(layers(model)[:end]):
        if n in dropped:
            continue
        tick("statistics", n, end)
        on = _Passage(model, n, module, states, targets, calls, _gone_from(n + 1, dropped), stream)
        if finished is not None and n in finished.records:
            with clock("forward"), loaded(module):
                on.unpruned()
            finished.reload(n)
            with clock("forward"), loaded(module):
                on.pruned()
            continue
        with loaded(module):
            if n not in wanted:
                on.gather([], batches, correction, clock, onward=True)
                continue
            # a layer's Grams may be most of the memory: none is the generator's once they are handed out
            yield Layer(n, by_layer[n], *_kept(kept, on.gather(by_layer[n], batches, correction, clock), clock))
            return_freed()  # or the holes that the cuts leave pile up (docs/LOG.md)
            if n + 1 < end:
                with clock("forward"):
                    on.pruned()
    tick("statistics", end, end)


def _kept(
    grams: Grams | None, sums: tuple[dict[str, ReaderSums], dict[str, ReaderSums]], clock: Clock
) -> tuple[dict[str, ReaderSums], dict[str, ReaderSums]]:
    """`sums`, once they are on disk if they are to be."""
    with clock("gram"):
        for name, fit in sums[0].items() if grams else ():
            assert grams is not None
            grams.keep(name, fit.gram, sums[1][name].gram if name in sums[1] else None)
    return sums


def _recalled(
    model: PreTrainedModel, grams: Grams, wanted: Mapping[int, list[Axis]], finished: Finished, clock: Clock, tick: Tick
) -> Iterator[Layer]:
    """The layers `wanted`, each with its axes, by what an earlier walk in the dense stream has kept."""

    def read(found: list[Axis]) -> tuple[dict[str, ReaderSums], dict[str, ReaderSums]]:
        sums: tuple[dict[str, ReaderSums], dict[str, ReaderSums]] = ({}, {})
        with clock("gram"):
            for name in {axis.reader_module for axis in found}:
                for side, gram in zip(sums, grams.read(name, model.device), strict=True):
                    if gram is not None:
                        side[name] = ReaderSums(gram)
        return sums

    for n, found in wanted.items():
        if n in finished.records:
            finished.reload(n)
            continue
        tick("statistics", n, len(wanted))
        with loaded(layers(model)[n]):
            yield Layer(n, found, *read(found))
        return_freed()
    tick("statistics", len(wanted), len(wanted))


@dataclass
class _Passage:
    """Every batch on its way through layer n: `states`, and `targets` in the unpruned model, are changed in place."""

    model: PreTrainedModel
    n: int
    module: nn.Module
    states: list[State]
    targets: list[State]  # none but in the dense_target stream
    calls: list[list[dict[str, Any]]]
    after_it: list[int]  # layers that go as a whole right after it
    stream: str

    def gather(
        self, found: list[Axis], batches: list[tuple[Tensor, bool]], share: float, clock: Clock, onward: bool = False
    ) -> tuple[dict[str, ReaderSums], dict[str, ReaderSums]]:
        """Every batch through the layer as it is, and the evidence on the axes `found` from the windows to fit and those held out; `onward`: where
        nothing will be cut, and the sequential streams go on at once."""
        sums: tuple[dict[str, ReaderSums], dict[str, ReaderSums]] = ({}, {})
        for b in range(len(self.states)):
            with clock("forward"):
                with _tapped(self.model, found) as inputs:
                    after = run(self.module, self.states[b].read(), self.calls[b][self.n])
                lack = self.step(b, after, share)
                if onward and self.stream != "dense":
                    self.states[b] = keep(after)
            with clock("gram"):
                _add(sums[batches[b][1]], found, inputs, lack)
        with clock("gram"):
            _complete(sums)
        return_freed()
        return sums

    def step(self, b: int, after: Tensor, share: float) -> Tensor | None:
        """Batch b through the layer as it is, which put out `after`; what the layer should add, where there is a target."""
        if self.stream == "dense":
            self.states[b] = keep(_past(self.model, self.after_it, after, self.calls[b]))
        if not self.targets:
            return None
        same = self.targets[b] is self.states[b]  # nothing cut so far
        dense = after if same else run(self.module, self.targets[b].read(), self.calls[b][self.n])
        target = _past(self.model, self.after_it, dense, self.calls[b])
        self.targets[b] = keep(target)
        return share * (dense - after) + (target - dense)

    def unpruned(self) -> None:
        """What sees the unpruned layer, through it."""
        following = self.states if self.stream == "dense" else self.targets
        for b, state in enumerate(following):
            following[b] = _through(self.model, [self.n, *self.after_it], state, self.calls[b])

    def pruned(self) -> None:
        """What sees the pruned layer, through it."""
        for b, state in enumerate(self.states if self.stream != "dense" else ()):
            self.states[b] = keep(run(self.module, state.read(), self.calls[b][self.n]))


def _add(sums: dict[str, ReaderSums], found: list[Axis], inputs: dict[str, Tensor], lack: Tensor | None) -> None:
    """Add one batch to the evidence of every reader; the Grams stay upper triangles until the layer is done."""
    for name, ends in {axis.reader_module: axis.ends_layer for axis in found}.items():
        x = inputs[name].flatten(0, -2).float()
        before = sums.get(name)
        here = ReaderSums(add_upper(before.gram if before else None, x))
        if lack is not None and ends:
            e = lack.flatten(0, -2).float()
            here.cross = precise(e.T @ x) + (before.cross if before and before.cross is not None else 0.0)
            here.energy = precise(e.square()).sum().item() + (before.energy if before else 0.0)
        sums[name] = here


@contextmanager
def _tapped(model: PreTrainedModel, found: list[Axis]) -> Iterator[dict[str, Tensor]]:
    """Yield a dict that, while the context is open, receives what enters the reader of each axis."""
    inputs: dict[str, Tensor] = {}

    def tap(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _, args: inputs.update({name: args[0]})

    with ExitStack() as hooks:
        for name in {axis.reader_module for axis in found}:
            hooks.callback(model.get_submodule(name).register_forward_pre_hook(tap(name)).remove)
        yield inputs


def _complete(sums: tuple[dict[str, ReaderSums], dict[str, ReaderSums]]) -> None:
    for name, evidence in (*sums[0].items(), *sums[1].items()):
        evidence.gram = mirrored(evidence.gram)
        _check_finite(name, evidence)


def _check_finite(name: str, evidence: ReaderSums) -> None:
    if not evidence.gram.diagonal().isfinite().all():  # which overflows first
        raise BillhookError(f"what enters {name} is not finite: weights or dtype overflow; try --dtype float32")
    if not math.isfinite(evidence.energy) or (evidence.cross is not None and not evidence.cross.isfinite().all()):
        raise BillhookError(f"what leaves {name} is not finite: weights or dtype overflow; try --dtype float32")


def _gone_from(start: int, gone: Collection[int]) -> list[int]:
    """The layers of `gone` that follow one another from `start` on."""
    found = []
    while start + len(found) in gone:
        found.append(start + len(found))
    return found


def _through(model: PreTrainedModel, numbers: Iterable[int], state: State, calls: list[dict[str, Any]]) -> State:
    """`state` after the layers `numbers`."""
    return keep(_past(model, numbers, state.read(), calls))


def _past(model: PreTrainedModel, numbers: Iterable[int], state: Tensor, calls: list[dict[str, Any]]) -> Tensor:
    for n in numbers:
        state = run(layers(model)[n], state, calls[n])
    return state
