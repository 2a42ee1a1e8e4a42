"""A text on its way through a model, layer by layer: what all walks share.  Each has its own taps and sums.

    passage = Passage(model, tokens, run, Route("sequential"))
    for n in passage.stops("statistics"):
        for batch in passage.batches:
            inputs, after = inputs_of(layers(model)[n], paths, batch.state.read(), batch.calls[n])
            ...
        ...  # edit the layer; in all streams but `dense` and `layer_target` later layers see the edit

Memory holds one hidden state per token, two where the stream follows the unpruned model beside the pruned one.
"""

from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from billhook.calibration.forward import BATCH_TOKENS, enter, run_layer
from billhook.choices import INDEPENDENT_STREAMS
from billhook.models.families import layers
from billhook.runtime.activations import State
from billhook.runtime.memory import return_freed
from billhook.runtime.offload import begin_to_load, loaded, renumber
from billhook.runtime.peers import ALONE
from billhook.runtime.run import Run
from billhook.tensors import Gram, Tokens


@dataclass(frozen=True)
class Route:
    """What a walk yields of a model, and by which activations."""

    stream: str = "dense"  # whose activations a layer sees (billhook.choices)
    held_out: float = 0.1  # share of the windows, the last ones, that are summed separately
    only: Collection[int] | None = None  # layers to yield, None for all; the walk ends with the last of them
    dropped: Collection[int] = ()  # layers that will go: not yielded, and skipped in all streams but `dense`
    correction: float = 1.0  # in `dense_target`: share of the difference to the unpruned model to make up

    def wanted(self, model: PreTrainedModel) -> list[int]:
        """The layers to yield, ascending."""
        numbers = range(len(layers(model))) if self.only is None else sorted(self.only)
        return [n for n in numbers if n not in self.dropped]


@dataclass
class Batch:
    """Some windows on their way through a model."""

    state: State  # the hidden state that the next layer sees
    target: State  # the hidden state in the unpruned model, where the stream follows that
    calls: list[dict[str, Any]]  # arguments that the model passes to each layer
    held_out: bool
    sharing: int = 1  # processes that have a batch of their own while this one has this

    @property
    def uncut(self) -> bool:
        """Whether no layer before has been edited, or will go: one state serves both."""
        return self.target is self.state


class Passage:
    """All batches of a text, before the layer that the walk is at.

    Args:
        tokens: calibration windows (windows, length).
        readers: what a walk wants is sums over what enters these modules: the run's peers share the batches.  In
            the stream `dense` it is the Grams alone: where the run's cache has them all, there are no batches.
        unpruned: the unpruned model, where `model` is another one already; its layers are given up one by one.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokens: Tokens,
        run: Run,
        route: Route,
        readers: Iterable[str] | None = None,
        unpruned: PreTrainedModel | None = None,
    ) -> None:
        self.model, self.run, self.route, self.unpruned = model, run, route, unpruned or model
        self.wanted = route.wanted(model)
        self.independent = route.stream in INDEPENDENT_STREAMS  # no layer sees what became of another
        self.follows = self.independent or route.stream == "dense_target"  # there is a target
        self.peers = ALONE if readers is None else run.peers
        self.grams = run.finished.grams if route.stream == "dense" and readers is not None else None
        self.recalls = self.grams is not None and self.grams.has(readers or ())
        self.batches: list[Batch] = []
        if self.wanted and not self.recalls:
            with run.clock("forward"):
                self._enter(tokens)

    def stops(self, stage: str, *, edits: bool = True, to_the_end: bool = False) -> Iterator[int]:
        """The numbers of the layers to visit, each in memory while it is yielded.

        Layers that an earlier run has finished are restored and passed through, not yielded.

        Args:
            edits: whether the layers may be edited.
            to_the_end: take the batches through the last layer as well.
        """
        passed = layers(self.model)[: max(self.wanted, default=-1) + 1]
        for n, module in enumerate(passed):
            if n in self.route.dropped:
                continue
            self.run.tick(stage, sum(m < n for m in self.wanted), len(self.wanted))
            if n in self.run.finished.records or n not in self.wanted:
                self._pass_by(n)
            else:
                with loaded(module, edits=edits):
                    for later in passed[n + 1 : n + 2]:
                        begin_to_load(later)
                    yield n
                    if edits:
                        for param in module.parameters():
                            self.peers.agree([param.data])  # processors that differ may find other weights
                    return_freed()  # holes that the cuts leave would pile up (docs/LOG.md)
                    if n < self.wanted[-1] or to_the_end:
                        self.advance(n)
            if self.unpruned is not self.model:
                layers(self.unpruned)[n] = nn.Identity()
                renumber(self.unpruned)
        self.run.tick(stage, len(self.wanted), len(self.wanted))

    def follow(self, n: int, module: nn.Module) -> None:
        """Take the targets through layer n, given as it was before anything was edited."""
        with self.run.clock("forward"):
            for batch in self.batches:
                self.put(batch, n, run_layer(module, batch.target.read(), batch.calls[n]))

    def put(self, batch: Batch, n: int, after: Tensor) -> None:
        """The target becomes what layer n put out, `after`, past the layers right after it that will be dropped."""
        batch.target = self.run.hidden.keep(self.past(batch, n, after))
        if self.independent:
            batch.state = batch.target

    def past(self, batch: Batch, n: int, state: Tensor) -> Tensor:
        """The output of layer n, once it has passed the layers right after it that will be dropped."""
        while (n := n + 1) in self.route.dropped:
            state = run_layer(layers(self.unpruned)[n], state, batch.calls[n])
        return state

    def advance(self, n: int) -> None:
        """Take the states that see edits through layer n as it is now."""
        with self.run.clock("forward"):
            for batch in () if self.independent else self.batches:
                batch.state = self.run.hidden.keep(run_layer(layers(self.model)[n], batch.state.read(), batch.calls[n]))
                if not self.follows:
                    batch.target = batch.state

    def every(self, batch: Batch) -> Callable[[Tensor], Iterator[Tensor]]:
        """From a sum over this batch to those over the batches that the processes have now, in one order."""
        return partial(self.peers.every, sharing=batch.sharing)

    def recall(self, reader: str) -> tuple[Gram, Gram | None]:
        """The cached Grams of what enters a module, over the windows to fit and over those held out."""
        assert self.grams is not None
        with self.run.clock("gram"):
            return self.grams.read(reader, self.model.device)

    def remember(self, reader: str, fit: Gram, held_out: Gram | None) -> None:
        """Keep the Grams of what enters a module, if there is a cache."""
        if self.grams is not None:
            with self.run.clock("gram"):
                self.grams.keep(reader, fit, held_out)

    def _enter(self, tokens: Tokens) -> None:
        fitted, rows = len(tokens) - int(self.route.held_out * len(tokens)), max(1, BATCH_TOKENS // tokens.shape[1])
        sides = [(tokens[:fitted], False), (tokens[fitted:], True)]
        parts = [
            (part, side, sharing)
            for windows, side in sides
            if len(windows)
            for part, sharing in self.peers.rounds(windows.split(rows))
        ]
        given = [part for part, _, _ in parts]
        states, calls = enter(self.model, given, self.run.hidden.keep)
        same = self.unpruned is self.model
        targets = states if same else enter(self.unpruned, given, self.run.hidden.keep)[0]
        for state, target, call, (_, side, sharing) in zip(states, targets, calls, parts, strict=True):
            self.batches.append(Batch(state, target, call, side, sharing))
            if self.follows and 0 in self.route.dropped:
                self.put(self.batches[-1], -1, target.read())

    def _pass_by(self, n: int) -> None:
        """Take all batches through a layer that is not visited, and is restored first if it is finished."""
        before, now = layers(self.unpruned)[n], layers(self.model)[n]
        finished = n in self.run.finished.records
        if not (finished or self.independent) and all(batch.uncut for batch in self.batches):
            with loaded(now, edits=False):
                return self._pass_uncut(n)
        if self.batches and self.follows:
            with loaded(before, edits=False):
                self.follow(n, before)
        if finished:
            self.run.finished.reload(n)
        if self.batches and not self.independent:
            with loaded(now, edits=False):
                self.advance(n)

    def _pass_uncut(self, n: int) -> None:
        """States and targets that are the same go through a layer once."""
        with self.run.clock("forward"):
            for batch in self.batches:
                after = run_layer(layers(self.model)[n], batch.state.read(), batch.calls[n])
                batch.state = batch.target = self.run.hidden.keep(after)
                if self.follows and n + 1 in self.route.dropped:
                    batch.target = self.run.hidden.keep(self.past(batch, n, after))


class _EnoughError(Exception):
    """Ends a forward pass after the last module whose input was wanted."""


def inputs_of(
    module: nn.Module, paths: Collection[str], state: Tensor, call: dict[str, Any], to_the_end: bool = True
) -> tuple[dict[str, Tensor], Tensor | None]:
    """The inputs of the modules at `paths` of a layer, and the layer's output if it is run to its end."""
    inputs: dict[str, Tensor] = {}

    def tap(path: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def record(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            inputs[path] = arguments[0]
            if not to_the_end and len(inputs) == len(paths):
                raise _EnoughError

        return record

    with ExitStack() as hooks:
        for path in paths:
            hooks.callback(module.get_submodule(path).register_forward_pre_hook(tap(path)).remove)
        try:
            return inputs, run_layer(module, state, call)
        except _EnoughError:
            return inputs, None


def path_in_layer(name: str, n: int) -> str:
    """The path of a module from layer n, whose own path is the beginning of its `name`."""
    return name.partition(f".{n}.")[2]
