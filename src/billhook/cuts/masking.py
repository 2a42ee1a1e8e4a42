"""Sparsify a model: zeros in the linear weights of its decoder layers, found operator by operator, the shape as it was.

Every method is one function of a weight and of sums over what enters it (billhook.math.solvers); what it sees, and what
its operator shall put out, is the stream's.
"""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from safetensors.torch import load, save
from torch import nn
from transformers import PreTrainedModel

from billhook.calibration.linears import Group, OperatorSums, operators
from billhook.calibration.passage import Route
from billhook.choices import INDEPENDENT_STREAMS
from billhook.cuts.parallel import spread
from billhook.errors import BillhookError
from billhook.math import sparsity
from billhook.math.layerwise import Settings, Target, squared_error
from billhook.math.pattern import Pattern
from billhook.math.solvers import SOLVERS
from billhook.math.sparsity import SPARSE_SHARE, Support
from billhook.models.families import FUSED, layers, linear, linears, role_wanted, weight_of
from billhook.runtime.offload import loaded as in_memory
from billhook.runtime.progress import Clock
from billhook.runtime.run import Run
from billhook.tensors import Tokens, Weight, precise


@dataclass(frozen=True)
class Masking:
    """What is to become sparse, and how."""

    method: str
    pattern: Pattern
    targets: tuple[str, ...]  # roles: q, k, v, o, gate, up, down
    stream: str
    settings: Settings
    by_layer: Mapping[int, float] = field(default_factory=dict)  # other sparsities than the pattern's
    keep_zeros: bool = True  # those that are there before

    def at(self, layer: int) -> Pattern:
        return replace(self.pattern, sparsity=self.by_layer[layer]) if layer in self.by_layer else self.pattern


@dataclass(frozen=True)
class Masked:
    """What became of one weight.  Errors are relative, ||V X*^T - Y|| / ||Y||, on the calibration text."""

    layer: int
    role: str
    weights: int
    before: int  # zeros before
    zeros: int
    damping: float  # the ridge that the method took
    error: float
    error_held_out: float | None  # on windows that it did not see
    note: dict[str, float | int]  # what the method counted on the way


def check(model: PreTrainedModel, how: Masking) -> None:
    """Refuse what cannot be, before anything is computed.

    Raises:
        BillhookError: groups or blocks do not tile a weight; a layer that is not there.
    """
    total = len(layers(model))
    if unknown := [n for n in how.by_layer if not 0 <= n < total]:
        raise BillhookError(f"--layer-sparsity names layer {unknown[0]}: the model has {total}, numbered from 0")
    for role, parts in FUSED.items():
        if any(role in one for one in linears(model, 0)) and 0 < len(set(parts) & set(how.targets)) < len(parts):
            raise BillhookError(
                f"--targets: {', '.join(parts)} are one matrix in this model: name all of them, or none"
            )
    for n, _, name in every(model, how.targets):
        sparsity.check(how.at(n), weight_of(model, name).shape, name)


def every(model: PreTrainedModel, roles: Sequence[str]) -> Iterator[tuple[int, str, str]]:
    """Layer, role and path of every linear module that has one of `roles`."""
    for n in range(len(layers(model))):
        for one in linears(model, n):
            yield from ((n, role, name) for role, name in one.items() if role_wanted(role, roles))


def put_weight(model: PreTrainedModel, name: str, weight: Weight) -> None:
    """Have a linear module hold another tensor, given as `weight_of` gives it; the one before is not written to."""
    module = linear(model, name)
    module.weight.data = weight if isinstance(module, nn.Linear) else weight.T


def zeros_in(model: PreTrainedModel, roles: Sequence[str]) -> tuple[int, int]:
    """How many weights are exactly zero, and how many there are."""
    zeros = total = 0
    for n, found in itertools.groupby(every(model, roles), key=lambda one: one[0]):
        with in_memory(layers(model)[n]):
            for _, _, name in found:
                weight = weight_of(model, name)
                zeros, total = zeros + int((weight == 0).sum()), total + weight.numel()
    return zeros, total


@torch.no_grad()
def mask(model: PreTrainedModel, tokens: Tokens, how: Masking, run: Run) -> list[Masked]:
    """Sparsify a model in place.

    Args:
        tokens: calibration windows (windows, length).

    Raises:
        BillhookError: as `check`; an activation is not finite; a Gram that cannot be factored (names the layer); layers
            that see one another, and several workers.
    """
    check(model, how)
    if run.workers.many and how.stream not in INDEPENDENT_STREAMS:
        raise BillhookError(
            f"{run.workers.flag}: in the stream {how.stream} a layer sees what became of those before: use --stream {' or '.join(INDEPENDENT_STREAMS)}, or one process"
        )
    done = [Masked(**one) for one in run.finished.found]
    for n, found in _shared(model, tokens, how, run) if run.workers.many else _by_layer(model, tokens, how, None, run):
        with run.clock("saving"):
            run.finished.save(n, [asdict(one) for one in found], [])
        done += found
    return sorted(done, key=lambda one: one.layer)


def _by_layer(
    model: PreTrainedModel,
    tokens: Tokens,
    how: Masking,
    at: Sequence[int] | None,
    run: Run,
) -> Iterator[tuple[int, list[Masked]]]:
    """The layers `at`, each once it is sparse, and still in memory."""
    route = Route(how.stream, only=at)
    fitted = (len(tokens) - int(route.held_out * len(tokens))) * tokens.shape[1]
    how = replace(how, settings=replace(how.settings, tokens=fitted))
    last, done = {n: _last(model, n, how) for n in range(len(layers(model)))}, list[Masked]()
    for group in operators(model, tokens, how.targets, run, route):
        done += [_masked(model, group, role, name, how, run.clock) for role, name in group.names.items()]
        if last[group.layer] in group.names.values():
            yield group.layer, done
            done = []


def _last(model: PreTrainedModel, layer: int, how: Masking) -> str:
    """Path of the last linear module of a layer that gets zeros, '' where none does."""
    found = [name for one in linears(model, layer) for role, name in one.items() if role_wanted(role, how.targets)]
    return found[-1] if found else ""


def _shared(model: PreTrainedModel, tokens: Tokens, how: Masking, run: Run) -> Iterator[tuple[int, list[Masked]]]:
    """The same, by workers, in any order."""
    for n, found, weights in spread(model, _packed, (tokens, how), run):
        with in_memory(layers(model)[n]):
            for name, weight in load(weights).items():
                weight_of(model, name).copy_(weight)
            yield n, found


def _packed(
    model: PreTrainedModel, tokens: Tokens, how: Masking, at: Sequence[int], run: Run
) -> Iterator[tuple[int, list[Masked], bytes]]:
    """Every layer `at`, with its weights as safetensors."""
    for n, found in _by_layer(model, tokens, how, at, run):
        names = [name for one in linears(model, n) for role, name in one.items() if role_wanted(role, how.targets)]
        yield n, found, save({name: weight_of(model, name).cpu().contiguous() for name in names})


def _masked(model: PreTrainedModel, group: Group, role: str, name: str, how: Masking, clock: Clock) -> Masked:
    weight, solve = weight_of(model, name), SOLVERS[how.method]
    before = int((weight == 0).sum())
    W = precise(weight).contiguous()
    settings = replace(how.settings, zeros=held(W, how))
    with clock("solver"):
        target = target_of(W, group.fit)
        try:
            found = solve(W, target, how.at(group.layer), settings)
        except BillhookError as error:
            raise BillhookError(f"{name}: {error}") from error
    weight.copy_(found.weight)
    with clock("errors"):
        V = precise(weight)
        off = None if group.held_out is None else _error(V, W, target_of(W, group.held_out))
        own = _error(V, W, target)
    zeros = int((weight == 0).sum())
    return Masked(group.layer, role, weight.numel(), before, zeros, found.damping, own, off, dict(found.note))


def held(W: Weight, how: Masking) -> Support | None:
    """What has to stay zero of a weight: where it is sparse as it comes, its zeros."""
    there = W == 0
    return there if how.keep_zeros and there.sum() > SPARSE_SHARE * there.numel() else None


def target_of(W: Weight, sums: OperatorSums) -> Target:
    """What an operator of weight W shall put out: what it did in the unpruned model, where the stream follows that."""
    if not sums.gram.any():  # an expert that no token went to: its weights alone decide
        return Target(torch.eye(len(sums.gram), dtype=sums.gram.dtype, device=sums.gram.device))
    if sums.cross is None or sums.dense is None:
        return Target(sums.gram)
    return Target(sums.gram, W @ sums.cross, ((W @ sums.dense) * W).sum(1))


def _error(V: Weight, W: Weight, target: Target) -> float:
    whole = ((W @ target.gram) * W).sum() if target.energy is None else target.energy.sum()
    return math.sqrt(float(squared_error(V, W, target).sum() / whole)) if whole > 0 else 0.0


def words(how: Masking, zeros: int, weights: int, tokens: int, model: PreTrainedModel) -> str:
    """What will be made sparse, before it is, in one line."""
    said = f"{how.pattern} zeros in {weights:,} weights ({', '.join(how.targets)}): nothing gets smaller or faster by zeros alone"
    if zeros > SPARSE_SHARE * weights:
        said += f"; {zeros / weights:.1%} are zero already, and {'stay so' if how.keep_zeros else 'may change'}"
    widest = max(weight_of(model, name).shape[1] for _, _, name in every(model, how.targets))
    if tokens < widest:
        said += f"; {tokens:,} tokens of calibration text are fewer than the {widest:,} inputs of a weight: statistics lack rank"
    return said


def record(how: Masking, done: Sequence[Masked], share_before: float) -> dict[str, Any]:
    """For billhook.json: what was asked for, what came of it, weight by weight."""
    zeros, weights = sum(one.zeros for one in done), sum(one.weights for one in done)
    return {
        "pattern": str(how.pattern),
        "targets": list(how.targets),
        "stream": how.stream,
        "zeros": zeros,
        "weights": weights,
        "sparsity": zeros / weights,
        "sparsity_before": share_before,
        "operators": [asdict(one) for one in done],
    }
