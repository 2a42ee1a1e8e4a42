"""Run a model layer by layer and keep sums of what enters every linear weight of a decoder layer: what mask methods stand on.

    for group in operators(model, tokens, roles, stream="sequential"):
        ...  # edit the weights group.modules; they share one input

Within a layer the operators come in the order in which they compute: q, k and v, which share one input; o; gate and up; down.
Nothing is kept for all layers: one hidden state a token (two where targets are the unpruned model's), the sums of one layer.
"""

import copy
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from billhook.calibration.forward import BATCH_TOKENS, enter, run
from billhook.calibration.gram import gram_of
from billhook.calibration.walk import Finished
from billhook.choices import INDEPENDENT_STREAMS
from billhook.errors import BillhookError
from billhook.models.families import layers, linears, role_wanted, row_of
from billhook.runtime.activations import State, keep
from billhook.runtime.cache import Grams
from billhook.runtime.memory import return_freed
from billhook.runtime.offload import loaded
from billhook.runtime.progress import Clock, Tick, quiet
from billhook.tensors import Gram, Tokens, precise

STEPWISE = ("true_sequential", "layer_target", "dense_target")  # sums anew for every group of operators
WITH_TARGET = ("layer_target", "dense_target")  # which follow the unpruned model as well
HELD_OUT = 0.1  # of the windows


@dataclass(frozen=True)
class OperatorSums:
    """Over tokens, of what enters an operator, X* (tokens, in), and of what does so in the unpruned model, X, where that differs."""

    gram: Gram  # X*^T X*
    cross: Tensor | None = None  # (in, in) X^T X*
    dense: Tensor | None = None  # (in, in) X^T X

    def __add__(self, other: "OperatorSums") -> "OperatorSums":
        if self.cross is None or other.cross is None or self.dense is None or other.dense is None:
            return OperatorSums(self.gram + other.gram)
        return OperatorSums(self.gram + other.gram, self.cross + other.cross, self.dense + other.dense)


@dataclass(frozen=True)
class Group:
    """Operators of one layer that share their input: path of the module by role, sums over the windows to fit and those held out."""

    layer: int
    names: Mapping[str, str]
    fit: OperatorSums
    held_out: OperatorSums | None


@dataclass
class _Batch:
    """Some windows on their way through the model."""

    state: State
    target: State  # in the unpruned model, where the stream follows that too
    calls: list[dict[str, Any]]  # what the model passes to each layer
    held_out: bool


class _EnoughError(Exception):
    """Ends a forward pass behind the operator whose input was wanted."""


@torch.no_grad()
def operators(
    model: PreTrainedModel,
    tokens: Tokens,
    roles: Sequence[str],
    *,
    stream: str,
    only: Sequence[int] | None = None,
    held_out: float = HELD_OUT,
    finished: Finished | None = None,
    clock: Clock | None = None,
    tick: Tick = quiet,
) -> Iterator[Group]:
    """Yield every group of operators that has one of `roles`, each on the inputs that `stream` says.

    Args:
        tokens: calibration windows (windows, length).
        at: the layers whose operators are yielded, in order; the walk ends with the last.  None: all.
        held_out: share of the windows, the last ones, whose sums are kept apart.
        finished: layers that are made what they became and passed through, not yielded.

    Raises:
        BillhookError: an activation is not finite; the message names the module.
    """
    clock = clock or Clock()
    only = range(len(layers(model))) if only is None else only
    kept = finished.grams if finished is not None and stream == "dense" else None
    if (
        finished is not None
        and kept
        and kept.has(_input(model, n, named) for n in only for named in _groups(model, n, roles))
    ):
        yield from _recalled(model, kept, roles, finished, only, clock, tick)
        return
    with clock("forward"):
        batches = _entered(model, tokens, len(tokens) - int(held_out * len(tokens)))
    mixed = f"{row_of(model).experts}."
    for n, module in enumerate(layers(model)[: only[-1] + 1 if only else 0]):
        tick("pruning", sum(one < n for one in only), len(only))
        if finished is not None and n in finished.records:
            _replayed(n, module, finished, batches, stream, clock)
            continue
        with loaded(module):
            groups = _groups(model, n, roles) if n in only else []
            unpruned = copy.deepcopy(module) if stream in WITH_TARGET else None
            # the experts of a layer compute side by side, and have the same roles
            alike = [list(some) for _, some in itertools.groupby(groups, key=tuple)]
            steps = alike if stream in STEPWISE else [groups] if groups else []
            for step, together in enumerate(steps):
                paths = [next(iter(named.values())).partition(f".{n}.")[2] for named in together]
                whole = stream == "dense"  # and so the layer's output is the unpruned model's
                found = _gathered(
                    n, module, unpruned, paths, batches, edited=step > 0, whole=whole, mixed=mixed, clock=clock
                )
                for named, path in zip(together, paths, strict=True):
                    fit, apart = (found.get((path, side)) for side in (False, True))
                    assert fit is not None
                    _check_finite(next(iter(named.values())), fit)
                    if kept:
                        with clock("gram"):
                            kept.keep(_input(model, n, named), fit.gram, apart and apart.gram)
                    yield Group(n, named, fit, apart)
            if n < only[-1] and not (stream == "dense" and groups):
                with clock("forward"):
                    _passed(n, module, unpruned, batches, alone=stream in INDEPENDENT_STREAMS)
            return_freed()
    tick("pruning", len(only), len(only))


def _groups(model: PreTrainedModel, n: int, roles: Sequence[str]) -> list[dict[str, str]]:
    """Of layer n the operators of each group that have one of `roles`, path by role."""
    groups = [{role: path for role, path in one.items() if role_wanted(role, roles)} for one in linears(model, n)]
    return [named for named in groups if named]


def _input(model: PreTrainedModel, n: int, named: Mapping[str, str]) -> str:
    """What the Gram of a group's input is kept by: the path of the first operator that has it, whichever are pruned."""
    return next(next(iter(one.values())) for one in linears(model, n) if set(named.values()) <= set(one.values()))


def _recalled(
    model: PreTrainedModel,
    grams: Grams,
    roles: Sequence[str],
    finished: Finished,
    at: Sequence[int],
    clock: Clock,
    tick: Tick,
) -> Iterator[Group]:
    """Every group by what an earlier walk in the dense stream has kept."""
    for done, n in enumerate(at):
        tick("pruning", done, len(at))
        if n in finished.records:
            finished.reload(n)
            continue
        with loaded(layers(model)[n]):
            for named in _groups(model, n, roles):
                with clock("gram"):
                    fit, apart = grams.read(_input(model, n, named), model.device)
                yield Group(n, named, OperatorSums(fit), None if apart is None else OperatorSums(apart))
        return_freed()
    tick("pruning", len(at), len(at))


def _entered(model: PreTrainedModel, tokens: Tokens, count: int) -> list[_Batch]:
    """The states before the first layer; windows from `count` on are held out."""
    rows = max(1, BATCH_TOKENS // tokens.shape[1])
    parts = [
        (part, side) for some, side in ((tokens[:count], False), (tokens[count:], True)) for part in some.split(rows)
    ]
    parts = [(part, side) for part, side in parts if len(part)]
    states, calls = enter(model, [part for part, _ in parts], keep)
    return [_Batch(s, s, c, side) for s, c, (_, side) in zip(states, calls, parts, strict=True)]


def _gathered(
    n: int,
    module: nn.Module,
    unpruned: nn.Module | None,
    paths: Sequence[str],
    batches: Sequence[_Batch],
    *,
    edited: bool,
    whole: bool,
    mixed: str,
    clock: Clock,
) -> dict[tuple[str, bool], OperatorSums]:
    """Sums of what enters each of `paths`, by path and whether held out.

    Args:
        edited: whether an operator of this layer was pruned before.
        whole: run the layer to its end, and go on from there.
        mixed: what paths of experts begin with.
    """
    found: dict[tuple[str, bool], OperatorSums] = {}
    for batch in batches:
        call = batch.calls[n]
        with clock("forward"):
            inputs, after = seen(module, paths, batch.state.read(), call, whole)
            dense = None
            if unpruned is not None and (edited or batch.state is not batch.target):
                dense, _ = seen(unpruned, paths, batch.target.read(), call, False)
        with clock("gram"):
            for path in paths:
                x = inputs[path].flatten(0, -2).float()
                # what an expert sees is other tokens where the router saw something else: it has no target
                y = dense[path].flatten(0, -2).float() if dense and not path.startswith(mixed) else None
                gram = gram_of(x)
                here = OperatorSums(gram) if y is None else OperatorSums(gram, precise(y.T @ x), gram_of(y))
                key = path, batch.held_out
                found[key] = found[key] + here if key in found else here
        if whole:  # in the dense stream alone, where both are one
            assert after is not None
            batch.state = batch.target = keep(after)
    return found


def seen(
    module: nn.Module, paths: Sequence[str], state: Tensor, call: dict[str, Any], whole: bool
) -> tuple[dict[str, Tensor], Tensor | None]:
    """What enters the modules at `paths` of a layer, and what leaves the layer if it is run to its end."""
    inputs: dict[str, Tensor] = {}

    def tap(path: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def taken(_: nn.Module, given: tuple[Tensor, ...]) -> None:
            inputs[path] = given[0]
            if not whole and len(inputs) == len(paths):
                raise _EnoughError

        return taken

    with ExitStack() as hooks:
        for path in paths:
            hooks.callback(module.get_submodule(path).register_forward_pre_hook(tap(path)).remove)
        try:
            return inputs, run(module, state, call)
        except _EnoughError:
            return inputs, None


def _replayed(
    n: int, module: nn.Module, finished: Finished, batches: Sequence[_Batch], stream: str, clock: Clock
) -> None:
    """Take every batch through a layer that an earlier run has finished."""
    follows = stream in (*WITH_TARGET, "dense")
    with clock("forward"), loaded(module):
        for batch in batches if follows else ():
            batch.target = _run(module, batch.target, batch.calls[n])
    finished.reload(n)
    with clock("forward"), loaded(module):
        for batch in batches:
            batch.state = batch.target if stream in INDEPENDENT_STREAMS else _run(module, batch.state, batch.calls[n])
            batch.target = batch.target if follows else batch.state


def _run(module: nn.Module, state: State, call: dict[str, Any]) -> State:
    return keep(run(module, state.read(), call))


def _passed(n: int, module: nn.Module, unpruned: nn.Module | None, batches: Sequence[_Batch], *, alone: bool) -> None:
    """Take every batch through layer n."""
    for batch in batches:
        together, call = batch.state is batch.target, batch.calls[n]
        if unpruned is not None:
            batch.target = _run(unpruned, batch.target, call)
        if alone and unpruned is not None:
            batch.state = batch.target
        else:
            batch.state = _run(module, batch.state, call)
            if unpruned is None and together:
                batch.target = batch.state


def _check_finite(name: str, sums: OperatorSums) -> None:
    if not all(one.isfinite().all() for one in (sums.gram, sums.cross, sums.dense) if one is not None):
        raise BillhookError(f"what enters {name} is not finite: weights or dtype overflow; try --dtype float32")
