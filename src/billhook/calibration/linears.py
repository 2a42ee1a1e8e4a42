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
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from billhook.calibration.forward import check_finite
from billhook.calibration.gram import gram_of, product
from billhook.calibration.passage import Passage, Route, inputs_of, path_in_layer
from billhook.models.families import layers, linears, role_wanted, row_of
from billhook.runtime.run import Run
from billhook.tensors import Gram, Tokens, precise

STEPWISE = ("true_sequential", "layer_target", "dense_target")  # streams with new sums for every group of operators
WITH_TARGET = ("layer_target", "dense_target")  # streams that follow the unpruned model as well


@dataclass(frozen=True)
class OperatorSums:
    """Sums over tokens of an operator's input, X* (tokens, in),
    and of its input in the unpruned model, X, if that differs."""

    gram: Gram  # X*^T X*
    cross: Tensor | None = None  # (in, in) X^T X*
    dense: Tensor | None = None  # (in, in) X^T X

    def __add__(self, other: "OperatorSums") -> "OperatorSums":
        if self.cross is None or other.cross is None or self.dense is None or other.dense is None:
            return OperatorSums(self.gram + other.gram)
        return OperatorSums(self.gram + other.gram, self.cross + other.cross, self.dense + other.dense)

    def of_every(self, every: Callable[[Tensor], Iterator[Tensor]]) -> Iterator["OperatorSums"]:
        """From the sums over a batch to those over the batches that the processes have now, in one order."""
        if self.cross is None or self.dense is None:
            return map(OperatorSums, every(self.gram))
        return map(OperatorSums, every(self.gram), every(self.cross), every(self.dense))


@dataclass(frozen=True)
class Group:
    """Operators of one layer that share their input, with the sums over the windows to fit and over those held out."""

    layer: int
    names: Mapping[str, str]  # path of the module, by role
    fit: OperatorSums
    held_out: OperatorSums | None


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
    yield from named_operators(
        model, tokens, {n: groups for n in route.wanted(model) if (groups := _groups(model, n, roles))}, run, route
    )


@torch.no_grad()
def named_operators(
    model: PreTrainedModel,
    tokens: Tokens,
    by_layer: Mapping[int, Sequence[Mapping[str, str]]],
    run: Run,
    route: Route,
    around: Callable[[int, Sequence[Mapping[str, str]]], AbstractContextManager[object]] = lambda *_: nullcontext(),
) -> Iterator[Group]:
    """The same of the groups that are named, each with the path of its modules by role, for each layer.

    Args:
        around: of a layer and groups of it: what is entered while their sums are taken.
    """
    keys = [_key(model, n, named) for n, groups in by_layer.items() for named in groups]
    passage = Passage(model, tokens, run, replace(route, only=by_layer), keys)
    for n in passage.stops("pruning"):
        unpruned = copy.deepcopy(layers(model)[n]) if route.stream in WITH_TARGET else None
        # the experts of a layer compute side by side and have the same roles: they are one step
        steps = [list(same_roles) for _, same_roles in itertools.groupby(by_layer[n], key=tuple)]
        for step, groups in enumerate(steps if route.stream in STEPWISE else [by_layer[n]]):
            with around(n, groups):
                sums = {} if passage.recalls else _summed(passage, n, groups, unpruned, step > 0)
            for named in groups:
                key, path = _key(model, n, named), _path(n, named)
                if passage.recalls:
                    fit, held_out = (None if gram is None else OperatorSums(gram) for gram in passage.recall(key))
                else:
                    fit, held_out = sums[path, False], sums.get((path, True))
                    check_finite(f"the input of {next(iter(named.values()))}", fit.gram, fit.cross, fit.dense)
                    passage.remember(key, fit.gram, held_out and held_out.gram)
                assert fit is not None
                yield Group(n, named, fit, held_out)
        if unpruned is not None and n < passage.wanted[-1]:
            passage.follow(n, unpruned)
        unpruned = None


def _groups(model: PreTrainedModel, n: int, roles: Sequence[str]) -> list[dict[str, str]]:
    """The groups of layer n, each with the operators that have one of `roles`: path by role."""
    groups = [{role: path for role, path in group.items() if role_wanted(role, roles)} for group in linears(model, n)]
    return [named for named in groups if named]


def _key(model: PreTrainedModel, n: int, named: Mapping[str, str]) -> str:
    """The key of a group's Gram: the path of the first operator with that input, whether or not it is pruned."""
    groups = (list(group.values()) for group in linears(model, n))
    return next(paths[0] for paths in groups if set(named.values()) <= set(paths))


def _path(n: int, named: Mapping[str, str]) -> str:
    """The path, from its layer, of the operator whose input is taken for all of a group."""
    return path_in_layer(next(iter(named.values())), n)


def _summed(
    passage: Passage, n: int, groups: Sequence[Mapping[str, str]], unpruned: nn.Module | None, edited: bool
) -> dict[tuple[str, bool], OperatorSums]:
    """Sums over the inputs of groups of layer n, by path and whether held out.

    In the stream `dense` the batches go on, since the layer is run to its end.

    Args:
        unpruned: the layer as it was, if the stream has a target.
        edited: whether an operator of the layer was pruned before.
    """
    module, experts = layers(passage.model)[n], f"{row_of(passage.model).experts}."
    paths, dense = [_path(n, named) for named in groups], passage.route.stream == "dense"
    sums: dict[tuple[str, bool], OperatorSums] = {}
    for batch in passage.batches:
        call, targets = batch.calls[n], {}
        with passage.run.clock("forward"):
            inputs, after = inputs_of(module, paths, batch.state.read(), call, to_the_end=dense)
            if unpruned is not None and (edited or batch.state is not batch.target):
                targets, _ = inputs_of(unpruned, paths, batch.target.read(), call, to_the_end=False)
        with passage.run.clock("gram"):
            for path in paths:
                x = inputs[path].flatten(0, -2)
                # after an edit the router may send other tokens to an expert, which therefore has no target
                y = targets[path].flatten(0, -2) if targets and not path.startswith(experts) else None
                gram = gram_of(x)
                batch_sums = OperatorSums(gram) if y is None else OperatorSums(gram, precise(product(y, x)), gram_of(y))
                key = path, batch.held_out
                for one in batch_sums.of_every(passage.every(batch)):
                    sums[key] = sums[key] + one if key in sums else one
        if after is not None:
            passage.put(batch, n, after)
    return sums
