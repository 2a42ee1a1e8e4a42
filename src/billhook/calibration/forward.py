"""The parts of a forward pass: into the first layer, through the head, and how many tokens at a time."""

import inspect
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from billhook.errors import BillhookError
from billhook.models import patterns
from billhook.models.families import as_output, layers
from billhook.runtime.memory import return_freed
from billhook.tensors import Tokens

BATCH_TOKENS = 4096  # tokens in one forward: 25 MB of FFN activations at width 1536


@torch.no_grad()
def enter(
    model: PreTrainedModel, batches: list[Tensor], kept: Callable[[Tensor], Any] = lambda state: state
) -> tuple[list[Any], list[list[dict[str, Any]]]]:
    """Hidden states before the first layer, and for each batch what the model passes to each of its layers.

    While this runs the layers' forwards are replaced by recorders that return their input, so that the model itself
    makes masks and positions, which may differ from layer to layer (sliding windows).  The head never runs.

    Args:
        kept: what is done with a hidden state; its result is returned in the state's place.

    Raises:
        BillhookError: some of its layers take keys and values from earlier ones.
    """
    if patterns.shares(model.config):
        raise BillhookError(
            "layers of this model take keys and values from earlier ones, and billhook measures layers one by one: use "
            "--method layerchop, with --drop or a --preset by position (middle)"
        )
    states: list[Any] = []
    calls: list[list[dict[str, Any]]] = []

    def record(state: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not calls[-1]:
            states.append(kept(state))
        calls[-1].append(dict(zip(names, args, strict=False)) | kwargs)
        return as_output(model, state)

    names = list(inspect.signature(type(layers(model)[0]).forward).parameters)[2:]  # without self and the state
    with ExitStack() as undo:
        for module in layers(model):
            _replace(module, record, undo)
        for batch in batches:
            calls.append([])
            model.base_model(batch.to(model.device), use_cache=False)
    return_freed()
    return states, calls


@torch.no_grad()
def head(model: PreTrainedModel, tokens: Tokens, state: Tensor, keep: Tensor | int = 0) -> Tensor:
    """The logits of `state`, the output of the last layer for `tokens`; `keep` is transformers' `logits_to_keep`."""
    with ExitStack() as undo:
        for module in layers(model):
            _replace(module, lambda hidden_states, *_, **__: as_output(model, state), undo)
        return model(tokens, use_cache=False, logits_to_keep=keep).logits


def _replace(module: nn.Module, forward: Callable[..., Any], undo: ExitStack) -> None:
    """Give a layer another forward until `undo` is closed; then the one it had, which may not be its class's either."""
    before = vars(module).get("forward")
    if before is None:
        undo.callback(delattr, module, "forward")
    else:
        undo.callback(setattr, module, "forward", before)
    module.forward = forward


@torch.no_grad()
def run_layer(module: nn.Module, state: Tensor, kwargs: dict[str, Any]) -> Tensor:
    """The output of one decoder layer for hidden states, with the arguments that the model passes to it."""
    out = module(state, **kwargs)
    return out[0] if isinstance(out, tuple) else out


def check_finite(what: str, *values: Tensor | float | None) -> None:
    """Raise BillhookError if one of the values, which are of `what`, is infinite or not a number."""
    if not all(torch.as_tensor(value).isfinite().all() for value in values if value is not None):
        raise BillhookError(f"{what} is not finite: weights or dtype overflow; try --dtype float32")
