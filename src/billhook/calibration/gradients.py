"""Sums of weight times gradient for every unit of every axis: one backward pass for each window.

    sums = gradient_sums(model, tokens, kinds=("ffn", "groups"))
    scores = taylor.gate_fisher(sums[layer, "ffn"])

As soon as the backward pass has the gradient of a parameter, it is reduced to sums per unit and freed: no two
parameters' gradients are in memory at once.  Most memory is taken by one window's activations.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from billhook.calibration.forward import check_finite
from billhook.choices import KINDS
from billhook.errors import BillhookError, one_of
from billhook.math.taylor import GradientSums, UnitSums
from billhook.models.axes import Axis, Slot, axes, blocks
from billhook.models.families import layers, shape
from billhook.runtime.memory import free_bytes
from billhook.runtime.progress import Tick, quiet
from billhook.tensors import Tokens, float64_device, precise

WINDOW = 128  # tokens of a window for gradients: many short windows tell more than few long ones
CHUNK = {"cpu": 1 << 15}  # entries reduced at a time: they fit the cache, ten times as fast as whole weights
CHUNK_ELSEWHERE = 1 << 24  # entries reduced at a time on other devices
KEPT = 2  # float32 copies that a backward pass keeps of each projection's input and output, about
LOGITS = 3  # float32 copies the size of the logits: themselves, their softmax, their gradient
# (number of the window, parameter, its gradient, sums of S, |S| and S^2 by dimension, each (3, entries))
Take = Callable[[int, nn.Parameter, Tensor, Mapping[int, Tensor]], None]


def gradient_sums(
    model: PreTrainedModel,
    tokens: Tokens,
    kinds: tuple[str, ...],
    *,
    mean_gradient: bool = False,
    tick: Tick = quiet,
) -> dict[tuple[int, str], GradientSums]:
    """Sums over the windows for every axis of `kinds`, by (layer, kind).

    The loss of a window is its mean next-token cross-entropy, in float32.  Gradients have the model's dtype (float16
    underflows), products with the weights are float32, sums float64.  The model should be in eval mode; its parameters,
    `requires_grad` and gradients are left as they were.

    Args:
        tokens: calibration windows (windows, length).
        mean_gradient: also sum the gradient itself over the windows, for `taylor1_element`: a float32 copy of the
            weights that the axes touch.

    Raises:
        BillhookError: an unknown kind; no window of two tokens; a loss or a gradient is not finite (names the
            parameter).
    """
    for kind in kinds:
        one_of("kind of axis", kind, KINDS)
    sums: dict[tuple[int, str], GradientSums] = {}
    uses: dict[
        nn.Parameter, list[tuple[Slot, UnitSums]]
    ] = {}  # keys compare by identity: a tied parameter has one gradient
    for axis in axes(model, kinds):
        zeros = {slot: _zeros(model, axis, slot) for slot in axis.slots}
        for slot, unit_sums in zeros.items():
            uses.setdefault(model.get_parameter(slot.param), []).append((slot, unit_sums))
        writers = {slot.param: zeros[slot] for slot in axis.writers}
        sums[axis.layer, axis.kind] = GradientSums(len(tokens), writers, zeros[axis.reader])
    totals = {param: torch.zeros_like(param, dtype=torch.float32) for param in uses} if mean_gradient else {}

    def take(n: int, param: nn.Parameter, grad: Tensor, entries: Mapping[int, Tensor]) -> None:
        if mean_gradient:
            totals[param].add_(grad)
        for slot, unit_sums in uses[param]:
            _add(unit_sums, pooled(entries[slot.dim], slot))

    slots = [slot for pairs in uses.values() for slot, _ in pairs]
    each_window(model, tokens, slots, take, held=sum(4 * total.numel() for total in totals.values()), tick=tick)
    for param, total in totals.items():
        for slot, unit_sums in uses[param]:
            unit_sums.mean_absolute = pooled(_entries(param, total, slot.dim), slot)[1]
    return sums


def element_sums(model: PreTrainedModel, tokens: Tokens, names: Sequence[str], tick: Tick = quiet) -> list[float]:
    """sum |w * sum_n dL_n/dw| over the entries of each parameter of `names`, L_n the loss of window n as above.

    A float32 copy of those parameters is kept meanwhile; one that no window reaches, as an expert may be, has 0.

    Raises:
        BillhookError: as `gradient_sums`.
    """
    params = [model.get_parameter(name) for name in names]
    totals = {param: torch.zeros_like(param, dtype=torch.float32) for param in params}

    def take(n: int, param: nn.Parameter, grad: Tensor, entries: Mapping[int, Tensor]) -> None:
        totals[param].add_(grad)

    slots = [Slot(name, 0, blocks(len(param))) for name, param in zip(names, params, strict=True)]
    each_window(model, tokens, slots, take, held=sum(4 * total.numel() for total in totals.values()), tick=tick)
    return [_entries(param, totals[param], 0)[1].sum().item() for param in params]


def each_window(
    model: PreTrainedModel,
    tokens: Tokens,
    slots: Iterable[Slot],
    take: Take,
    *,
    held: int = 0,
    begin: Callable[[int], object] = int,
    tick: Tick = quiet,
) -> None:
    """One backward pass for each window: `take` is called once with the gradient of every parameter of `slots`.

    If memory is short, activations are computed again, layer by layer, in the backward pass.

    Args:
        held: bytes that the caller keeps of what `take` receives.
        begin: called with the number of each window before its pass.

    Raises:
        BillhookError: as `gradient_sums`, or there is too little memory.
    """
    if not tokens.shape[0] or tokens.shape[1] < 2:
        raise BillhookError(
            f"gradients need windows of two tokens or more: these are {' x '.join(map(str, tokens.shape))}"
        )
    dims: dict[nn.Parameter, set[int]] = {}
    for slot in slots:
        dims.setdefault(model.get_parameter(slot.param), set()).add(slot.dim)
    recompute = _short_of_memory(model, tokens.shape[1], held + 4 * max(param.numel() for param in dims))
    with (
        _by_layer(model) if recompute else nullcontext(),
        _reducing(model, dims, lambda *reduced: take(number, *reduced)),
    ):
        for number, window in enumerate(tokens):  # `take` gets the current number
            tick("gradients", number, len(tokens))
            begin(number)
            _loss(model, window, number).backward()
    tick("gradients", len(tokens), len(tokens))


def _short_of_memory(model: PreTrainedModel, length: int, held: int) -> bool:
    """Whether activations of a window do not fit and must be computed twice.

    Raises:
        BillhookError: they do not fit even then; says how much memory is needed.
    """
    inner = [[m for m in layer.modules() if isinstance(m, nn.Linear | Conv1D)] for layer in layers(model)]
    kept = [KEPT * 4 * length * sum(sum(shape(m)) for m in modules) for modules in inner]
    ends = 4 * length * (LOGITS * model.config.vocab_size + len(kept) * model.config.hidden_size)
    free, least = free_bytes(model.device), held + ends + max(kept, default=0)
    if least > free:
        raise BillhookError(
            f"gradients need about {least / 2**30:,.1f} GiB beside the model, and {free / 2**30:,.1f} GiB are free: "
            "use shorter windows, fewer --axes, or a score without gradients"
        )
    return held + ends + sum(kept) > free


@contextmanager
def _by_layer(model: PreTrainedModel) -> Iterator[None]:
    """While open, a decoder layer keeps only its input for the backward pass, and runs again there."""
    with ExitStack() as undo:
        for layer in layers(model):
            undo.callback(layer.__dict__.pop, "forward")
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
        yield


def _zeros(model: PreTrainedModel, axis: Axis, slot: Slot) -> UnitSums:
    where = float64_device(model.get_parameter(slot.param).device)
    return UnitSums(*torch.zeros(5, axis.units, dtype=torch.float64, device=where))


def _loss(model: PreTrainedModel, window: Tensor, number: int) -> Tensor:
    ids = window.to(next(model.parameters()).device)
    with torch.enable_grad():
        logits = model(ids.unsqueeze(0), use_cache=False).logits[0, :-1].float()
        loss = cross_entropy(logits, ids[1:])
    check_finite(f"the loss on calibration window {number}", loss)
    return loss


@contextmanager
def _reducing(
    model: PreTrainedModel, dims: Mapping[nn.Parameter, Collection[int]], take: Callable[..., None]
) -> Iterator[None]:
    """While open, a backward pass makes gradients of the parameters in `dims` alone, and reduces them at once."""
    with ExitStack() as undo:
        for name, param in model.named_parameters():
            undo.callback(_put_back, param, param.requires_grad, param.grad)
            param.grad = None
            param.requires_grad_(param in dims)
            if param in dims:
                reduce = _reducer(name, dims[param], take)
                undo.callback(param.register_post_accumulate_grad_hook(reduce).remove)
        yield


def _put_back(param: nn.Parameter, requires_grad: bool, grad: Tensor | None) -> None:
    param.requires_grad_(requires_grad)
    param.grad = grad


def _reducer(name: str, dims: Collection[int], take: Callable[..., None]) -> Callable[[Tensor], None]:
    @torch.no_grad()
    def reduce(param: Tensor) -> None:
        grad, param.grad = param.grad, None
        assert grad is not None
        entries = {dim: _entries(param, grad, dim) for dim in dims}
        check_finite(f"the gradient of {name}", *entries.values())
        take(param, grad, entries)

    return reduce


def _add(sums: UnitSums, window: Tensor) -> None:
    signed, absolute, squared = window
    sums.signed += signed
    sums.absolute += signed.abs()
    sums.squared += signed.square()
    sums.element_absolute += absolute
    sums.element_squared += squared


@torch.no_grad()
def _entries(weight: Tensor, grad: Tensor, dim: int) -> Tensor:
    """Sums of S, |S| and S^2, S = weight * grad, over every dimension but `dim`: (3, entries of dim), float64."""
    step = max(1, CHUNK.get(weight.device.type, CHUNK_ELSEWHERE) * weight.shape[dim] // weight.numel())
    parts = []
    for w, g in zip(weight.split(step, dim), grad.split(step, dim), strict=True):
        products = precise(w.float() * g.float()).movedim(dim, 0).reshape(w.shape[dim], -1)
        parts.append(torch.stack([products.sum(1), products.abs().sum(1), products.square().sum(1)]))
    return torch.cat(parts, 1)


def pooled(entries: Tensor, slot: Slot) -> Tensor:
    """Sums over the entries of a dimension (3, entries), added up for every unit: (3, units)."""
    return entries[:, slot.index.to(entries.device)].sum(2)
