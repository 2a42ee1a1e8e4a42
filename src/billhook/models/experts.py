"""The experts of a mixture as separate modules with linear weights, and fused again as the stock class stores them.

transformers 5 keeps the experts of a layer in 3-D parameters: gates and ups together, and downs.  gpt-oss keeps them
transposed, gates and ups in turns, with biases; Nemotron-H has no gates.  Statistics, scores, masks and adapters work
on linear modules: `unfuse` a model when it is opened, `fuse` it before it is saved or returned.  Measurements are of
the stock class's own forward: they run within `fused`.
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

# the stock class's parameters: which weights they join, of experts with a gate and without
JOINED = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
UNGATED = {"up_proj": ("up_proj",), "down_proj": ("down_proj",)}


class Expert(nn.Module):
    """One FFN: expert `number` of a stock module, whose weights it shares as far as they are stored plainly."""

    stock: Any  # computes what is between the weights
    gate_proj: nn.Linear  # where experts have a gate
    up_proj: nn.Linear
    down_proj: nn.Linear

    def __init__(self, stock: Any, number: int) -> None:
        super().__init__()
        vars(self)["stock"] = stock  # not a submodule, since it has no weights
        weights, biases = _apart(stock, number), _apart(stock, number, "_bias")
        for (name, weight), bias in zip(weights.items(), biases.values(), strict=True):
            assert weight is not None
            self.add_module(name, _linear(weight, bias, stock.down_proj.requires_grad))

    def forward(self, x: Tensor) -> Tensor:
        if not _says(self.stock, "has_gate"):
            return self.down_proj(self.stock.act_fn(self.up_proj(x)))
        gate, up = self.gate_proj(x), self.up_proj(x)
        if _says(self.stock, "is_concatenated"):
            return self.down_proj(self.stock._apply_gate(torch.cat([gate, up], -1)))
        return self.down_proj(self.stock._apply_gate(_in_turns(gate.mT, up.mT).mT))


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
    """Make a module of every expert, in place; plainly stored weights become views of the stored ones.

    Raises:
        BillhookError: the experts are not stored as the stock classes do.
    """
    for n in range(len(layers(model))):
        stock: Any = mixture(model, n)
        if stock is None or isinstance(stock, Experts):
            continue
        if not all(isinstance(getattr(stock, name, None), nn.Parameter) for name in joined(stock)):
            raise ModelError(
                f"layer {n}: its experts are not stored as {' and '.join(joined(stock))}: this checkpoint is not a stock "
                f"{model.config.model_type}"
            )
        experts = Experts(Expert(stock, number) for number in range(len(stock.down_proj)))
        for name in [name for name, _ in stock.named_parameters()]:
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
        trained = experts[0].down_proj.weight.requires_grad
        for name in joined(stock):
            setattr(stock, name, nn.Parameter(_together(stock, experts, name, "weight"), trained))
            if _says(stock, "has_bias"):
                setattr(stock, f"{name}_bias", nn.Parameter(_together(stock, experts, name, "bias"), trained))
        stock.num_experts = len(experts)
        setattr(stock, "intermediate_dim" if hasattr(stock, "intermediate_dim") else "intermediate_size", widths.pop())
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


def joined(stock: Any) -> dict[str, tuple[str, ...]]:
    """The parameters of a stock module of experts: which weights they join."""
    return JOINED if _says(stock, "has_gate") else UNGATED


def _says(stock: Any, flag: str) -> bool:
    """What transformers' decorator of a class says of how it stores its experts; without one it is the plain way."""
    return getattr(stock, flag, flag in ("is_concatenated", "has_gate"))


def _apart(stock: Any, number: int, suffix: str = "") -> dict[str, Tensor | None]:
    """The weights (out, in) of one expert, or with the suffix `_bias` its biases (out), by the name of the module."""
    if suffix and not _says(stock, "has_bias"):
        return {name: None for names in joined(stock).values() for name in names}
    both, down = (getattr(stock, f"{name}{suffix}")[number].detach() for name in joined(stock))
    if not suffix and _says(stock, "is_transposed"):
        both, down = both.mT.contiguous(), down.mT.contiguous()
    if not _says(stock, "has_gate"):
        return {"up_proj": both, "down_proj": down}
    gate, up = both.chunk(2) if _says(stock, "is_concatenated") else (both[::2].contiguous(), both[1::2].contiguous())
    return {"gate_proj": gate, "up_proj": up, "down_proj": down}


def _together(stock: Any, experts: list[Expert], name: str, leaf: str) -> Tensor:
    """One 3-D parameter of the stock module, or the biases that go with it (experts, out)."""
    whole = []
    for expert in experts:
        parts = [getattr(expert.get_submodule(part), leaf).detach() for part in joined(stock)[name]]
        if len(parts) > 1 and not _says(stock, "is_concatenated"):
            parts = [_in_turns(*parts)]
        one = torch.cat(parts)
        whole.append(one.mT if leaf == "weight" and _says(stock, "is_transposed") else one)
    return torch.stack(whole)


def _in_turns(first: Tensor, second: Tensor) -> Tensor:
    """Rows of two tensors of one shape (rows, ...): one of the first, one of the second, and so on."""
    return torch.stack([first, second], 1).flatten(0, 1)


def _linear(weight: Tensor, bias: Tensor | None, trained: bool) -> nn.Linear:
    module = nn.Linear(*weight.shape[::-1], bias=bias is not None, device="meta")
    module.weight = nn.Parameter(weight, trained)
    if bias is not None:
        module.bias = nn.Parameter(bias, trained)
    return module
