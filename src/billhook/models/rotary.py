"""Heads of fewer channels: pairs of query and key channels that rotary positions turn together.

Channels i and i + d/2 of query and key heads are pair i.  A stock class turns all heads of all layers alike, at
frequencies that `longrope` writes down one by one: with the same pairs left everywhere, and as many value channels, the
model is a stock one whose `head_dim` is smaller.  In the per_layer layout each KV head keeps its own.
"""

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from billhook.errors import ModelError
from billhook.models.families import attention, attention_module, layers, linear, module_path, rotary_pairs, row_of
from billhook.models.modeling_per_layer import narrow_heads
from billhook.tensors import Kept, RotaryPairs, precise

FIXED = ("default", "linear", "llama3", "yarn")  # kinds of rotary positions whose frequencies no text changes
LONG = "longrope"
OWN_SCALE = ("query_pre_attn_scalar", "attention_multiplier")  # config keys that scale scores, whatever the head's size


def why_not(model: PreTrainedModel) -> str:
    """Why pairs of queries and keys cannot go, or ''."""
    row, rope = row_of(model), getattr(model.config, "rope_parameters", None) or {}
    if row.qkv:
        return "q, k and v are one matrix"
    if "head_dim" not in row.keys:
        return "its head size is no key of its config"
    if any(hasattr(attention_module(model, 0), norm) for norm in ("q_norm", "k_norm")):
        return "it normalises queries and keys, so that the rest would change with what goes"
    if "rope_theta" not in rope:
        return "it has no rotary positions that all layers share"
    if any(rotary_pairs(model, n) for n in range(len(layers(model)))):
        return "some have gone already"
    kind, same = rope.get("rope_type", "default"), rope.get("short_factor") == rope.get("long_factor")
    if rope.get("partial_rotary_factor", 1.0) != 1.0 or not (kind in FIXED or (kind == LONG and same)):
        return f"its rotary positions ({kind}) turn a part of a head, or change with the length of a text"
    return ""


def gone(model: PreTrainedModel, layer: int, pairs: RotaryPairs) -> int:
    """Channels of keys that one layer loses, all KV heads together."""
    return sum(attention(model, layer).head_dim - 2 * len(kept) for kept in pairs)


def saved(model: PreTrainedModel, layer: int, pairs: RotaryPairs) -> int:
    """Parameters that one layer loses."""
    of_q, of_k = (sum(p.numel() for p in m.parameters()) // len(m.weight) for m in _projections(model, layer))
    return gone(model, layer, pairs) * (attention(model, layer).group * of_q + of_k)


@torch.no_grad()
def silence(model: PreTrainedModel, kept: Mapping[int, RotaryPairs]) -> None:
    """Set all other pairs of queries and keys to zero, in place: the logits of a model without them."""
    for n, pairs in kept.items():
        sizes = attention(model, n)
        for module, heads in zip(_projections(model, n), (sizes.heads, sizes.kv_heads), strict=True):
            rows = _rows(pairs, heads, sizes.head_dim)
            lost = torch.ones(heads * sizes.head_dim, dtype=torch.bool).index_fill_(0, rows, False)
            for param in module.parameters():
                param.data[lost.to(param.device)] = 0


@torch.no_grad()
def narrow_keys(model: PreTrainedModel, kept: Mapping[int, RotaryPairs]) -> None:
    """Leave these pairs to each KV head and its queries, in place, for the per_layer layout."""
    for n, pairs in kept.items():
        if gone(model, n, pairs):
            _take_rows(model, n, pairs)
            narrow_heads(attention_module(model, n), row_of(model), pairs)


@torch.no_grad()
def widen_keys(model: PreTrainedModel, layer: int) -> None:
    """Give one layer's queries and keys zeros for all pairs that have gone, in place."""
    pairs, sizes = rotary_pairs(model, layer), attention(model, layer)
    for projection, heads in zip(_projections(model, layer), (sizes.heads, sizes.kv_heads), strict=True):
        rows = _rows(pairs, heads, sizes.head_dim)
        for param in projection.parameters():
            whole = param.data.new_zeros(heads * sizes.head_dim, *param.shape[1:])
            param.data = whole.index_copy_(0, rows.to(param.device), param.data)
        projection.out_features = heads * sizes.head_dim
    cast(Any, attention_module(model, layer)).rotary_pairs = ()


@torch.no_grad()
def shrink_heads(model: PreTrainedModel, pairs: tuple[int, ...]) -> None:
    """Leave these pairs to all heads, in place: a stock model, whose `head_dim` is smaller.

    Raises:
        BillhookError: some layer's value heads have another length.
    """
    size = 2 * len(pairs)
    for n in range(len(layers(model))):
        if (values := attention(model, n).value_dim) != size:
            raise ModelError(f"layer {n} has value heads of {values} channels beside key heads of {size}")
    left = _frequencies(model)[list(pairs)]
    for n in range(len(layers(model))):
        _shrink(model, n, pairs)
    model.config.head_dim = size
    model.config.rope_parameters = _longrope(model, left)
    base: Any = model.base_model
    base.rotary_emb = type(base.rotary_emb)(model.config).to(model.device)


def _shrink(model: PreTrainedModel, layer: int, pairs: tuple[int, ...]) -> None:
    """One layer's queries and keys; queries make up for the scale of scores where that goes by the head's size."""
    sizes, module = attention(model, layer), cast(Any, attention_module(model, layer))
    size = 2 * len(pairs)
    _take_rows(model, layer, (pairs,) * sizes.kv_heads)
    if not any(hasattr(model.config, key) for key in OWN_SCALE):
        for param in _projections(model, layer)[0].parameters():
            param.data = (precise(param.data) * (size / sizes.head_dim) ** 0.5).to(param)
        module.scaling = size**-0.5
    module.head_dim = size


def _take_rows(model: PreTrainedModel, layer: int, pairs: RotaryPairs) -> None:
    """Leave the rows of these pairs to one layer's queries and keys."""
    sizes = attention(model, layer)
    for projection, heads in zip(_projections(model, layer), (sizes.heads, sizes.kv_heads), strict=True):
        rows = _rows(pairs, heads, sizes.head_dim)
        for param in projection.parameters():
            param.data = param.data[rows.to(param.device)]
        projection.out_features = len(rows)


def _projections(model: PreTrainedModel, layer: int) -> tuple[Any, Any]:
    row = row_of(model)
    q, k = (linear(model, module_path(model, layer, f"{row.attention}.{name}")) for name in (row.q, row.k))
    return q, k


def _rows(pairs: RotaryPairs, heads: int, size: int) -> Kept:
    """Rows of the channels of these pairs in a matrix of `heads` heads, as many for each KV head."""
    of_head = [[*kept, *(pair + size // 2 for pair in kept)] for kept in pairs for _ in range(heads // len(pairs))]
    return torch.tensor([head * size + channel for head, own in enumerate(of_head) for channel in own])


def _frequencies(model: PreTrainedModel) -> Tensor:
    """How far each pair turns from one position to the next, (head_dim / 2,), float64.

    They are computed anew, since a cast may have rounded the model's buffer.
    """
    rope, size = model.config.rope_parameters, attention(model, 0).head_dim
    if (kind := rope.get("rope_type", "default")) != "default":
        return ROPE_INIT_FUNCTIONS[kind](model.config, torch.device("cpu"))[0].double()
    return rope["rope_theta"] ** (-torch.arange(0, size, 2).double() / size)


def _longrope(model: PreTrainedModel, frequencies: Tensor) -> dict[str, Any]:
    """`rope_parameters` of these frequencies: what longrope divides the usual ones of so many pairs by."""
    theta, count = model.config.rope_parameters["rope_theta"], len(frequencies)
    factors = (theta ** (-torch.arange(count).double() / count) / frequencies).tolist()
    return {
        "rope_type": LONG,
        "rope_theta": theta,
        "short_factor": factors,
        "long_factor": factors,
        "factor": 1.0,
        "original_max_position_embeddings": model.config.max_position_embeddings,
        "attention_factor": float(cast(Any, model.base_model).rotary_emb.attention_scaling),
    }
