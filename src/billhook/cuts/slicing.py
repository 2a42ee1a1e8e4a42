"""SliceGPT: Compress Large Language Models by Deleting Rows and Columns (Ashkboos et al. 2024, arXiv:2401.15024).

The residual stream x (tokens, d) is cut to d' channels, the same ones wherever it is written or read.  With `rotate`:

1. Fold       every norm's weight goes into what reads it; what the norms put out is then X_r = norm(x)         (section
3.1) 2. Calibrate  C = sum over all inputs r of readers of X_r^T X_r, in float64
(section 3.3) 3. Rotate     Q = eigenvectors of C, the largest first; the embedding table, writers and readers turn by
it    (section 3.2) 4. Delete     all but the first d' channels
(section 3.4)

The paper has a Q for every block, from the activations of the blocks sliced before it, and a product Q_l^T Q_l+1 on the
path around each block; no stock class has a place for that, so that here one Q serves all, from the unpruned model's.

Without `rotate` the channels stay what they are (nor does a tied head become one of its own), and 1 to 3 are replaced
by a score:

    s_j = sum over readers W_r of E_rj / sum_k E_rk,  E_rj = (X_r^T X_r)_jj ||W_r,:j||^2

E_rj is the squared error of W_r's output where channel j of its input alone were zero, and every reader, the head among
them, counts the same; that writers' outputs count too makes it worse (docs/LOG.md).  In both, a norm of d' channels is
made to equal the norm of d with zeros in place of those that go, which is the paper's too.

5. Restore    every linear weight, from a copy of the unpruned model (billhook.cuts.slicing_restore); the paper does not
"""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from billhook.calibration.forward import check_finite
from billhook.calibration.gram import add_upper, mirrored
from billhook.calibration.passage import Passage, Route, inputs_of, path_in_layer
from billhook.cuts.settings import Slicing as Settings
from billhook.cuts.slicing_restore import restore
from billhook.math import selection
from billhook.models.families import layers, linears, weight_of
from billhook.models.plan import Cut, Plan, UnitScores
from billhook.models.residual import ROWS, cut, last_norm, residual
from billhook.models.rotation import fold, rotate
from billhook.runtime.offload import by_module, copied, loaded
from billhook.runtime.run import Run
from billhook.tensors import Gram, Scores, Tokens, float64_device, precise


@torch.no_grad()
def slice_residual(
    model: PreTrainedModel,
    tokens: Tokens,
    plan: Plan,
    settings: Settings,
    run: Run,
    _: UnitScores | None = None,
) -> list[Cut]:
    """Cut the plan's channels out of the residual stream, in place.

    Args:
        tokens: calibration windows (windows, length).

    Returns:
        nothing: it cuts no axis of a layer.

    Raises:
        BillhookError: the model's stream cannot be cut, or rotated, or an activation is not finite.
    """
    if plan.empty:
        return []
    kept = residual(model).channels - plan.residual
    settings = settings if plan.residual else replace(settings, restoration=False)
    if plan.rotate:
        fold(model)
        Q = run.finished.once("rotation", lambda: _rotation(model, tokens, run))
        with run.clock("rotation"):
            rotate(model, Q.to(float64_device(model.device)))
        stay = torch.arange(kept)
    else:
        with run.clock("forward"):
            scores = run.finished.once("scores", lambda: channel_scores(model, tokens, run))
        stay = selection.lowest(scores, plan.residual)[1]
    dense = copied(model) if settings.restoration else None
    with run.clock("surgery"):
        cut(model, stay)
    if dense is not None:
        restore(model, dense, tokens, stay, settings, run)
    return []


@torch.no_grad()
def channel_scores(model: PreTrainedModel, tokens: Tokens, run: Run) -> Scores:
    """s (channels), float64."""
    energy: dict[tuple[str, ...], Tensor] = {}
    for readers, x in _inputs(model, tokens, run):
        here = precise(x.square()).sum(0)
        energy[readers] = energy[readers] + here if readers in energy else here
    s = torch.zeros_like(next(iter(energy.values())))
    of_input = {name: here for readers, here in energy.items() for name in readers}
    for name in (name for names in by_module(model, of_input, edits=False) for name in names):
        norms = sum(precise(rows).square().sum(0) for rows in weight_of(model, name).split(ROWS))
        E = of_input[name] * torch.as_tensor(norms).to(s)
        s += E / E.sum().clamp_min(torch.finfo(E.dtype).tiny)
    check_finite("the residual stream", s)
    return s.cpu()


def _rotation(model: PreTrainedModel, tokens: Tokens, run: Run) -> Gram:
    """Q, of a folded model."""
    with run.clock("forward"):
        C = _gram(model, tokens, run)
    with run.clock("rotation"):
        return torch.linalg.eigh(C).eigenvectors.flip(1)


def _gram(model: PreTrainedModel, tokens: Tokens, run: Run) -> Gram:
    upper = None
    for _, x in _inputs(model, tokens, run):
        upper = add_upper(upper, x)
    assert upper is not None
    C = mirrored(upper)
    check_finite("the residual stream", C)
    return C


def _inputs(model: PreTrainedModel, tokens: Tokens, run: Run) -> Iterator[tuple[tuple[str, ...], Tensor]]:
    """What enters the readers that share an input, X_r (tokens, channels), layer by layer, and batch by batch.

    The head never runs: what it would read is what the norm before it puts out.
    """
    found, passage = residual(model), Passage(model, tokens, run, Route(held_out=0.0))
    for n in passage.stops("statistics", edits=False):
        groups = [tuple(group.values()) for group in linears(model, n)[::2]]
        readers = {path_in_layer(group[0], n): group for group in groups}
        for batch in passage.batches:
            inputs, after = inputs_of(layers(model)[n], list(readers), batch.state.read(), batch.calls[n])
            assert after is not None
            passage.put(batch, n, after)
            for path, x in inputs.items():
                yield readers[path], x.flatten(0, -2).float()
    norm = model.get_submodule(last_norm(model, found))
    with loaded(norm, edits=False):
        for batch in passage.batches:
            yield found.readers[-1], norm(batch.state.read()).flatten(0, -2).float()
