"""Run a model layer by layer and keep sums of what enters its readers.

    for layer in walk(model, tokens, kinds=("ffn",), stream="dense"):
        G = layer.grams[axis.reader_module]     # for each axis of layer.axes
        ...                                     # edit the layer; in the sequential stream the next ones see the edit

Nothing is kept for all layers: one hidden state per token, the Grams of one layer.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from billhook.axes import Axis
from billhook.errors import BillhookError
from billhook.families import axes, layers
from billhook.progress import Clock, Tick, quiet
from billhook.tensors import Gram, Tokens

STREAMS = {
    "dense": "every layer sees the unpruned model's activations: one forward pass in all",
    "sequential": "every layer sees the activations that the pruned layers before it produce",
}
BATCH_TOKENS = 4096  # tokens in one forward: 25 MB of FFN activations at width 1536
GRAM_BLOCKS = 4  # block rows of the symmetric product; 4 cost 0.60 of the full one at width 1536, 8 no less


@dataclass(frozen=True)
class Layer:
    """One stop of the walk: its axes and, by reader module, the Grams of what enters them."""

    number: int
    axes: list[Axis]
    grams: dict[str, Gram]
    held_out: dict[str, Gram]


@torch.no_grad()
def walk(
    model: PreTrainedModel,
    tokens: Tokens,
    kinds: tuple[str, ...],
    *,
    stream: str = "dense",
    held_out: float = 0.1,
    clock: Clock | None = None,
    tick: Tick = quiet,
) -> Iterator[Layer]:
    """Yield every decoder layer with the Grams of its axes, each on the inputs that `stream` says.

    Args:
        tokens: calibration windows (windows, length).
        held_out: share of the windows, the last ones, whose Grams are kept apart.

    Raises:
        BillhookError: an activation is not finite; the message names the layer.
    """
    clock = clock or Clock()
    fit = len(tokens) - int(held_out * len(tokens))
    rows = max(1, BATCH_TOKENS // tokens.shape[1])
    batches = [(batch, False) for batch in tokens[:fit].split(rows)]
    batches += [(batch, True) for batch in tokens[fit:].split(rows) if len(batch)]
    by_layer = [[axis for axis in axes(model, kinds) if axis.layer == n] for n in range(len(layers(model)))]
    with clock("forward"):
        states, calls = _enter(model, [batch for batch, _ in batches])
    for n, module in enumerate(layers(model)):
        tick("statistics", n, len(by_layer))
        sums: tuple[dict[str, Gram], dict[str, Gram]] = ({}, {})
        for b, state in enumerate(states):
            with clock("forward"), _tapped(model, by_layer[n], sums[batches[b][1]], clock):
                after = _run(module, state, calls[b][n])
            if stream == "dense":
                states[b] = after
        with clock("gram"):
            grams, held = ({name: _finite(name, _mirrored(upper)) for name, upper in some.items()} for some in sums)
        yield Layer(n, by_layer[n], grams, held)
        if stream == "sequential":
            with clock("forward"):
                for b, state in enumerate(states):
                    states[b] = _run(module, state, calls[b][n])
    tick("statistics", len(by_layer), len(by_layer))


def gram_of(x: Tensor) -> Gram:
    """X^T X in float64 of x (tokens, in): float32 products of at most `2 * BATCH_TOKENS` rows, summed in float64."""
    return _mirrored(_add_upper(None, x))


def _add_upper(total: Gram | None, x: Tensor) -> Gram:
    """Add the upper block triangle of X^T X to `total`, in place."""
    x = x.flatten(0, -2).float()
    size = x.shape[1]
    if total is None:  # MPS has no float64
        total = torch.zeros(size, size, dtype=torch.float64, device="cpu" if x.device.type == "mps" else x.device)
    step = -(-size // GRAM_BLOCKS)
    for chunk in x.split(2 * BATCH_TOKENS):
        for i in range(0, size, step):
            total[i : i + step, i:] += (chunk[:, i : i + step].T @ chunk[:, i:]).to(total.device)
    return total


def _mirrored(upper: Gram) -> Gram:
    return upper.triu() + upper.triu(1).T


@contextmanager
def _tapped(model: PreTrainedModel, found: list[Axis], sums: dict[str, Gram], clock: Clock) -> Iterator[None]:
    """Add to `sums` what enters the reader of each axis, as upper Grams, while the context is open."""

    def tap(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def add(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            with clock("gram"):
                sums[name] = _add_upper(sums.get(name), args[0])

        return add

    with ExitStack() as hooks:
        for name in {axis.reader_module for axis in found}:
            hooks.callback(model.get_submodule(name).register_forward_pre_hook(tap(name)).remove)
        yield


def _finite(name: str, gram: Gram) -> Gram:
    if not gram.isfinite().all():
        raise BillhookError(f"what enters {name} is not finite: weights or dtype overflow; try --dtype float32")
    return gram


def _enter(model: PreTrainedModel, batches: list[Tokens]) -> tuple[list[Tensor], list[list[dict[str, Any]]]]:
    """Hidden states before the first layer, and for each batch what the model passes to each of its layers.

    The layers are replaced for one call by recorders that hand their input on, so the model itself makes the masks and
    positions: they may differ from layer to layer (sliding windows).  The head never runs.
    """
    device = next(model.parameters()).device
    states: list[Tensor] = []
    calls: list[list[dict[str, Any]]] = []

    def record(state: Tensor, **kwargs: Any) -> Tensor:
        if not calls[-1]:
            states.append(state)
        calls[-1].append(kwargs)
        return state

    with ExitStack() as undo:
        for module in layers(model):
            module.forward = record
            undo.callback(delattr, module, "forward")
        for batch in batches:
            calls.append([])
            model.base_model(batch.to(device), use_cache=False)
    return states, calls


def _run(module: nn.Module, state: Tensor, kwargs: dict[str, Any]) -> Tensor:
    out = module(state, **kwargs)
    return out[0] if isinstance(out, tuple) else out  # a tuple before transformers 5
