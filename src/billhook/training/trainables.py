"""Which parameters a recovery trains.

Frozen parameters cost no gradient and no optimiser state, and where the first trained layer is a late one the backward pass
ends there.
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
from billhook.models.families import layers, mixture
from billhook.tensors import Weight

LAST = 3  # layers of head+last3, after "Reassessing Layer Pruning" (arXiv:2411.15558)
SCALE = 2  # of what adapters add, whatever their rank; SPP's multipliers bear the same (arXiv:2405.16057, its code)


@dataclass(frozen=True)
class Seam:
    """Where layers went: the numbers, before the cut, of those that stayed, and how many there were."""

    kept: Sequence[int]
    total: int

    @property
    def beside(self) -> list[int]:
        """The layers on either side of each gap, as the cut model numbers them."""
        ends = [-1, *self.kept, self.total]  # what stands before the first layer and after the last
        gaps = [n for n in range(len(ends) - 1) if ends[n + 1] != ends[n] + 1]
        return sorted({n for gap in gaps for n in (gap - 1, gap) if 0 <= n < len(self.kept)})


def train_all(model: PreTrainedModel, cut: Seam | None, rank: int) -> PreTrainedModel:
    return model.requires_grad_(True)


def train_decoder(model: PreTrainedModel, cut: Seam | None, rank: int) -> PreTrainedModel:
    """All but embeddings and head: of the tokens that a short training sees once or twice these learn noise (docs/LOG.md)."""
    model.requires_grad_(True)
    ends: list[Any] = [model.get_input_embeddings(), model.get_output_embeddings()]
    for end in ends:
        end.requires_grad_(False)
    return model


def train_adapters(model: PreTrainedModel, cut: Seam | None, rank: int) -> Any:
    """Low-rank adapters (LoRA, arXiv:2106.09685) on every linear weight of the decoder layers; `merged` takes them in."""
    if any(mixture(model, n) is not None for n in range(len(layers(model)))):
        return train_masked_adapters(model, cut, rank)  # peft takes the experts of these families to be one tensor
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


class MaskedAdapter(nn.Module):
    """A low-rank adapter that reaches only where W is not zero, in training as in what is merged; peft's fills every zero."""

    zeros: Tensor | None

    def __init__(self, weight: Weight, rank: int):
        super().__init__()
        rows, columns = weight.shape
        self.a = _drawn(rank, columns)
        self.b = nn.Parameter(torch.zeros(rows, rank))
        zeros = weight == 0  # of the student: no checkpoint holds it
        self.register_buffer("zeros", zeros if zeros.any() else None, persistent=False)

    def forward(self, weight: Weight) -> Weight:
        added = SCALE * self.b @ self.a
        return weight + (added if self.zeros is None else added.masked_fill(self.zeros, 0))


class Multiplier(nn.Module):
    """W * (1 + s Rep(a) * b) of SPP (arXiv:2405.16057): what is zero stays zero, whatever is learned.

    Rows of W are cut into `rank` blocks.  Each block has a row of `a`, one number a column, that all its rows share; `b` is
    one number a row, zero at first.
    """

    def __init__(self, weight: Weight, rank: int):
        super().__init__()
        rows, columns = weight.shape
        self.a = _drawn(min(rank, rows), columns)
        self.b = nn.Parameter(torch.zeros(rows, 1))

    def forward(self, weight: Weight) -> Weight:
        blocks, (rows, columns) = len(self.a), weight.shape
        height = math.ceil(rows / blocks)  # the last block is lower where they do not fit
        repeated = self.a.unsqueeze(1).expand(blocks, height, columns).reshape(-1, columns)[:rows]
        return weight * (1 + SCALE * repeated * self.b)


def train_masked_adapters(model: PreTrainedModel, cut: Seam | None, rank: int) -> PreTrainedModel:
    """`lora` where zeros are kept."""
    return _instead(model, MaskedAdapter, rank)


def train_multipliers(model: PreTrainedModel, cut: Seam | None, rank: int) -> PreTrainedModel:
    """Multipliers of the rows and columns of every linear weight of the decoder layers."""
    return _instead(model, Multiplier, rank)


def _instead(model: PreTrainedModel, form: Callable[[Tensor, int], nn.Module], rank: int) -> PreTrainedModel:
    """Have every linear weight of the decoder layers computed from the frozen one by a module that is trained."""
    model.requires_grad_(False)
    for linear in _linears(model):
        parametrize.register_parametrization(linear, "weight", form(linear.weight, rank).to(linear.weight), unsafe=True)
    return model


def _linears(model: PreTrainedModel) -> list[nn.Linear | Conv1D]:
    return [module for layer in layers(model) for module in layer.modules() if isinstance(module, nn.Linear | Conv1D)]


def _drawn(rows: int, columns: int) -> nn.Parameter:
    """As `nn.Linear`, and LoRA's first factor, begin."""
    values = torch.empty(rows, columns)
    nn.init.kaiming_uniform_(values, a=math.sqrt(5))
    return nn.Parameter(values)


def train_end(model: PreTrainedModel, cut: Seam | None, rank: int) -> PreTrainedModel:
    """The last layers, the final norm and the head.

    Where the head is tied to the embedding the shared weight learns from its use as the head alone: the embeddings that go
    in are detached, or the backward pass would run through every frozen layer for them.
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
    """The layers beside the cut: what has to meet there did not before."""
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
KEEPING_ZEROS = TRAINERS | {"lora": train_masked_adapters}  # the others have their steps masked


def merged(model: Any) -> PreTrainedModel:
    """The plain model: adapters and multipliers become part of the weights they sit on, hooks go."""
    if hasattr(model, "merge_and_unload"):
        model = model.merge_and_unload()
    for linear in _linears(model):
        if parametrize.is_parametrized(linear, "weight"):
            parametrize.remove_parametrizations(linear, "weight", leave_parametrized=True)
    hooks = model.get_input_embeddings()._forward_hooks
    for key in [key for key, hook in hooks.items() if hook is _detached]:
        del hooks[key]
    return model.requires_grad_(False)


def trained(model: nn.Module) -> int:
    """How many parameters are trained."""
    return sum(param.numel() for param in model.parameters() if param.requires_grad)


def _detached(module: nn.Module, given: tuple[Tensor, ...], found: Tensor) -> torch.Tensor:
    return found.detach()
