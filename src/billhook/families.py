"""Model families as data: which parameters write and read each axis, and which config keys hold the sizes.

A family is one row of FAMILIES.  Sizes are read from tensors, never from the config, so that the axes of a model that
has been cut are found the same way.  docs/adding-a-family.md walks through a row.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from types import MappingProxyType
from typing import cast

from torch import nn
from transformers import PreTrainedModel

from billhook.axes import Axis, Slot, blocks
from billhook.errors import BillhookError
from billhook.tensors import Index

KINDS = {
    "ffn": "FFN channels: gate and up rows with the down column",
    "heads": "query heads, the same number from every KV group",
    "groups": "whole KV groups: key and value head with their query heads",
    "value": "value channels (FASP's V/O): one V row with its O columns",
}


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


LLAMA = Family(
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
    keys=MappingProxyType({"width": "ffn_dim"}),
    head_counters=MappingProxyType({"self_attn.num_heads": "heads", "self_attn.embed_dim": "entries"}),
    pre_norm_key="do_layer_norm_before",
    fixed_heads="its stock class takes the head size from hidden_size / num_attention_heads",
)
FAMILIES: Mapping[str, Family] = MappingProxyType(
    {"llama": LLAMA, "mistral": LLAMA, "qwen2": LLAMA, "qwen3": LLAMA, "opt": OPT}
)


def family_of(model_type: str | None) -> Family:
    """The row of a model type.

    Raises:
        BillhookError: there is none; the message lists the supported families.
    """
    if model_type is None or model_type not in FAMILIES:
        raise BillhookError(
            f"model family {model_type!r} is not supported: billhook knows {', '.join(FAMILIES)} (docs/adding-a-family.md)"
        )
    return FAMILIES[model_type]


def layers(model: PreTrainedModel) -> nn.ModuleList:
    """The decoder layers, in order."""
    found = model.get_submodule(_row(model).layers)
    assert isinstance(found, nn.ModuleList)
    return found


def axes(model: PreTrainedModel, kinds: tuple[str, ...] = ("ffn", "heads", "groups")) -> list[Axis]:
    """Every axis of the given kinds, layer by layer, attention before the FFN."""
    makers = {"heads": _heads, "groups": _groups, "ffn": _ffn}
    return [make(model, n) for n in range(len(layers(model))) for kind, make in makers.items() if kind in kinds]


def sizes(model: PreTrainedModel, layer: int) -> dict[str, int]:
    """The sizes of one layer as its tensors have them, under the config's own keys."""
    row = _row(model)
    head_dim, heads, kv_heads = _attention(model, layer)
    found = {
        "width": _linear(model, layer, row.down).weight.shape[1],
        "heads": heads,
        "kv_heads": kv_heads,
        "head_dim": head_dim,
    }
    return {key: found[size] for size, key in row.keys.items()}


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


def _attention(model: PreTrainedModel, layer: int) -> tuple[int, int, int]:
    """(head size, query heads, KV heads) of one layer."""
    row = _row(model)
    head_dim = cast(int, model.get_submodule(_at(model, layer, row.q.rpartition(".")[0])).head_dim)
    return (
        head_dim,
        _linear(model, layer, row.q).out_features // head_dim,
        _linear(model, layer, row.k).out_features // head_dim,
    )


def _ffn(model: PreTrainedModel, layer: int) -> Axis:
    row = _row(model)
    index = blocks(_linear(model, layer, row.down).in_features)
    writers = [slot for name in row.up for slot in _rows(model, layer, name, index)]
    pre_norm = not row.pre_norm_key or bool(getattr(model.config, row.pre_norm_key))
    return Axis(layer, "ffn", tuple(writers), _read(model, layer, row.down, index), ends_layer=pre_norm)


def _heads(model: PreTrainedModel, layer: int) -> Axis:
    """One unit is one query head; each KV group gives up the same number."""
    row = _row(model)
    head_dim, heads, kv_heads = _attention(model, layer)
    index = blocks(heads, head_dim)
    return Axis(
        layer,
        "heads",
        tuple(_rows(model, layer, row.q, index)),
        _read(model, layer, row.o, index),
        _head_counters(
            model, layer, {"heads": Fraction(1), "entries": Fraction(head_dim), "per_group": Fraction(1, kv_heads)}
        ),
        blocks=kv_heads,
    )


def _groups(model: PreTrainedModel, layer: int) -> Axis:
    """One unit is a KV head with the query heads that share it: contiguous, as repeat_kv lays them out."""
    row = _row(model)
    head_dim, heads, kv_heads = _attention(model, layer)
    group = heads // kv_heads
    query, value = blocks(kv_heads, group * head_dim), blocks(kv_heads, head_dim)
    writers = [
        *_rows(model, layer, row.q, query),
        *_rows(model, layer, row.k, value),
        *_rows(model, layer, row.v, value),
    ]
    per_unit = {"heads": Fraction(group), "entries": Fraction(group * head_dim)}
    return Axis(
        layer, "groups", tuple(writers), _read(model, layer, row.o, query), _head_counters(model, layer, per_unit)
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
