"""Model families as data: which parameters write and read each axis, and which config keys hold the sizes.

A family is one row of FAMILIES.  Sizes are read from tensors, never from the config, so that the axes of a model that
has been cut are found the same way.  docs/adding-a-family.md walks through a row.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction
from types import MappingProxyType
from typing import cast

import torch
from torch import nn
from transformers import PreTrainedModel

from billhook.axes import Axis, Slot, blocks
from billhook.errors import BillhookError
from billhook.modeling_per_layer import MODEL_TYPE, V_HEAD_DIM
from billhook.tensors import Index

KINDS = {
    "ffn": "FFN channels: gate and up rows with the down column",
    "heads": "query heads, the same number from every KV group",
    "groups": "whole KV groups: key and value head with their query heads",
    "value": "value channels (FASP's V/O): one V row with its O columns",
}


PER_LAYER_KEYS = ("layer_types",)  # config keys that hold one value a layer


@dataclass(frozen=True)
class Family:
    """Paths are relative to a decoder layer; `keys` says which config key holds which size."""

    layers: str  # path of the list of decoder layers
    up: tuple[str, ...]
    down: str
    q: str
    k: str
    v: str
    o: str
    keys: Mapping[str, str]  # size -> config key: width, heads, kv_heads, head_dim
    head_counters: Mapping[str, str] = field(default_factory=dict)  # module attribute -> heads | entries | per_group
    pre_norm_key: str = ""  # config key that says whether norms come before the FFN, where both exist
    fixed_heads: str = ""  # why the stock class cannot hold fewer heads, where it cannot
    stand_in: str = ""  # family whose stock class computes the same and takes sizes that this one's config refuses


GATED = Family(
    layers="model.layers",
    up=("mlp.gate_proj", "mlp.up_proj"),
    down="mlp.down_proj",
    q="self_attn.q_proj",
    k="self_attn.k_proj",
    v="self_attn.v_proj",
    o="self_attn.o_proj",
    keys=MappingProxyType(
        {
            "width": "intermediate_size",
            "heads": "num_attention_heads",
            "kv_heads": "num_key_value_heads",
            "head_dim": "head_dim",
        }
    ),
    head_counters=MappingProxyType({"self_attn.num_key_value_groups": "per_group"}),
)
OPT = Family(
    layers="model.decoder.layers",
    up=("fc1",),
    down="fc2",
    q="self_attn.q_proj",
    k="self_attn.k_proj",
    v="self_attn.v_proj",
    o="self_attn.out_proj",
    keys=MappingProxyType({"width": "ffn_dim", "heads": "num_attention_heads"}),
    head_counters=MappingProxyType({"self_attn.num_heads": "heads", "self_attn.embed_dim": "entries"}),
    pre_norm_key="do_layer_norm_before",
    fixed_heads="its stock class takes the head size from hidden_size / num_attention_heads",
)
FAMILIES: Mapping[str, Family] = MappingProxyType(
    {"llama": replace(GATED, stand_in="mistral"), "mistral": GATED, "qwen2": GATED, "qwen3": GATED, "opt": OPT}
)


def family_of(model_type: str | None) -> Family:
    """The row of a model type.

    Raises:
        BillhookError: there is none; the message lists the supported families.
    """
    stock = stock_type(model_type or "")
    if stock not in FAMILIES:
        raise BillhookError(
            f"model family {model_type!r} is not supported: billhook knows {', '.join(FAMILIES)} (docs/adding-a-family.md)"
        )
    return FAMILIES[stock]


def stock_type(model_type: str) -> str:
    """The stock family's model type, of a per-layer checkpoint too."""
    return model_type.removeprefix(MODEL_TYPE.format(""))


def layers(model: PreTrainedModel) -> nn.ModuleList:
    """The decoder layers, in order."""
    found = model.get_submodule(_row(model).layers)
    assert isinstance(found, nn.ModuleList)
    return found


def axes(model: PreTrainedModel, kinds: tuple[str, ...] = tuple(KINDS)) -> list[Axis]:
    """Every axis of the given kinds, layer by layer, attention before the FFN."""
    makers = {"heads": _heads, "groups": _groups, "value": _value, "ffn": _ffn}
    return [make(model, n) for n in range(len(layers(model))) for kind, make in makers.items() if kind in kinds]


ROLES = ("q", "k", "v", "o", "gate", "up", "down")


def linears(model: PreTrainedModel, layer: int) -> list[dict[str, str]]:
    """The linear modules of one layer: path by role, those that share an input together, in the order in which they compute."""
    row = _row(model)
    ffn = dict(zip(("gate", "up")[-len(row.up) :], row.up, strict=True))
    groups = [{"q": row.q, "k": row.k, "v": row.v}, {"o": row.o}, ffn, {"down": row.down}]
    for name in (name for one in groups for name in one.values()):
        _linear(model, layer, name)
    return [{role: _at(model, layer, name) for role, name in one.items()} for one in groups]


def sizes(model: PreTrainedModel, layer: int) -> dict[str, int]:
    """The sizes of one layer as its tensors have them, under the config's own keys.

    `v_head_dim` is there only where value heads are narrower than the others, which no stock config can say.
    """
    row, now = _row(model), attention(model, layer)
    found = {
        "width": _linear(model, layer, row.down).weight.shape[1],
        "heads": now.heads,
        "kv_heads": now.kv_heads,
        "head_dim": now.head_dim,
    }
    narrow = {V_HEAD_DIM: now.value_dim} if now.value_dim != now.head_dim else {}
    return {key: found[size] for size, key in row.keys.items()} | narrow


def attention_parts(model: PreTrainedModel, layer: int) -> tuple[nn.Module, nn.Linear]:
    """The attention module of one layer and its output projection."""
    row = _row(model)
    return model.get_submodule(_at(model, layer, row.q.rpartition(".")[0])), _linear(model, layer, row.o)


def _row(model: PreTrainedModel) -> Family:
    return family_of(getattr(model.config, "model_type", None))


def _at(model: PreTrainedModel, layer: int, name: str) -> str:
    return f"{_row(model).layers}.{layer}.{name}"


def _linear(model: PreTrainedModel, layer: int, name: str) -> nn.Linear:
    path = _at(model, layer, name)
    try:
        found = model.get_submodule(path)
    except AttributeError:
        found = None
    if not isinstance(found, nn.Linear):
        raise BillhookError(
            f"{path} is {type(found).__name__}, not a Linear: this checkpoint is not a stock {model.config.model_type}"
        )
    return found


@dataclass(frozen=True)
class Attention:
    """The sizes of one layer's attention."""

    head_dim: int
    heads: int
    kv_heads: int
    value_dim: int  # channels of one value head: head_dim unless some were cut

    @property
    def group(self) -> int:
        """Query heads that share one KV head."""
        return self.heads // self.kv_heads


def attention(model: PreTrainedModel, layer: int) -> Attention:
    """The attention sizes of one layer, from its tensors."""
    row = _row(model)
    head_dim = cast(int, attention_parts(model, layer)[0].head_dim)
    heads, kv_heads = (_linear(model, layer, name).out_features // head_dim for name in (row.q, row.k))
    return Attention(head_dim, heads, kv_heads, _linear(model, layer, row.v).out_features // kv_heads)


def _ffn(model: PreTrainedModel, layer: int) -> Axis:
    row = _row(model)
    index = blocks(_linear(model, layer, row.down).in_features)
    writers = [slot for name in row.up for slot in _rows(model, layer, name, index)]
    pre_norm = not row.pre_norm_key or bool(getattr(model.config, row.pre_norm_key))
    return Axis(layer, "ffn", tuple(writers), _read(model, layer, row.down, index), ends_layer=pre_norm)


def _heads(model: PreTrainedModel, layer: int) -> Axis:
    """One unit is one query head; each KV group gives up the same number."""
    row, now = _row(model), attention(model, layer)
    per_unit = {"heads": Fraction(1), "entries": Fraction(now.head_dim), "per_group": Fraction(1, now.kv_heads)}
    return Axis(
        layer,
        "heads",
        tuple(_rows(model, layer, row.q, blocks(now.heads, now.head_dim))),
        _read(model, layer, row.o, blocks(now.heads, now.value_dim)),
        _head_counters(model, layer, per_unit),
        blocks=now.kv_heads,
    )


def _groups(model: PreTrainedModel, layer: int) -> Axis:
    """One unit is a KV head with the query heads that share it: contiguous, as repeat_kv lays them out."""
    row, now = _row(model), attention(model, layer)
    writers = [
        *_rows(model, layer, row.q, blocks(now.kv_heads, now.group * now.head_dim)),
        *_rows(model, layer, row.k, blocks(now.kv_heads, now.head_dim)),
        *_rows(model, layer, row.v, blocks(now.kv_heads, now.value_dim)),
    ]
    per_unit = {"heads": Fraction(now.group), "entries": Fraction(now.group * now.head_dim)}
    return Axis(
        layer,
        "groups",
        tuple(writers),
        _read(model, layer, row.o, blocks(now.kv_heads, now.group * now.value_dim)),
        _head_counters(model, layer, per_unit),
    )


def _value(model: PreTrainedModel, layer: int) -> Axis:
    """One unit is a value channel: one V row with its O column in every query head of the group.

    Each KV head gives up the same number, so that heads stay equally wide.
    """
    row, now = _row(model), attention(model, layer)
    columns = torch.arange(now.heads * now.value_dim).view(now.kv_heads, now.group, now.value_dim)
    return Axis(
        layer,
        "value",
        tuple(_rows(model, layer, row.v, blocks(now.kv_heads * now.value_dim))),
        _read(model, layer, row.o, columns.transpose(1, 2).reshape(-1, now.group)),
        blocks=now.kv_heads,
    )


def _head_counters(
    model: PreTrainedModel, layer: int, per_unit: Mapping[str, Fraction]
) -> tuple[tuple[str, Fraction], ...]:
    counters = _row(model).head_counters.items()
    return tuple((_at(model, layer, path), per_unit[what]) for path, what in counters if what in per_unit)


def _rows(model: PreTrainedModel, layer: int, name: str, index: Index) -> list[Slot]:
    at = _at(model, layer, name)
    biased = _linear(model, layer, name).bias is not None
    return [Slot(f"{at}.weight", 0, index)] + [Slot(f"{at}.bias", 0, index)] * biased


def _read(model: PreTrainedModel, layer: int, name: str, index: Index) -> Slot:
    _linear(model, layer, name)
    return Slot(f"{_at(model, layer, name)}.weight", 1, index)
