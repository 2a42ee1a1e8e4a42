"""What a narrower residual stream lost, made up for in closed form: linear weight by linear weight, as they compute.

h (tokens, d) is the unpruned stream, h* (tokens, d') that of the cut model, S the channels that stay; X and X* enter a
weight, W before the cut and W_S after it.  For a share s (the settings' `correction`), delta = damping * mean(diag X*^T
X*), and all that computes before it done:

    V = W_S + s (T^T X* - W_S X*^T X*) (X*^T X* + delta I)^-1

goes a share of the way to the least squares of ||V X*^T - T^T||_F^2 + delta ||V - W_S||_F^2, where T (tokens, out) is
* for a reader (q, k, v, gate, up, a head of its own) what it put out, X W^T;
* for a writer (o, down) what the stream lacks, h_S after it less h* before it: so that it makes up for what channels that are
  gone, and writers before it, no longer say.
SliceGPT itself restores nothing.  Readers alone or writers alone are no help (docs/LOG.md).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from billhook.calibration.forward import BATCH_TOKENS, enter, run_layer
from billhook.calibration.gram import add_upper, mirrored
from billhook.calibration.linears import inputs_of
from billhook.cuts.settings import Slicing
from billhook.errors import BillhookError
from billhook.math.linalg import factor
from billhook.models.axes import axes
from billhook.models.families import layers, linears, weight_of
from billhook.models.residual import ROWS, flow, last_norm, residual
from billhook.runtime.activations import State
from billhook.runtime.memory import return_freed
from billhook.runtime.offload import loaded, renumber
from billhook.runtime.progress import Clock
from billhook.runtime.run import Run
from billhook.tensors import Cross, Gram, Kept, Tokens, Weight, precise

LAST = 3  # step of a layer: q, k and v; o; gate and up; down


@dataclass
class _Batch:
    """Some windows on their way through both models."""

    state: State
    dense: State
    calls: list[dict[str, Any]]  # what either model passes to each layer


@torch.no_grad()
def restore(
    model: PreTrainedModel,
    dense: PreTrainedModel,
    tokens: Tokens,
    kept: Kept,
    settings: Slicing,
    run: Run,
) -> None:
    """Refit the cut `model` to the unpruned `dense`, in place; the layers of `dense` are given up one by one.

    Of a paged model (billhook.runtime.offload) a layer of each is there at a time.

    Args:
        tokens: calibration windows (windows, length).
        kept: the channels of `dense` that `model` has.

    Raises:
        BillhookError: an activation is not finite; the message names the module.
    """
    found, whole, total = residual(model), residual(dense), len(layers(model))
    clock, finished, keep = run.clock, run.finished, run.hidden.keep
    grown = math.sqrt(whole.channels / found.channels)  # correction of norms over heads (billhook.models.residual)
    fed = set(flow(dense, whole).before.values())
    adds = axes(dense, ("ffn",))[0].ends_layer  # False: a norm or a factor stands between writers and the stream
    parts = list(tokens.split(max(1, BATCH_TOKENS // tokens.shape[1])))
    with clock("forward"):
        states = (enter(model, parts, keep)[0], *enter(dense, parts, keep))
        batches = [_Batch(*one) for one in zip(*states, strict=True)]
    for n, layer in enumerate(layers(model)):
        run.tick("restoration", n, total)
        unpruned = layers(dense)[n]
        done = n in finished.records
        if done:
            finished.reload(n)
        with loaded(layer), loaded(unpruned, edits=False):
            for step, names in enumerate(linears(model, n) if not done else ()):
                writes = step % 2 == 1
                if writes and not adds:
                    continue
                first = next(iter(names.values()))
                G, T = _sums(first, batches, partial(_pair, n, layer, unpruned, first, step, kept), clock)
                with clock("restoration"):
                    for name in names.values():
                        target = T if writes else precise(weight_of(dense, name)) @ T * (grown if name in fed else 1)
                        _refit(weight_of(model, name), target, G, settings)
            if not done:
                with clock("saving"):
                    finished.save(n, [], [])
            with clock("forward"):
                for one in batches:
                    one.state = keep(run_layer(layer, one.state.read(), one.calls[n]))
                    one.dense = keep(run_layer(unpruned, one.dense.read(), one.calls[n]))
        layers(dense)[n] = nn.Identity()
        renumber(dense)
        return_freed()
    run.tick("restoration", total, total)
    if not found.tied:
        norms = [one.get_submodule(last_norm(one, place)) for one, place in ((model, found), (dense, whole))]
        with loaded(norms[0], edits=False), loaded(norms[1], edits=False):
            G, T = _sums(
                found.head, batches, lambda one: (norms[0](one.state.read()), norms[1](one.dense.read())), clock
            )
        heads = model.get_submodule(found.head), dense.get_submodule(whole.head)
        with clock("restoration"), loaded(heads[0]), loaded(heads[1], edits=False):
            for V, W in zip(*(weight_of(one, found.head).split(ROWS) for one in (model, dense)), strict=True):
                _refit(V, precise(W) @ T, G, settings)


def _pair(
    n: int, layer: nn.Module, unpruned: nn.Module, name: str, step: int, kept: Kept, one: _Batch
) -> tuple[Tensor, Tensor]:
    """What enters a weight of the cut layer, X*, and beside it X for a reader, T for a writer."""
    path = name.partition(f".{n}.")[2]
    (inputs, after), (unpruned_inputs, dense) = (
        inputs_of(module, [path], state.read(), one.calls[n], step == LAST)
        for module, state in ((layer, one.state), (unpruned, one.dense))
    )
    x, y = inputs[path], unpruned_inputs[path]
    if step % 2 == 0:
        return x, y
    own: Any = layer.get_submodule(path)
    if after is None or dense is None:
        before, aim = one.state.read(), one.dense.read() + unpruned.get_submodule(path)(y)
    else:
        before, aim = after - own(x), dense
    lacks = aim[..., kept.to(aim.device)] - before
    return x, lacks if own.bias is None else lacks - own.bias


def _sums(
    name: str, batches: Sequence[_Batch], pair: Callable[[_Batch], tuple[Tensor, Tensor]], clock: Clock
) -> tuple[Gram, Cross]:
    """X*^T X*, and X^T X* or T^T X*, of the pair that each batch gives."""
    upper, T = None, None
    for one in batches:
        with clock("forward"):
            x, t = (found.flatten(0, -2).float() for found in pair(one))
        with clock("restoration"):
            upper = add_upper(upper, x)
            here = precise(t.T @ x)
            T = here if T is None else T.add_(here)
    assert upper is not None and T is not None
    G = mirrored(upper)
    if not (G.isfinite().all() and T.isfinite().all()):
        raise BillhookError(f"what enters {name} is not finite: weights or dtype overflow; try --dtype float32")
    return G, T


def _refit(W: Weight, target: Cross, G: Gram, settings: Slicing) -> None:
    """W_S becomes V, in place; `target` is T^T X*."""
    lower, _ = factor(G, settings.damping)
    lacks = settings.correction * (target - precise(W) @ G)
    W.copy_(precise(W) + torch.cholesky_solve(lacks.T, lower).T)
