"""The names that the tensors of a model have on disk.

On disk every expert of a mixture has tensors of its own, under names that differ by class, and other tensors may have
other names, too (GPT-NeoX's head is embed_out).  transformers knows the rules.  What it would store is found by saving
small tensors that can be told apart; what it would load, by the names alone.  A tensor that is not stored as it is has
no name here.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)

from billhook.models.experts import Experts, joined
from billhook.models.layout import layout_of

# channels and inputs of the small matrix that stands for a weight: unequal, so that transposing or splitting it shows
WEIGHT = (2, 3)


def stored_as(model: Any) -> dict[str, str]:
    """Names on disk, by name in the model, of parameters and of stored buffers; experts are listed one by one."""
    marked, together = _joined(model)
    plain = {name: torch.empty(0) for name in model.state_dict().keys() - set(marked)}
    if layout_of(model) != "uniform":  # billhook's own classes only load their own names
        return {name: name for name in plain}
    names, name_by_id = {}, {id(tensor): name for name, tensor in plain.items()}
    for key, tensor in revert_weight_conversion(model, {**plain, **together}).items():
        if id(tensor) in name_by_id:
            names[name_by_id[id(tensor)]] = key
        elif tensor.numel() == WEIGHT[0] * WEIGHT[1]:
            number = int(tensor.min()) // tensor.numel()
            if torch.equal(tensor, _mark(number, marked[number])):
                names[marked[number]] = key
    return names


def _joined(model: Any) -> tuple[list[str], dict[str, Tensor]]:
    """Names of all experts' weights, and small tensors, marked by number, joined as the stock classes join them."""
    marked, together = list[str](), {}
    for path, module in model.named_modules():
        for name, parts in joined(module.stock).items() if isinstance(module, Experts) else ():
            experts = []
            for number in range(len(module)):
                weights = [f"{path}.{number}.{part}.weight" for part in parts]
                experts.append(torch.cat([_mark(len(marked) + n, weight) for n, weight in enumerate(weights)]))
                marked += weights
            together[f"{path}.{name}"] = torch.stack(experts)
    return marked, together


def _mark(number: int, name: str) -> Tensor:
    """The small matrix that stands for the weight `name` of an expert."""
    size = WEIGHT[0] * WEIGHT[1]
    return torch.arange(number * size, (number + 1) * size).view(WEIGHT[::-1] if "down_proj" in name else WEIGHT)


@dataclass(frozen=True)
class Loaded:
    """What transformers would do with stored tensors."""

    names: dict[str, str]  # for each tensor of the model, the first stored one that is loaded for it as it is
    merged: dict[str, str]  # for each stored tensor that becomes part of another one, that tensor of the model
    rules: list[Any]  # transformers' rules that were needed


def loaded_as(model: Any, stored: Iterable[str]) -> Loaded:
    """Which of the tensors called `stored` transformers would load for each tensor of a stock model."""
    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    names, merged = dict[str, str](), dict[str, str]()
    state, prefix = model.state_dict(), model.base_model_prefix
    for key in sorted(stored, key=dot_natural_key):
        name, converted = rename_source_key(key, renamings, converters, prefix, state)
        if name not in state and key in state:  # a rule has renamed what has the right name already
            name, converted = key, None
        if name in state and converted is None:
            names.setdefault(name, key)
        elif name in state:
            merged[key] = name
    return Loaded(names, merged, [rule for rule in rules if rule.was_used()])
