"""Which parameters a recovery trains.

Frozen parameters cost no gradient and no optimiser state, and where the first trained layer is a late one the backward
pass ends there.
"""

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from billhook.errors import BillhookError
from billhook.math import loftq
from billhook.models.families import layers, mixture, narrow_heads
from billhook.tensors import Weight
from billhook.training.on_levels import PROJECTION

LAST = 3  # last layers that head+last3 trains, after "Reassessing Layer Pruning" (arXiv:2411.15558)
SCALE = 2  # factor of what adapters add, for any rank; SPP's multipliers use the same (arXiv:2405.16057, its code)


@dataclass(frozen=True)
class Seam:
    """Where layers were dropped."""

    kept: Sequence[int]  # the layers that stayed, as numbered before the cut
    total: int  # how many layers there were before the cut

    @property
    def beside(self) -> list[int]:
        """The layers on either side of each gap, as the cut model numbers them."""
        ends = [-1, *self.kept, self.total]  # with what is before the first layer and after the last
        gaps = [n for n in range(len(ends) - 1) if ends[n + 1] != ends[n] + 1]
        return sorted({n for gap in gaps for n in (gap - 1, gap) if 0 <= n < len(self.kept)})


def train_all(model: PreTrainedModel, cut: Seam | None, rank: int) -> PreTrainedModel:
    return model.requires_grad_(True)


def train_decoder(model: PreTrainedModel, cut: Seam | None, rank: int) -> PreTrainedModel:
    """All but embeddings and head, which learn noise about tokens that are seen once or twice (docs/LOG.md)."""
    model.requires_grad_(True)
    ends: list[Any] = [model.get_input_embeddings(), model.get_output_embeddings()]
    for end in ends:
        end.requires_grad_(False)
    return model


def train_adapters(model: PreTrainedModel, cut: Seam | None, rank: int) -> Any:
    """Low-rank adapters (LoRA, arXiv:2106.09685) on every linear weight of the layers; `merged` adds them to it."""
    if any(mixture(model, n) is not None for n in range(len(layers(model)))):
        return train_masked_adapters(model, cut, rank)  # peft expects the experts of these families in one tensor
    if narrow_heads(model):
        return train_masked_adapters(model, cut, rank)  # what fills heads would see a weight without peft's adapter
    try:
        import peft
    except ImportError as error:
        raise BillhookError("--trainable lora needs the extra: pip install 'billhook[lora]'") from error
    linear = {
        name.rpartition(".")[2]: isinstance(module, Conv1D)
        for layer in layers(model)
        for name, module in layer.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
    }
    config = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=rank,
        lora_alpha=SCALE * rank,
        target_modules=sorted(linear),
        fan_in_fan_out=any(linear.values()),
    )
    with warnings.catch_warnings():  # peft 0.21 asks for an attribute that transformers 5 has renamed
        warnings.simplefilter("ignore", FutureWarning)
        return peft.get_peft_model(model.requires_grad_(False), config)


@torch.no_grad()
def begin_at(model: Any, dense: PreTrainedModel) -> None:
    """Start adapters at what few bits took from the dense model (LoftQ).

    Args:
        model: of `train_adapters`.
        dense: the model before it had few bits, of the same shapes.
    """
    adapted = {name: module for name, module in model.base_model.model.named_modules() if hasattr(module, "lora_A")}
    for name, module in adapted.items():
        (A,), (B,) = module.lora_A.values(), module.lora_B.values()
        W, Q = dense.get_parameter(f"{name}.weight"), module.base_layer.weight
        first, second = loftq.factors(W, Q, len(A.weight), SCALE)
        A.weight.copy_(first)
        B.weight.copy_(second)


class MaskedAdapter(nn.Module):
    """A low-rank adapter that changes W only where it is not zero, also once merged; peft's fills every zero."""

    zeros: Tensor | None

    def __init__(self, weight: Weight, rank: int):
        super().__init__()
        rows, columns = weight.shape
        self.a = _drawn(rank, columns)
        self.b = nn.Parameter(torch.zeros(rows, rank))
        zeros = weight == 0  # taken from the student each time, since no checkpoint holds it
        self.register_buffer("zeros", zeros if zeros.any() else None, persistent=False)

    def forward(self, weight: Weight) -> Weight:
        update = SCALE * self.b @ self.a
        return weight + (update if self.zeros is None else update.masked_fill(self.zeros, 0))


class Multiplier(nn.Module):
    """W * (1 + s Rep(a) * b) of SPP (arXiv:2405.16057): zeros stay zero, whatever is learned.

    Rows of W are cut into `rank` blocks.  Each block has a row of `a`, one number a column, that all its rows share;
    `b` is one number a row, zero at first.
    """

    def __init__(self, weight: Weight, rank: int):
        super().__init__()
        rows, columns = weight.shape
        self.a = _drawn(min(rank, rows), columns)
        self.b = nn.Parameter(torch.zeros(rows, 1))

    def forward(self, weight: Weight) -> Weight:
        blocks, (rows, columns) = len(self.a), weight.shape
        height = math.ceil(rows / blocks)  # the last block has fewer rows where they do not divide
        repeated = self.a.unsqueeze(1).expand(blocks, height, columns).reshape(-1, columns)[:rows]
        return weight * (1 + SCALE * repeated * self.b)


def train_masked_adapters(model: PreTrainedModel, cut: Seam | None, rank: int) -> PreTrainedModel:
    """`lora` that keeps zeros."""
    return _parametrized(model, MaskedAdapter, rank)


def train_multipliers(model: PreTrainedModel, cut: Seam | None, rank: int) -> PreTrainedModel:
    """Multipliers of the rows and columns of every linear weight of the decoder layers."""
    return _parametrized(model, Multiplier, rank)


def _parametrized(model: PreTrainedModel, form: Callable[[Tensor, int], nn.Module], rank: int) -> PreTrainedModel:
    """Compute every linear weight of the decoder layers from the frozen one by a trained module of the kind `form`."""
    model.requires_grad_(False)
    for linear in _linears(model):
        parametrize.register_parametrization(linear, "weight", form(linear.weight, rank).to(linear.weight), unsafe=True)
    return model


def _linears(model: PreTrainedModel) -> list[nn.Linear | Conv1D]:
    return [module for layer in layers(model) for module in layer.modules() if isinstance(module, nn.Linear | Conv1D)]


def _drawn(rows: int, columns: int) -> nn.Parameter:
    """A matrix drawn as `nn.Linear` and LoRA's first factor are."""
    values = torch.empty(rows, columns)
    nn.init.kaiming_uniform_(values, a=math.sqrt(5))
    return nn.Parameter(values)


def train_end(model: PreTrainedModel, cut: Seam | None, rank: int) -> PreTrainedModel:
    """The last layers, the final norm and the head.

    Where the head is tied to the embedding, the shared weight learns only from its use as the head.  The input
    embeddings are detached, or the backward pass would run through every frozen layer for them.
    """
    model.requires_grad_(False)
    for layer in list(layers(model))[-LAST:]:
        layer.requires_grad_(True)
    inside = {id(param) for layer in layers(model) for param in layer.parameters()}
    embedding = model.get_input_embeddings()
    for param in model.parameters():
        if id(param) not in inside and param.ndim == 1:  # the final norm
            param.requires_grad_(True)
    head: Any = model.get_output_embeddings()
    head.requires_grad_(True)
    if head.weight is embedding.weight:
        embedding.register_forward_hook(_detached)
    return model


def train_seam(model: PreTrainedModel, cut: Seam | None, rank: int) -> PreTrainedModel:
    """The layers beside the cut, which had other neighbours before."""
    if cut is None or not cut.beside:
        raise BillhookError(
            "--trainable seam trains the layers beside dropped ones, and this model records none: use all"
        )
    model.requires_grad_(False)
    for n in cut.beside:
        layers(model)[n].requires_grad_(True)
    return model


TRAINERS: dict[str, Callable[[PreTrainedModel, Seam | None, int], Any]] = {
    "all": train_all,
    "decoder": train_decoder,
    "lora": train_adapters,
    "head+last3": train_end,
    "seam": train_seam,
    "spp": train_multipliers,
}
KEEPING_ZEROS = TRAINERS | {"lora": train_masked_adapters}  # for all others ZeroKeeper masks the steps


def merged(model: Any) -> PreTrainedModel:
    """The plain model: adapters, multipliers and levels become part of their weights, and hooks are removed."""
    if hasattr(model, "merge_and_unload"):
        model = model.merge_and_unload()
    for linear in _linears(model):
        if parametrize.is_parametrized(linear, "weight"):
            parametrize.remove_parametrizations(linear, "weight", leave_parametrized=True)
    model._modules.pop(PROJECTION, None)
    hooks = model.get_input_embeddings()._forward_hooks
    for key in [key for key, hook in hooks.items() if hook is _detached]:
        del hooks[key]
    return model.requires_grad_(False)


def trained(model: nn.Module) -> int:
    """How many parameters are trained."""
    return sum(param.numel() for param in model.parameters() if param.requires_grad)


def _detached(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> torch.Tensor:
    return output.detach()
