"""Run a model layer by layer and sum over the inputs of the linear weights of a decoder layer, its operators.

Methods that mask weights are built on these sums.

    for group in operators(model, tokens, roles, run, Route("sequential")):
        ...  # edit the weights of the modules group.names; they share one input

Within a layer the operators come in the order in which they compute: q, k and v, which share one input; o; gate and up;
down.  Memory holds one hidden state per token (two if the unpruned model's are followed, too) and the sums of one
layer, never of all layers.
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

from billhook.calibration.forward import BATCH_TOKENS, enter, run_layer
from billhook.calibration.gram import gram_of
from billhook.calibration.passage import Route
from billhook.choices import INDEPENDENT_STREAMS
from billhook.errors import BillhookError
from billhook.models.families import layers, linears, role_wanted, row_of
from billhook.runtime.activations import State
from billhook.runtime.cache import Grams
from billhook.runtime.memory import return_freed
from billhook.runtime.offload import loaded
from billhook.runtime.run import Run
from billhook.tensors import Gram, Tokens, precise

STEPWISE = ("true_sequential", "layer_target", "dense_target")  # streams with new sums for every group of operators
WITH_TARGET = ("layer_target", "dense_target")  # streams that follow the unpruned model as well


@dataclass(frozen=True)
class OperatorSums:
    """Sums over tokens of an operator's input, X* (tokens, in), and of its input in the unpruned model, X, if that
    differs."""

    gram: Gram  # X*^T X*
    cross: Tensor | None = None  # (in, in) X^T X*
    dense: Tensor | None = None  # (in, in) X^T X

    def __add__(self, other: "OperatorSums") -> "OperatorSums":
        if self.cross is None or other.cross is None or self.dense is None or other.dense is None:
            return OperatorSums(self.gram + other.gram)
        return OperatorSums(self.gram + other.gram, self.cross + other.cross, self.dense + other.dense)


@dataclass(frozen=True)
class Group:
    """Operators of one layer that share their input, with the sums over the windows to fit and over those held out."""

    layer: int
    names: Mapping[str, str]  # path of the module, by role
    fit: OperatorSums
    held_out: OperatorSums | None


@dataclass
class _Batch:
    """Some windows on their way through the model."""

    state: State
    target: State  # state in the unpruned model, if the stream follows that too
    calls: list[dict[str, Any]]  # arguments that the model passes to each layer
    held_out: bool


@dataclass(frozen=True)
class _Stop:
    """The layer that the walk is at."""

    number: int
    module: nn.Module
    unpruned: nn.Module | None = None  # copy of the module before pruning, if the stream has a target


class _EnoughError(Exception):
    """Ends a forward pass after the last operator whose input was wanted."""


@torch.no_grad()
def operators(
    model: PreTrainedModel, tokens: Tokens, roles: Sequence[str], run: Run, route: Route = Route()
) -> Iterator[Group]:
    """Yield every group of operators that has one of `roles`, layer by layer of a route, which drops none.

    Layers that an earlier run has finished are restored and passed through, not yielded.

    Args:
        tokens: calibration windows (windows, length).

    Raises:
        BillhookError: an activation is not finite; the message names the module.
    """
    clock, stream = run.clock, route.stream
    only = range(len(layers(model))) if route.only is None else sorted(route.only)
    cached = run.finished.grams if stream == "dense" else None
    if cached and cached.has(_input(model, n, named) for n in only for named in _groups(model, n, roles)):
        yield from _recalled(model, cached, roles, only, run)
        return
    with clock("forward"):
        batches = _entered(model, tokens, len(tokens) - int(route.held_out * len(tokens)), run)
    expert_prefix = f"{row_of(model).experts}."
    for n, module in enumerate(layers(model)[: only[-1] + 1 if only else 0]):
        run.tick("pruning", sum(layer < n for layer in only), len(only))
        if n in run.finished.records:
            _reload(_Stop(n, module), batches, stream, run)
            continue
        with loaded(module):
            groups = _groups(model, n, roles) if n in only else []
            stop = _Stop(n, module, copy.deepcopy(module) if stream in WITH_TARGET else None)
            # the experts of a layer compute side by side and have the same roles: they are one step
            steps_by_role = [list(same_roles) for _, same_roles in itertools.groupby(groups, key=tuple)]
            steps = steps_by_role if stream in STEPWISE else [groups] if groups else []
            for step, together in enumerate(steps):
                paths = [next(iter(named.values())).partition(f".{n}.")[2] for named in together]
                sums = _gathered(
                    stop,
                    paths,
                    batches,
                    edited=step > 0,
                    to_the_end=stream == "dense",
                    expert_prefix=expert_prefix,
                    run=run,
                )
                for named, path in zip(together, paths, strict=True):
                    fit, held_out_sums = (sums.get((path, side)) for side in (False, True))
                    assert fit is not None
                    _check_finite(next(iter(named.values())), fit)
                    if cached:
                        with clock("gram"):
                            cached.keep(_input(model, n, named), fit.gram, held_out_sums and held_out_sums.gram)
                    yield Group(n, named, fit, held_out_sums)
            if n < only[-1] and not (stream == "dense" and groups):
                with clock("forward"):
                    _pass(stop, batches, run, independent=stream in INDEPENDENT_STREAMS)
            return_freed()
    run.tick("pruning", len(only), len(only))


def _groups(model: PreTrainedModel, n: int, roles: Sequence[str]) -> list[dict[str, str]]:
    """The groups of layer n, each with the operators that have one of `roles`: path by role."""
    groups = [{role: path for role, path in group.items() if role_wanted(role, roles)} for group in linears(model, n)]
    return [named for named in groups if named]


def _input(model: PreTrainedModel, n: int, named: Mapping[str, str]) -> str:
    """The key of a group's Gram: the path of the first operator with that input, whether or not it is pruned."""
    groups = (list(group.values()) for group in linears(model, n))
    return next(paths[0] for paths in groups if set(named.values()) <= set(paths))


def _recalled(
    model: PreTrainedModel, grams: Grams, roles: Sequence[str], only: Sequence[int], run: Run
) -> Iterator[Group]:
    """Every group, by the cached Grams of an earlier walk in the dense stream."""
    for done, n in enumerate(only):
        run.tick("pruning", done, len(only))
        if n in run.finished.records:
            run.finished.reload(n)
            continue
        with loaded(layers(model)[n]):
            for named in _groups(model, n, roles):
                with run.clock("gram"):
                    fit, held_out = grams.read(_input(model, n, named), model.device)
                yield Group(n, named, OperatorSums(fit), None if held_out is None else OperatorSums(held_out))
        return_freed()
    run.tick("pruning", len(only), len(only))


def _entered(model: PreTrainedModel, tokens: Tokens, count: int, run: Run) -> list[_Batch]:
    """All batches, with their states before the first layer; windows from `count` on are held out."""
    rows = max(1, BATCH_TOKENS // tokens.shape[1])
    parts = [
        (part, side)
        for windows, side in ((tokens[:count], False), (tokens[count:], True))
        for part in windows.split(rows)
    ]
    parts = [(part, side) for part, side in parts if len(part)]
    states, calls = enter(model, [part for part, _ in parts], run.hidden.keep)
    return [_Batch(s, s, c, side) for s, c, (_, side) in zip(states, calls, parts, strict=True)]


def _gathered(
    stop: _Stop,
    paths: Sequence[str],
    batches: Sequence[_Batch],
    *,
    edited: bool,
    to_the_end: bool,
    expert_prefix: str,
    run: Run,
) -> dict[tuple[str, bool], OperatorSums]:
    """Sums over the inputs of the operators at `paths`, by path and whether held out.

    Args:
        edited: whether an operator of this layer was pruned before.
        to_the_end: run the whole layer and take its output as the new state: the dense stream.
        expert_prefix: start of the paths of experts.
    """
    sums: dict[tuple[str, bool], OperatorSums] = {}
    for batch in batches:
        call = batch.calls[stop.number]
        with run.clock("forward"):
            inputs, after = inputs_of(stop.module, paths, batch.state.read(), call, to_the_end)
            dense = None
            if stop.unpruned is not None and (edited or batch.state is not batch.target):
                dense, _ = inputs_of(stop.unpruned, paths, batch.target.read(), call, False)
        with run.clock("gram"):
            for path in paths:
                x = inputs[path].flatten(0, -2).float()
                # after an edit the router may send other tokens to an expert, which therefore has no target
                y = dense[path].flatten(0, -2).float() if dense and not path.startswith(expert_prefix) else None
                gram = gram_of(x)
                batch_sums = OperatorSums(gram) if y is None else OperatorSums(gram, precise(y.T @ x), gram_of(y))
                key = path, batch.held_out
                sums[key] = sums[key] + batch_sums if key in sums else batch_sums
        if to_the_end:  # in the dense stream the state is its own target
            assert after is not None
            batch.state = batch.target = run.hidden.keep(after)
    return sums


def inputs_of(
    module: nn.Module, paths: Sequence[str], state: Tensor, call: dict[str, Any], to_the_end: bool
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


def _reload(stop: _Stop, batches: Sequence[_Batch], stream: str, run: Run) -> None:
    """Restore a layer that an earlier run has finished, and take every batch through it."""
    n, module, has_target = stop.number, stop.module, stream in (*WITH_TARGET, "dense")
    with run.clock("forward"), loaded(module):
        for batch in batches if has_target else ():
            batch.target = _after(module, batch.target, batch.calls[n], run)
    run.finished.reload(n)
    with run.clock("forward"), loaded(module):
        for batch in batches:
            same = stream in INDEPENDENT_STREAMS
            batch.state = batch.target if same else _after(module, batch.state, batch.calls[n], run)
            batch.target = batch.target if has_target else batch.state


def _after(module: nn.Module, state: State, call: dict[str, Any], run: Run) -> State:
    return run.hidden.keep(run_layer(module, state.read(), call))


def _pass(stop: _Stop, batches: Sequence[_Batch], run: Run, *, independent: bool) -> None:
    """Take every batch through the layer."""
    for batch in batches:
        same, call = batch.state is batch.target, batch.calls[stop.number]
        if stop.unpruned is not None:
            batch.target = _after(stop.unpruned, batch.target, call, run)
        if independent and stop.unpruned is not None:
            batch.state = batch.target
        else:
            batch.state = _after(stop.module, batch.state, call, run)
            if stop.unpruned is None and same:
                batch.target = batch.state


def _check_finite(name: str, sums: OperatorSums) -> None:
    if not all(total.isfinite().all() for total in (sums.gram, sums.cross, sums.dense) if total is not None):
        raise BillhookError(f"the input of {name} is not finite: weights or dtype overflow; try --dtype float32")
