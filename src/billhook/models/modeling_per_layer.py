"""Model families as data, and causal LMs whose layers differ in size.

This file travels with a checkpoint of such a model, and billhook itself loads by it.  config.json holds
`per_layer_config` (the schema of transformers 5.14): for each layer the values that differ from the global ones.  The
stock class is built at the global sizes, on the meta device when weights are loaded, and every layer's projections are
then replaced by ones of the layer's own size.  Needs transformers alone; use `trust_remote_code=True`.
"""

import copy
from collections import OrderedDict
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

MODEL_TYPE = "billhook_{}"  # of the stock family
V_HEAD_DIM = "v_head_dim"  # channels of each value head, where fewer than head_dim
FFN_DIM = "billhook_ffn_dim"  # FFN channels, where no config key of the family holds them
RANKS = "ranks"  # path in the layer -> rank, of linear modules that are two thin ones
UNEVEN_ATTENTION = ("eager", "sdpa", "flex_attention")  # which take values narrower than keys
CACHES = ("past_key_values", "cache")  # names of an attention's argument, before transformers 5.24 and since
PAIRS = "rotary_pairs"  # that stay of queries and keys, of each KV head; none: all
OWN_KEYS = (V_HEAD_DIM, FFN_DIM, RANKS, PAIRS)  # which no stock config can say


@dataclass(frozen=True)
class Refusal:
    """What a family cannot give up, and why."""

    kinds: tuple[str, ...]
    why: str
    key: str = ""  # config key that must be true for it
    uniform_only: bool = False  # in a stock checkpoint; layers of their own sizes can


ALL_HEADS = ("heads", "groups")
MULTI_HEAD = {"width": "intermediate_size", "heads": "num_attention_heads"}  # where every query head has its KV head
FUSED_VALUES = Refusal(("value",), "q, k and v are one matrix, in which value heads are as long as key heads")
ALIBI = "ALiBi gives every head a slope by its number, so that the rest would change with what goes"
DIVIDED = Refusal(
    ALL_HEADS, "its stock class takes the head size from hidden_size / num_attention_heads", uniform_only=True
)
MIXED = ("experts", "expert_ffn", "shared")  # kinds of axis that a mixture of experts has
JOINT_NORM = Refusal(
    ALL_HEADS, "it normalises queries and keys over all heads together, so that the rest would change with what goes"
)


@dataclass(frozen=True)
class Family:
    """One row.  Paths are relative to a decoder layer, but that of the layers."""

    classes: tuple[str, str, str]  # of transformers: config, model, causal LM
    layers: str = "model.layers"
    up: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")  # what writes the FFN channels
    stacked: bool = False  # whether the one matrix of `up` holds the gate's rows and then the up's
    down: str = "mlp.down_proj"
    attention: str = "self_attn"  # paths below are relative to it; '' where no axis is of it
    beside: tuple[str, ...] = ()  # modules of a layer that no axis is of, where `attention` is ''
    q: str = "q_proj"
    k: str = "k_proj"
    v: str = "v_proj"
    qkv: str = ""  # one matrix in place of the three
    by_group: bool = False  # its rows: KV group by KV group, each its queries, key, value; else all q, all k, all v
    o: str = "o_proj"
    sinks: str = ""  # parameter of the attention module with one number a query head
    experts: str = ""  # of a mixture of experts: their module, in the layers that have one in place of the FFN
    router: str = ""
    shared: str = ""  # the expert that every token goes to
    expert: tuple[str, ...] = ("gate_proj", "up_proj", "down_proj")  # linear modules of an expert, the reader last
    bare: bool = False  # whether some layers have neither an FFN nor experts
    bias: str = ""  # what the router adds where it chooses, one number an expert: its own, or a path within the layer
    head_dim: str = "head_dim"  # attribute of the attention module
    keys: dict[str, str] = field(  # size -> config key; a size without one cannot be cut in a stock checkpoint
        default_factory=lambda: {**MULTI_HEAD, "kv_heads": "num_key_value_heads", "head_dim": "head_dim"}
    )
    settled: dict[str, bool] = field(default_factory=dict)  # config keys that need this value for `keys` to hold
    counters: dict[str, str] = field(  # attribute of the attention module -> heads | kv_heads | entries | per_group
        default_factory=lambda: {"num_key_value_groups": "per_group"}
    )
    as_is: bool | tuple[str, object] = True  # whether the FFN's output is added as it is, or the key and value for it
    tuples: bool = False  # whether a layer returns its output in a tuple
    refusals: tuple[Refusal, ...] = ()
    by_layer: tuple[tuple[str, int], ...] = ()  # parameters with a part for each layer, and the dimension of the parts
    uneven: bool = False  # whether its stock config has `per_layer_config`: attention of several sizes, by layer
    expert_counters: tuple[str, ...] = ()  # attributes that hold the number of experts; none: the router's num_experts
    derived: bool = False  # whether the row was derived from a model, and so proved on it
    stand_in: str = ""  # family whose stock class computes the same and takes sizes that this one's config refuses

    @property
    def only_ffns(self) -> bool:
        """Whether its keys are of FFNs and experts alone, and its layers are of whatever kinds the config says."""
        return self.derived or not self.attention


def named(name: str) -> tuple[str, str, str]:
    return (f"{name}Config", f"{name}Model", f"{name}ForCausalLM")


NEOX = Family(
    named("GPTNeoX"),
    layers="gpt_neox.layers",
    up=("mlp.dense_h_to_4h",),
    down="mlp.dense_4h_to_h",
    attention="attention",
    qkv="query_key_value",
    by_group=True,
    o="dense",
    head_dim="head_size",
    keys=MULTI_HEAD,
    counters={},
    refusals=(FUSED_VALUES, DIVIDED),
)
FAMILIES: dict[str, Family] = {
    "llama": Family(named("Llama"), stand_in="mistral"),
    "mistral": Family(named("Mistral")),
    "qwen2": Family(named("Qwen2")),
    "qwen3": Family(named("Qwen3")),
    "gemma2": Family(named("Gemma2"), as_is=False),
    "gemma3_text": Family(("Gemma3TextConfig", "Gemma3TextModel", "Gemma3ForCausalLM"), as_is=False),
    "phi3": Family(
        named("Phi3"),
        up=("mlp.gate_up_proj",),
        stacked=True,
        qkv="qkv_proj",
        counters={
            "num_key_value_groups": "per_group",
            "num_key_value_heads": "kv_heads",
            "config.num_attention_heads": "heads",
        },
        refusals=(FUSED_VALUES,),
    ),
    "olmo2": Family(named("Olmo2"), as_is=False, refusals=(JOINT_NORM,)),
    "granite": Family(named("Granite"), as_is=("residual_multiplier", 1.0)),
    "smollm3": Family(named("SmolLM3")),
    "seed_oss": Family(named("SeedOss")),
    "opt": Family(
        named("OPT"),
        layers="model.decoder.layers",
        up=("fc1",),
        down="fc2",
        o="out_proj",
        keys={"width": "ffn_dim", "heads": "num_attention_heads"},
        counters={"num_heads": "heads", "embed_dim": "entries"},
        as_is=("do_layer_norm_before", True),
        refusals=(DIVIDED,),
    ),
    "gpt2": Family(
        ("GPT2Config", "GPT2Model", "GPT2LMHeadModel"),
        layers="transformer.h",
        up=("mlp.c_fc",),
        down="mlp.c_proj",
        attention="attn",
        qkv="c_attn",
        o="c_proj",
        keys={"width": "n_inner", "heads": "n_head"},
        counters={"num_heads": "heads", "split_size": "entries"},
        refusals=(
            FUSED_VALUES,
            DIVIDED,
            Refusal(("layers",), "it scales attention by the layer's number", "scale_attn_by_inverse_layer_idx"),
        ),
    ),
    "gpt_neox": NEOX,
    "falcon": replace(
        NEOX,
        classes=named("Falcon"),
        layers="transformer.h",
        attention="self_attention",
        head_dim="head_dim",
        keys={"width": "ffn_hidden_size", "heads": "num_attention_heads", "kv_heads": "num_kv_heads"},
        counters={"num_heads": "heads", "num_kv_heads": "kv_heads"},
        tuples=True,
        refusals=(FUSED_VALUES, DIVIDED, Refusal(ALL_HEADS, ALIBI, "alibi")),
    ),
    "bloom": replace(
        NEOX,
        classes=named("Bloom"),
        layers="transformer.h",
        attention="self_attention",
        head_dim="head_dim",
        keys={"width": FFN_DIM, "heads": "n_head"},
        tuples=True,
        refusals=(
            FUSED_VALUES,
            Refusal(ALL_HEADS, ALIBI),
            Refusal(("ffn",), "its config has no key for the FFN's width: always 4 x hidden_size", uniform_only=True),
        ),
    ),
}


class NarrowCache:
    """A KV cache that keeps of heads their channels alone; where none was kept before, they come back as they were."""

    def __init__(self, cache: Any, channels: int, at: Tensor) -> None:
        self.cache, self.channels, self.at = cache, channels, at

    def __getattr__(self, name: str) -> Any:
        return getattr(self.cache, name)

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        narrow = keys.gather(-1, self.at[:, None].expand(*keys.shape[:-1], -1)) if len(self.at) else keys
        found, kept = self.cache.update(narrow, values[..., : self.channels], *args, **kwargs)
        found = spread(found, self.at[:, None], keys.shape[-1]) if len(self.at) else found
        return found, values if kept.shape[-2] == values.shape[-2] else kept


def spread(narrow: Tensor, at: Tensor, channels: int) -> Tensor:
    """The channels of heads at their places among `channels`, the others zero."""
    return narrow.new_zeros(*narrow.shape[:-1], channels).scatter(-1, at.expand(narrow.shape), narrow)


@cache
def channels_of(pairs: tuple[tuple[int, ...], ...], head_dim: int, device: Any) -> Tensor:
    """Which channels of each KV head's keys these rotary pairs are, (KV heads, 2 x pairs)."""
    return torch.tensor([[*kept, *(pair + head_dim // 2 for pair in kept)] for kept in pairs], device=device)


class NarrowHeads:
    """Hooks that let stock attention run with heads of fewer channels than head_dim: exact, as if the rest were zeros.

    Value rows carry no position, so that kept channels may stand first; those of queries and keys stand where rotary
    positions turn them.  Zeros are left out of the cache, and of what enters the output projection.
    """

    def __init__(self, attention: Any, row: Family) -> None:
        self.attention, self.row = attention, row

    def heads(self) -> int:
        pairs, keys = self.attention.rotary_pairs, self.attention.get_submodule(self.row.k)
        return len(pairs) if pairs else keys.weight.shape[0] // self.attention.head_dim

    def at(self, device: Any) -> Tensor:
        return channels_of(self.attention.rotary_pairs, self.attention.head_dim, device)

    def place(self, module: nn.Linear, args: Any, output: Tensor) -> Tensor:
        if not len(at := self.at(output.device)):
            return output
        heads = output.unflatten(-1, (-1, at.shape[1]))
        places = at.repeat_interleave(heads.shape[-2] // len(at), 0)
        return spread(heads, places, self.attention.head_dim).flatten(-2)

    def fill(self, module: nn.Linear, args: Any, output: Tensor) -> Tensor:
        value = output.unflatten(-1, (self.heads(), -1))
        return nn.functional.pad(value, (0, self.attention.head_dim - value.shape[-1])).flatten(-2)

    def keep(self, module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        given = {name: kwargs[name] for name in CACHES if kwargs.get(name) is not None}
        if module.config._attn_implementation not in UNEVEN_ATTENTION:
            return args, kwargs
        values = module.get_submodule(self.row.v).weight
        channels, at = values.shape[0] // self.heads(), self.at(values.device)
        return args, {**kwargs, **{name: NarrowCache(cache, channels, at) for name, cache in given.items()}}

    def narrow(self, module: nn.Linear, args: tuple[Tensor, ...]) -> tuple[Tensor]:
        if args[0].shape[-1] == module.weight.shape[1]:  # values came out of the cache
            return (args[0],)
        heads = args[0].unflatten(-1, (-1, self.attention.head_dim))
        return (heads[..., : module.weight.shape[1] // heads.shape[-2]].flatten(-2),)


def narrow_heads(attention: Any, row: Family, pairs: tuple[tuple[int, ...], ...] = ()) -> None:
    """Register `NarrowHeads`, once, for rotary pairs that each KV head keeps; later hooks see what weights see."""
    if not hasattr(attention, PAIRS):
        hooks = NarrowHeads(attention, row)
        for name, hook in ((row.q, hooks.place), (row.k, hooks.place), (row.v, hooks.fill)):
            attention.get_submodule(name).register_forward_hook(hook)
        attention.register_forward_pre_hook(hooks.keep, with_kwargs=True)
        attention.get_submodule(row.o).register_forward_pre_hook(hooks.narrow)
    attention.rotary_pairs = pairs or getattr(attention, PAIRS, ())


class LowRank(nn.Sequential):
    """Two thin linear modules, `reduce` and `expand`, in the place of one: x becomes few numbers, those the output."""


def make_low_rank(layer: Any, ranks: dict[str, int] | None) -> None:
    """Replace linear modules of a layer, by path, by two thin ones each, whose numbers are still to come."""
    for path, rank in (ranks or {}).items():
        old = layer.get_submodule(path)
        (columns, rows), where = _ends(old), {"device": old.weight.device, "dtype": old.weight.dtype}
        thin = {"reduce": nn.Linear(columns, rank, bias=False, **where), "expand": nn.Linear(rank, rows, **where)}
        layer.set_submodule(path, LowRank(OrderedDict(thin)))


def holder_of(attention: Any, counter: str) -> tuple[Any, str]:
    """What holds a counter of an attention module, a config of its own where that does, and its name there."""
    above, _, leaf = counter.rpartition(".")
    if above and not getattr(attention, "own_config", False):
        attention.config, attention.own_config = copy.copy(attention.config), True
    return (attention.config if above else attention), leaf


def value_of(config: Any, layer: int, key: str) -> Any:
    """The value of `key` in one layer; before transformers 5.14 `per_layer_config` is a plain mapping."""
    per_layer = config.per_layer_config
    if isinstance(per_layer, dict):
        return per_layer.get(str(layer), {}).get(key, getattr(config, key, None))
    return getattr(per_layer[layer], key, None)


def _uniform(config: Any) -> Any:
    plain = copy.copy(config)
    plain.__dict__.pop("_heterogeneity_spec", None)
    plain.__dict__.pop("per_layer_config", None)
    return plain


def _resize(base: Any, config: Any, row: Family) -> None:
    built = base.config
    config._attn_implementation = built._attn_implementation  # chosen while the stock class was built
    for module in base.modules():  # rotary embeddings keep the plain one: they compute their frequencies from it
        if getattr(module, "config", None) is built and not hasattr(module, "inv_freq"):
            module.config = config
    keys = row.keys
    for n, layer in enumerate(base.get_submodule(row.layers.partition(".")[2])):
        attention = layer.get_submodule(row.attention)
        head_dim = getattr(attention, row.head_dim)
        width, heads = value_of(config, n, keys["width"]), value_of(config, n, keys["heads"])
        kv_heads = value_of(config, n, keys.get("kv_heads", keys["heads"]))
        value = value_of(config, n, V_HEAD_DIM) or head_dim
        pairs = tuple(map(tuple, value_of(config, n, PAIRS) or ()))
        key = 2 * len(pairs[0]) if pairs else head_dim
        for up in row.up:
            _linear(layer, up, rows=width * (1 + row.stacked) if width else None)
        _linear(layer, row.down, columns=width)
        if row.qkv:
            _linear(attention, row.qkv, rows=(heads + 2 * kv_heads) * head_dim)
        else:
            for name, rows in ((row.q, heads * key), (row.k, kv_heads * key), (row.v, kv_heads * value)):
                _linear(attention, name, rows=rows)
        _linear(attention, row.o, columns=heads * value)
        counts = {"heads": heads, "kv_heads": kv_heads, "entries": heads * head_dim, "per_group": heads // kv_heads}
        for counter, what in row.counters.items():
            if "." in counter:
                attention.config = built
            setattr(*holder_of(attention, counter), counts[what])
        if pairs or value != head_dim:
            narrow_heads(attention, row, pairs)
        make_low_rank(layer, value_of(config, n, RANKS))


def _linear(owner: Any, path: str, rows: int | None = None, columns: int | None = None) -> None:
    old = owner.get_submodule(path)
    there = _ends(old)
    shape = (columns or there[0], rows or there[1])
    if shape == there:
        return
    if isinstance(old, Conv1D):
        new = Conv1D(shape[1], shape[0]).to(old.weight.device, old.weight.dtype)
    else:
        new = type(old)(*shape, bias=old.bias is not None, device=old.weight.device, dtype=old.weight.dtype)
    owner.set_submodule(path, new)


def _ends(module: Any) -> tuple[int, ...]:
    """Inputs and outputs of a linear module; a Conv1D stores them in this order."""
    return tuple(module.weight.shape) if isinstance(module, Conv1D) else (module.in_features, module.out_features)


def _unchecked(config) -> None:
    """In place of a check that wants equal layers."""


@cache
def classes_of(family: str) -> tuple[type, type, type]:
    """Config, model and causal LM whose layers may differ, each made once."""
    row = FAMILIES[family]
    config_class, base_class, causal_class = (getattr(transformers, name) for name in row.classes)

    def build_base(self, config) -> None:  # vLLM 0.32 tests arguments by isinstance against their annotations
        base_class.__init__(self, _uniform(config))
        _resize(self, config, row)

    def build(self, config) -> None:
        causal_class.__init__(self, _uniform(config))
        _resize(getattr(self, self.base_model_prefix), config, row)
        self.config = config

    # stock classes check themselves as for equal layers, when they are made and when they are written
    own = {"model_type": MODEL_TYPE.format(family), "validate_architecture": _unchecked, "validate": _unchecked}
    config = type(config_class)(f"PerLayer{row.classes[0]}", (config_class,), {**own, "__module__": __name__})
    made = [config]
    for stock, init in ((base_class, build_base), (causal_class, build)):
        inside = {"config_class": config, "__init__": init, "__module__": __name__}
        made.append(type(stock)(f"PerLayer{stock.__name__}", (stock,), inside))
    return tuple(made)


def __getattr__(name: str) -> type:
    """PerLayerLlamaForCausalLM and its like, made when asked for: with its classes a family's code is imported."""
    for family, row in FAMILIES.items():
        if name in {f"PerLayer{stock}" for stock in row.classes}:
            return classes_of(family)[[f"PerLayer{stock}" for stock in row.classes].index(name)]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
