"""The experts of a mixture as separate modules with linear weights, and fused again as the stock class stores them.

transformers 5 keeps the experts of a layer in two 3-D parameters.  Statistics, scores, masks and adapters work on
linear
modules: `unfuse` a model when it is opened, `fuse` it before it is saved or returned.  Measurements are of the stock
class's own forward: they run within `fused`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from billhook.errors import ModelError
from billhook.models.families import layers, mixture, row_of
from billhook.runtime.offload import is_offloaded

JOINED = {
    "gate_up_proj": ("gate_proj", "up_proj"),
    "down_proj": ("down_proj",),
}  # the stock class's parameters: which weights they join


class Expert(nn.Module):
    """One gated FFN."""

    def __init__(self, gate_up: Tensor, down: Tensor, activation: nn.Module) -> None:
        super().__init__()
        gate, up = gate_up.chunk(2)
        self.gate_proj, self.up_proj, self.down_proj = _linear(gate), _linear(up), _linear(down)
        self.act_fn = activation

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class Experts(nn.ModuleList):
    """Replaces the stock module, and has its arguments: hidden states (tokens, hidden), the experts that each token
    goes to, and their weights (tokens, k).  Every expert runs, even on no tokens."""

    stock: Any  # the module it replaces, without its weights

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        total = torch.zeros_like(hidden_states)
        for number, expert in enumerate(self):
            token, place = torch.where(top_k_index == number)
            weighted = expert(hidden_states[token]) * top_k_weights[token, place, None]
            total.index_add_(0, token, weighted.to(total.dtype))
        return total


def unfuse(model: PreTrainedModel) -> None:
    """Make a module of every expert, in place; their weights are views of the stored ones.

    Raises:
        BillhookError: the experts are not stored as the stock classes do.
    """
    for n in range(len(layers(model))):
        stock: Any = mixture(model, n)
        if stock is None or isinstance(stock, Experts):
            continue
        if not all(isinstance(getattr(stock, name, None), nn.Parameter) for name in JOINED):
            raise ModelError(
                f"layer {n}: its experts are not stored as gate_up_proj and down_proj: this checkpoint is not a stock "
                f"{model.config.model_type}"
            )
        parts = zip(stock.gate_up_proj, stock.down_proj, strict=True)
        experts = Experts(Expert(gate_up, down, stock.act_fn) for gate_up, down in parts)
        for name in JOINED:
            stock.register_parameter(name, None)
        vars(experts)["stock"] = stock  # not a submodule, since it has no weights
        layers(model)[n].set_submodule(row_of(model).experts, experts)


def fuse(model: PreTrainedModel) -> None:
    """Join the experts of every layer in the stock module, in place, in their number and width of now.

    An offloaded model stays unfused: so its files have the experts (billhook.checkpoints.tensor_names).

    Raises:
        BillhookError: the experts of one layer differ in width, which no stock class can hold.
    """
    for n in range(len(layers(model))):
        if not isinstance(unfused := mixture(model, n), Experts):
            continue
        stock, experts = unfused.stock, cast(list[Expert], list(unfused))
        widths = {expert.down_proj.in_features for expert in experts}
        if len(widths) > 1:
            raise ModelError(f"layer {n}: its experts are {min(widths)} to {max(widths)} wide, and must be equal")
        if is_offloaded(model):
            continue
        joined = {
            "gate_up_proj": [torch.cat([expert.gate_proj.weight, expert.up_proj.weight]) for expert in experts],
            "down_proj": [expert.down_proj.weight for expert in experts],
        }
        trained = experts[0].down_proj.weight.requires_grad
        for name, weights in joined.items():
            setattr(stock, name, nn.Parameter(torch.stack([expert.detach() for expert in weights]), trained))
        stock.num_experts, stock.intermediate_dim = len(experts), widths.pop()
        layers(model)[n].set_submodule(row_of(model).experts, stock)


@contextmanager
def fused(*models: Any) -> Iterator[None]:
    """While open the experts of these models are fused, as they are served; afterwards unfused again.

    Offloaded models stay unfused.

    Raises:
        BillhookError: the experts of one layer differ in width.
    """
    unfused = [
        candidate
        for candidate in models
        if isinstance(candidate, PreTrainedModel) and not is_offloaded(candidate) and is_unfused(candidate)
    ]
    for model in unfused:
        fuse(model)
    try:
        yield
    finally:
        for model in unfused:
            unfuse(model)


def is_unfused(model: PreTrainedModel) -> bool:
    """Whether a model has experts as separate modules."""
    return any(isinstance(module, Experts) for module in model.modules())


def _linear(weight: Tensor) -> nn.Linear:
    module = nn.Linear(*weight.shape[::-1], bias=False, device="meta")
    module.weight = nn.Parameter(weight.detach(), weight.requires_grad)
    return module
