"""What a narrower residual stream lost, made up for in closed form: linear weight by linear weight, as they compute.

h (tokens, d) is the unpruned stream, h* (tokens, d') that of the cut model, S the channels that stay; X and X* enter a
weight, W before the cut and W_S after it.  For a share s (the settings' `correction`), delta = damping * mean(diag X*^T
X*), and all that computes before it done:

    V = W_S + s (T^T X* - W_S X*^T X*) (X*^T X* + delta I)^-1

goes a share of the way to the least squares of ||V X*^T - T^T||_F^2 + delta ||V - W_S||_F^2, where T (tokens, out) is
* for a reader (q, k, v, gate, up, a head of its own) what it put out, X W^T;
* for a writer (o, down) what the stream lacks, h_S after it less h* before it: so that it makes up for what channels
that are
  gone, and writers before it, no longer say.
SliceGPT itself restores nothing.  Readers alone or writers alone are no help (docs/LOG.md).
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from billhook.calibration.forward import check_finite
from billhook.calibration.gram import add_upper, mirrored
from billhook.calibration.passage import Batch, Passage, Route, inputs_of, path_in_layer
from billhook.cuts.settings import Slicing
from billhook.math.restore import toward
from billhook.models.axes import axes
from billhook.models.families import layers, linears, weight_of
from billhook.models.residual import ROWS, flow, last_norm, residual
from billhook.runtime.offload import loaded
from billhook.runtime.run import Run
from billhook.tensors import Cross, Gram, Kept, Tokens, Weight, precise

LAST = 3  # step of a layer: q, k and v; o; gate and up; down


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
    found, whole, clock = residual(model), residual(dense), run.clock
    grown = math.sqrt(whole.channels / found.channels)  # correction of norms over heads (billhook.models.residual)
    fed = set(flow(dense, whole).before.values())
    adds = axes(dense, ("ffn",))[0].ends_layer  # False: a norm or a factor stands between writers and the stream
    passage = Passage(model, tokens, run, Route("dense_target", held_out=0.0), unpruned=dense)
    for n in passage.stops("restoration", to_the_end=True):
        layer, unpruned = layers(model)[n], layers(dense)[n]
        with loaded(unpruned, edits=False):
            for step, names in enumerate(linears(model, n)):
                writes = step % 2 == 1
                if writes and not adds:
                    continue
                first = next(iter(names.values()))
                G, T = _sums(first, passage, partial(_pair, n, layer, unpruned, first, step, kept))
                with clock("restoration"):
                    for name in names.values():
                        target = T if writes else precise(weight_of(dense, name)) @ T * (grown if name in fed else 1)
                        _refit(weight_of(model, name), target, G, settings)
            with clock("saving"):
                run.finished.save(n, [], [])
            passage.follow(n, unpruned)
    if not found.tied:
        norms = [one.get_submodule(last_norm(one, place)) for one, place in ((model, found), (dense, whole))]
        with loaded(norms[0], edits=False), loaded(norms[1], edits=False):
            G, T = _sums(
                found.head, passage, lambda batch: (norms[0](batch.state.read()), norms[1](batch.target.read()))
            )
        heads = model.get_submodule(found.head), dense.get_submodule(whole.head)
        with clock("restoration"), loaded(heads[0]), loaded(heads[1], edits=False):
            for V, W in zip(*(weight_of(one, found.head).split(ROWS) for one in (model, dense)), strict=True):
                _refit(V, precise(W) @ T, G, settings)


def _pair(
    n: int, layer: nn.Module, unpruned: nn.Module, name: str, step: int, kept: Kept, batch: Batch
) -> tuple[Tensor, Tensor]:
    """What enters a weight of the cut layer, X*, and beside it X for a reader, T for a writer."""
    path = path_in_layer(name, n)
    (inputs, after), (unpruned_inputs, dense) = (
        inputs_of(module, [path], state.read(), batch.calls[n], step == LAST)
        for module, state in ((layer, batch.state), (unpruned, batch.target))
    )
    x, y = inputs[path], unpruned_inputs[path]
    if step % 2 == 0:
        return x, y
    own: Any = layer.get_submodule(path)
    if after is None or dense is None:
        before, aim = batch.state.read(), batch.target.read() + unpruned.get_submodule(path)(y)
    else:
        before, aim = after - own(x), dense
    lacks = aim[..., kept.to(aim.device)] - before
    return x, lacks if own.bias is None else lacks - own.bias


def _sums(name: str, passage: Passage, pair: Callable[[Batch], tuple[Tensor, Tensor]]) -> tuple[Gram, Cross]:
    """X*^T X*, and X^T X* or T^T X*, of the pair that each batch gives."""
    upper, T = None, None
    for batch in passage.batches:
        with passage.run.clock("forward"):
            x, t = (entering.flatten(0, -2).float() for entering in pair(batch))
        with passage.run.clock("restoration"):
            upper = add_upper(upper, x)
            here = precise(t.T @ x)
            T = here if T is None else T.add_(here)
    assert upper is not None and T is not None
    G = mirrored(upper)
    check_finite(f"the input of {name}", G, T)
    return G, T


def _refit(W: Weight, target: Cross, G: Gram, settings: Slicing) -> None:
    """W_S becomes V, in place; `target` is T^T X*."""
    W.copy_(toward(precise(W), target, G, settings.damping, settings.correction)[0])
