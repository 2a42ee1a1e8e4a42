"""Low-rank adapters that train beside gates, and become part of the weights or leave no trace."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import PreTrainedModel

from billhook.tensors import precise
from billhook.training.trainables import SCALE, MaskedAdapter, train_masked_adapters


@dataclass(frozen=True)
class Adapter:
    """A low-rank adapter, and the weight that it is of: W + SCALE b a."""

    module: MaskedAdapter
    weight: nn.Parameter  # W, frozen


@dataclass(frozen=True)
class Update:
    """What an adapter has learned to add to its weight, where that is not zero: SCALE b a."""

    a: Tensor
    b: Tensor


@contextmanager
def adapted(
    model: PreTrainedModel, rank: int, seed: int, begun: Mapping[str, Update] | None = None
) -> Iterator[dict[str, Adapter]]:
    """While open, every linear weight of the layers has an adapter, by the path of its module.

    Afterwards the model is as it was, to the bit.

    Args:
        begun: what they add at first, which others of the same rank have learned; None: 0.
    """
    asked = [(weight, weight.requires_grad) for weight in model.parameters()]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        train_masked_adapters(model, None, rank)
    found = {path: module for path, module in model.named_modules() if parametrize.is_parametrized(module, "weight")}
    for path, update in (begun or {}).items():
        form: Any = found[path].get_submodule("parametrizations.weight.0")
        form.a.data.copy_(update.a)
        form.b.data.copy_(update.b)
    try:
        yield {path: _adapter(module) for path, module in found.items()}
    finally:
        for module in found.values():
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=False)
        for weight, before in asked:
            weight.requires_grad_(before)


def _adapter(module: nn.Module) -> Adapter:
    forms: Any = module.get_submodule("parametrizations.weight")
    return Adapter(forms[0], forms.original)


def updates(adapters: Mapping[str, Adapter]) -> dict[str, Update]:
    """What adapters have learned, apart from the model."""
    found = {path: adapter.module for path, adapter in adapters.items()}
    return {path: Update(module.a.detach().clone(), module.b.detach().clone()) for path, module in found.items()}


@torch.no_grad()
def merge(model: PreTrainedModel, learned: Mapping[str, Update]) -> None:
    """Add what adapters have learned to the weights, in place."""
    for path, update in learned.items():
        weight = model.get_parameter(f"{path}.weight").data
        whole, change = precise(weight), SCALE * precise(update.b) @ precise(update.a)
        weight.copy_(whole + change.masked_fill(whole == 0, 0))
