"""LayerChop: Just CHOP, Embarrassingly Simple LLM Compression (Jha et al. 2023, arXiv:2305.14864).

1. Chop      whole decoder layers go at once, chosen by position alone; the first and the last stay, since they meet the
             embedding table and the head.
2. Recover   training goes on as before, at the learning rate of pretraining.

Step 1 is here; which layers the plan names, by LayerChop's presets or by what others measure, is `chopping`'s business.
Between the two steps billhook may patch the cut, which the paper does not (`patch="linear"`):

   x_n (tokens, hidden) enters layer n;  layers a to b-1 go;  X (tokens, ffn) enters the FFN's last projection W of
   layer a-1. V = argmin_V ||V X^T - (W X^T + E^T)||_F^2,  E = x_b - x_a: what the layers that go would have added

LinearPatch (Chen et al. 2025, arXiv:2505.24680) puts a matrix (hidden, hidden) where the layers were, which no stock
checkpoint can hold: the residual stream passes a pre-norm layer by, so the matrix folds into none.  What can be had
without a new parameter is a linear map of what the layer before computes anyway.  V has W's shape and takes its place.
"""

from collections.abc import Collection

import torch
from transformers import PreTrainedModel

from billhook.calibration.passage import Route
from billhook.calibration.walk import ReaderSums, walk
from billhook.cuts import restoration
from billhook.cuts.settings import Chopping as Settings
from billhook.errors import BillhookError
from billhook.math import layer_presets
from billhook.models.axes import Axis, axes, reader_weight
from billhook.models.plan import Cut, Plan, UnitScores
from billhook.models.surgery import drop_layers
from billhook.runtime.progress import Clock
from billhook.runtime.run import Run
from billhook.tensors import Tokens


@torch.no_grad()
def chop(
    model: PreTrainedModel,
    tokens: Tokens,
    plan: Plan,
    settings: Settings,
    run: Run,
    _: UnitScores | None = None,
) -> list[Cut]:
    """Drop the plan's layers, in place, and patch the cuts if the settings say so.

    Args:
        tokens: calibration windows (windows, length), which only a patch needs.

    Returns:
        what each patch achieved; nothing without one.

    Raises:
        BillhookError: no layer would be left, there is no such layer, or none of the cuts can be patched.
    """
    cuts = []
    if settings.patch != "none":
        check_patch(model, plan.layers)
        cuts = _patch(model, tokens, plan.layers, settings, run)
    drop_layers(model, plan.layers)
    return cuts


def check_patch(model: PreTrainedModel, gone: Collection[int] = ()) -> None:
    """Refuse a patch that nothing could carry."""
    if not all(axis.ends_layer for axis in axes(model, ("ffn",))):
        raise BillhookError(
            "the norms of this model follow the sums, so no FFN can stand in for a layer: use --patch none"
        )
    if gone and not layer_presets.layers_before(gone):
        raise BillhookError("nothing stands before layer 0 that could make up for it: use --patch none")


def _patch(model: PreTrainedModel, tokens: Tokens, gone: Collection[int], settings: Settings, run: Run) -> list[Cut]:
    """Refit what stands before each cut, from the input to the output; each sees what those before it have become."""
    route = Route("dense_target", only=layer_presets.layers_before(gone), dropped=gone, correction=settings.correction)
    return [
        _refit(model, axis, layer.fit[name], layer.held_out.get(name), settings.damping, run.clock)
        for layer in walk(model, tokens, ("ffn",), run, route)
        for axis in layer.axes
        for name in [axis.reader_module]
    ]


def _refit(
    model: PreTrainedModel, axis: Axis, fitted_on: ReaderSums, held: ReaderSums | None, damping: float, clock: Clock
) -> Cut:
    """V in W's place.  The held-out windows first judge a fit on the others, then join it."""
    seen = fitted_on if held is None else fitted_on + held
    reader, every = reader_weight(model, axis), torch.arange(len(seen.gram), device=seen.gram.device)
    W = reader.to(seen.gram.device)
    with clock("patch"):
        V, used = restoration.fitted(W, seen, every, damping)
    with clock("errors"):
        off = restoration.errors(W, V, every, fitted_on, held, lambda on: restoration.fitted(W, on, every, damping)[0])
    reader.copy_(V)
    return Cut(axis.layer, axis.kind, axis.units, 0, used, *off, 0.0)
