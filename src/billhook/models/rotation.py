"""Rotating the residual stream, which changes no output: what SliceGPT (arXiv:2401.15024) does before it cuts.

    norm(x) g W^T = (norm(x Q) Q^T) diag(g) W^T,  since norm(x) = x / sqrt(|x|^2/d + e) depends on no direction

so that each norm's weight g goes into the columns of what reads it, and Q into the embedding table (E Q), the writers
(Q^T W, Q^T b), the readers and the head (W Q).  The paper has a Q for every block and a product on the path around it,
which no stock class can hold: here one Q rotates the whole stream.  The last norm's weight goes into the head but not
into the embedding table, so a rotation unties them.
"""

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from billhook.errors import ModelError
from billhook.models.families import weight_of
from billhook.models.residual import (
    ELSE,
    ROWS,
    Flow,
    Residual,
    embedding_and_head,
    flow,
    gain,
    residual,
    set_gain,
    writes,
)
from billhook.runtime.offload import by_module
from billhook.tensors import Gram, precise


def check(model: PreTrainedModel) -> None:
    """Refuse a model whose residual stream cannot be rotated.

    Raises:
        BillhookError: a norm stands between a writer and the stream, or there is none before a reader.
    """
    places = residual(model)
    _check(model, places, flow(model, places))


def _check(model: PreTrainedModel, places: Residual, connections: Flow) -> None:
    kind, readers = model.config.model_type, [name for group in places.readers for name in group]
    if after := [name for name in places.norms if name not in connections.into.values()]:
        raise ModelError(
            f"{kind} cannot be rotated: {after[0]} stands between a writer and the residual stream, and its weight is "
            "of the channels as they are: use --no-rotate"
        )
    if bare := [name for name in readers if name not in connections.into]:
        raise ModelError(f"{kind} cannot be rotated: no norm that billhook knows feeds {bare[0]}; {ELSE}")


@torch.no_grad()
def fold(model: PreTrainedModel) -> None:
    """Multiply every norm's weight into its readers, in place; a tied head becomes a weight of its own.

    Raises:
        BillhookError: the stream cannot be rotated (see `check`).
    """
    places = residual(model)
    connections = flow(model, places)
    _check(model, places, connections)
    embedding, head = embedding_and_head(model)
    if places.tied:
        head.weight = nn.Parameter(embedding.weight.detach().clone(), embedding.weight.requires_grad)
        model.config.tie_word_embeddings = False
        vars(model)["all_tied_weights_keys"] = {}  # weights that transformers does not save
    norms = (name for names in by_module(model, places.norms, edits=False) for name in names)
    gains = {name: gain(model.get_submodule(name)) for name in norms}
    for name in (name for names in by_module(model, (*connections.into, *gains)) for name in names):
        if name in gains:
            set_gain(model.get_submodule(name), torch.ones_like(gains[name]))
            continue
        for rows in weight_of(model, name).split(ROWS):
            rows.copy_(precise(rows) * gains[connections.into[name]])


@torch.no_grad()
def rotate(model: PreTrainedModel, Q: Gram) -> None:
    """Rotate the residual stream of a folded model by the orthogonal Q (channels, channels),
    in place: x becomes x Q."""
    places = residual(model)
    written = {slot.param: slot.dim for slot in writes(model, places)}
    readers = [name for group in places.readers for name in group]
    for name in (name for names in by_module(model, (*written, *readers)) for name in names):
        _turn(
            model.get_parameter(name).data.movedim(written[name], -1) if name in written else weight_of(model, name), Q
        )


def _turn(weight: Tensor, Q: Gram) -> None:
    """Multiply every row by Q, in place."""
    for rows in weight.view(1, -1).split(ROWS) if weight.ndim == 1 else weight.split(ROWS):
        rows.copy_(precise(rows) @ Q)
