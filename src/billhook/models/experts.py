"""A mixture of experts as modules, each with linear weights of its own, and back as the stock class stores it.

transformers 5 keeps the experts of a layer in two 3-D parameters.  What works on linear modules (statistics, scores, masks,
adapters) wants them apart: `unfuse` when a model is opened, `fuse` before it is saved or handed out.  What is measured is the
stock class's own forward: `together` while it is.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from billhook.errors import BillhookError
from billhook.models.families import layers, mixture, row_of
from billhook.runtime.offload import is_offloaded

JOINED = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}  # of the stock class: what it joins


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
    """In place of the stock module, and called as it is: hidden states (tokens, hidden), the experts that each token
    goes to, and their weights (tokens, k).  Every expert runs, those that no token goes to on none."""

    stock: Any  # the module it stands for, without its weights

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        total = torch.zeros_like(hidden_states)
        for number, expert in enumerate(self):
            token, place = torch.where(top_k_index == number)
            weighted = expert(hidden_states[token]) * top_k_weights[token, place, None]
            total.index_add_(0, token, weighted.to(total.dtype))
        return total


def unfuse(model: PreTrainedModel) -> None:
    """Take the experts of every layer apart, in place; views of the stored weights.

    Raises:
        BillhookError: they are not stored as the stock classes do.
    """
    for n in range(len(layers(model))):
        stock: Any = mixture(model, n)
        if stock is None or isinstance(stock, Experts):
            continue
        if not all(isinstance(getattr(stock, name, None), nn.Parameter) for name in JOINED):
            raise BillhookError(
                f"layer {n}: its experts are not stored as gate_up_proj and down_proj: this checkpoint is not a stock "
                f"{model.config.model_type}"
            )
        parts = zip(stock.gate_up_proj, stock.down_proj, strict=True)
        apart = Experts(Expert(gate_up, down, stock.act_fn) for gate_up, down in parts)
        for name in JOINED:
            stock.register_parameter(name, None)
        vars(apart)["stock"] = stock  # no submodule: it has no weights
        layers(model)[n].set_submodule(row_of(model).experts, apart)


def fuse(model: PreTrainedModel) -> None:
    """Put the experts of every layer together again, in place, as many and as wide as they are now.

    Those of a model that stays in its files stay apart, as they are there (billhook.checkpoints.tensor_names).

    Raises:
        BillhookError: those of one layer differ in width, which no stock class can hold.
    """
    for n in range(len(layers(model))):
        if not isinstance(apart := mixture(model, n), Experts):
            continue
        stock, every = apart.stock, cast(list[Expert], list(apart))
        widths = {one.down_proj.in_features for one in every}
        if len(widths) > 1:
            raise BillhookError(f"layer {n}: its experts are {min(widths)} to {max(widths)} wide, and must be equal")
        if is_offloaded(model):
            continue
        joined = {
            "gate_up_proj": [torch.cat([one.gate_proj.weight, one.up_proj.weight]) for one in every],
            "down_proj": [one.down_proj.weight for one in every],
        }
        learns = every[0].down_proj.weight.requires_grad
        for name, weights in joined.items():
            setattr(stock, name, nn.Parameter(torch.stack([one.detach() for one in weights]), learns))
        stock.num_experts, stock.intermediate_dim = len(every), widths.pop()
        layers(model)[n].set_submodule(row_of(model).experts, stock)


@contextmanager
def fused(*models: Any) -> Iterator[None]:
    """While open the experts of models are together, as they are served; afterwards apart where they were.

    Those of a model that stays in its files stay apart.

    Raises:
        BillhookError: those of one layer differ in width.
    """
    mixed = [one for one in models if isinstance(one, PreTrainedModel) and not is_offloaded(one) and is_unfused(one)]
    for model in mixed:
        fuse(model)
    try:
        yield
    finally:
        for model in mixed:
            unfuse(model)


def is_unfused(model: PreTrainedModel) -> bool:
    """Whether a model has experts that were taken apart."""
    return any(isinstance(module, Experts) for module in model.modules())


def _linear(weight: Tensor) -> nn.Linear:
    made = nn.Linear(*weight.shape[::-1], bias=False, device="meta")
    made.weight = nn.Parameter(weight.detach(), weight.requires_grad)
    return made
