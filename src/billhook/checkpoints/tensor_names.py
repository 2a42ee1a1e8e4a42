"""What the tensors of a model that stays in its files are called there.

On disk every expert of a mixture has tensors of its own, under names that differ by class, and other tensors may have other names
too (GPT-NeoX's head is embed_out).  transformers knows the rules, and is asked: what it would store is tried on small tensors that
can be told apart, and what it loads on the names alone.  A tensor that would be stored in any other way than as it is has no name here.
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

from billhook.models.experts import JOINED, Experts
from billhook.models.layout import layout_of

WEIGHT = (
    2,
    3,
)  # channels and inputs of what stands for one: it is neither turned nor split nor shuffled without being seen


def stored_as(model: Any) -> dict[str, str]:
    """Names on disk, by name in the model, of its parameters and of the buffers that are stored; experts are apart."""
    marked, joined = _joined(model)
    plain = {name: torch.empty(0) for name in model.state_dict().keys() - set(marked)}
    if layout_of(model) != "uniform":  # our own classes load no names but their own
        return {name: name for name in plain}
    names, own = {}, {id(one): name for name, one in plain.items()}
    for key, one in revert_weight_conversion(model, {**plain, **joined}).items():
        if id(one) in own:
            names[own[id(one)]] = key
        elif one.numel() == WEIGHT[0] * WEIGHT[1]:
            number = int(one.min()) // one.numel()
            if torch.equal(one, _mark(number, marked[number])):
                names[marked[number]] = key
    return names


def _joined(model: Any) -> tuple[list[str], dict[str, Tensor]]:
    """Names of all weights of experts, and what stands for them as the stock classes join them, each marked by its number."""
    marked, joined = list[str](), {}
    for path, module in model.named_modules():
        for name, parts in JOINED.items() if isinstance(module, Experts) else ():
            each = []
            for number in range(len(module)):
                own = [f"{path}.{number}.{part}.weight" for part in parts]
                each.append(torch.cat([_mark(len(marked) + n, one) for n, one in enumerate(own)]))
                marked += own
            joined[f"{path}.{name}"] = torch.stack(each)
    return marked, joined


def _mark(number: int, name: str) -> Tensor:
    """What stands for the weight `name` of an expert."""
    size = WEIGHT[0] * WEIGHT[1]
    return torch.arange(number * size, (number + 1) * size).view(WEIGHT[::-1] if "down_proj" in name else WEIGHT)


@dataclass(frozen=True)
class Loaded:
    """What transformers would do with stored tensors."""

    names: dict[str, str]  # by tensor of the model: the first stored one that it would load for it as it is
    merged: dict[str, str]  # by stored one that it would make part of a tensor: that tensor of the model
    rules: list[Any]  # of transformers, that were needed


def loaded_as(model: Any, stored: Iterable[str]) -> Loaded:
    """What transformers would load for each tensor of a stock model, of those called `stored`."""
    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    names, merged, own, prefix = dict[str, str](), dict[str, str](), model.state_dict(), model.base_model_prefix
    for key in sorted(stored, key=dot_natural_key):
        name, converted = rename_source_key(key, renamings, converters, prefix, own)
        if name not in own and key in own:  # which a rule would have renamed
            name, converted = key, None
        if name in own and converted is None:
            names.setdefault(name, key)
        elif name in own:
            merged[key] = name
    return Loaded(names, merged, [rule for rule in rules if rule.was_used()])
