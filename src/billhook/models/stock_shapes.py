"""Shapes that only the per_layer layout holds, made a stock class's again: any client loads them, and nothing is saved.

Two thin modules become their product, and narrower heads get channels of zeros.
"""

from copy import deepcopy
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from billhook.errors import ModelError
from billhook.models.families import attention, layers, linear, module_path, ranks, rotary_pairs, row_of, stock_type
from billhook.models.layout import plain
from billhook.models.modeling_per_layer import classes_of
from billhook.models.rotary import widen_keys
from billhook.tensors import precise

BIAS_KEYS = ("attention_bias", "attention_out_bias", "mlp_bias")  # config keys, in families whose modules may have one


@torch.no_grad()
def merge(model: PreTrainedModel) -> int:
    """Give every weight its stock shape, in place: equal logits to rounding.

    Returns:
        how many weights grew.

    Raises:
        BillhookError: all have such shapes.
    """
    numbers = range(len(layers(model))) if row_of(model).attention else ()
    thin = [module_path(model, n, path) for n in numbers for path in ranks(model, n)]
    values = [n for n in numbers if (sizes := attention(model, n)).value_dim < sizes.head_dim]
    keys = [n for n in numbers if rotary_pairs(model, n)]
    if not thin and not values and not keys:
        raise ModelError("all weights have the shapes of a stock class: leave out --merge")
    stock = _skeleton(model)
    for path in thin:
        model.set_submodule(path, _product(model.get_submodule(path), stock.get_submodule(path)))
    for n in values:
        _fill_values(model, n)
    for n in keys:
        widen_keys(model, n)
    return len(thin) + 2 * len(values + keys)


def _product(thin: Any, stock: Any) -> nn.Module:
    """Two thin modules as one, stored as `stock` is; it has a bias where that one has, or where theirs is not zero."""
    whole, (expand, reduce) = deepcopy(stock), (thin.expand, thin.reduce)
    W, learns = precise(expand.weight) @ precise(reduce.weight), expand.weight.requires_grad
    if isinstance(stock, Conv1D):
        W = W.T.contiguous()
        whole.nx, whole.nf = W.shape
    else:
        whole.out_features, whole.in_features = W.shape
    whole.weight = nn.Parameter(W.to(expand.weight), learns)
    biased = stock.bias is not None or bool(expand.bias.any())
    whole.bias = nn.Parameter(expand.bias.data, learns) if biased else None
    return whole


def _fill_values(model: PreTrainedModel, layer: int) -> None:
    """Channels of zeros in a layer's value heads, up to the length of its key heads."""
    row, sizes = row_of(model), attention(model, layer)
    more = sizes.head_dim - sizes.value_dim
    both: Any = [linear(model, module_path(model, layer, f"{row.attention}.{name}")) for name in (row.v, row.o)]
    v, o = both
    for param in v.parameters():
        param.data = _filled(param.data, sizes.value_dim, more)
    o.weight.data = _filled(o.weight.data.T, sizes.value_dim, more).T.contiguous()
    v.out_features, o.in_features = len(v.weight), o.weight.shape[1]


def _filled(rows: Tensor, each: int, more: int) -> Tensor:
    """Rows in blocks of `each`, with `more` rows of zeros after every block."""
    by_block = rows.unflatten(0, (-1, each))
    zeros = by_block.new_zeros(len(by_block), more, *rows.shape[1:])
    return torch.cat([by_block, zeros], 1).flatten(0, 1)


def settle_biases(model: PreTrainedModel) -> None:
    """Let the config say which linear modules have a bias, and give zeros to those that it names beside them.

    Raises:
        BillhookError: a module has a bias that no config of the family can say.
    """
    found = _biased(model)
    for key in BIAS_KEYS:
        if getattr(model.config, key, None) is False:
            lacking = found - _biased(_skeleton(model))
            setattr(model.config, key, True)
            if lacking <= found - _biased(_skeleton(model)):
                setattr(model.config, key, False)
    named = _biased(_skeleton(model))
    if lost := sorted(found - named):
        kind = stock_type(model.config.model_type)
        raise ModelError(f"{lost[0]} has a bias, and the stock class of {kind} has none there: keep the folder")
    for path in named - found:
        weight = linear(model, path).weight
        linear(model, path).bias = nn.Parameter(weight.new_zeros(len(weight)), weight.requires_grad)


def _biased(model: nn.Module) -> set[str]:
    """Paths of the linear modules that have a bias."""
    return {path for path, m in model.named_modules() if isinstance(m, nn.Linear) and m.bias is not None}


def _skeleton(model: PreTrainedModel) -> nn.Module:
    """The stock class at the config's own sizes, on the meta device."""
    stock = stock_type(model.config.model_type)
    config, _, _ = classes_of(stock)
    with torch.device("meta"):
        return getattr(transformers, row_of(model).classes[-1])(config.from_dict(plain(model.config.to_dict(), stock)))
