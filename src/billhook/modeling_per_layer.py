"""Causal LMs whose layers differ in size: this file travels with such a checkpoint, and billhook itself loads by it.

config.json holds `per_layer_config` (the schema of transformers 5.14): for each layer the values that differ from the
global ones.  The stock class is built at the global sizes, on the meta device when weights are loaded, and every layer's
projections are then replaced by ones of the layer's own size.  Needs transformers alone; use `trust_remote_code=True`.
"""

import copy
from typing import Any

import transformers
from torch import Tensor, nn

MODEL_TYPE = "billhook_{}"  # of the stock family
GATED = {
    "layers": "layers",
    "width": "intermediate_size",
    "up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": "mlp.down_proj",
    "o": "self_attn.o_proj",
    "kv_heads": "num_key_value_heads",
}
PLAIN = {
    "layers": "decoder.layers",
    "width": "ffn_dim",
    "up": ("fc1",),
    "down": "fc2",
    "o": "self_attn.out_proj",
    "kv_heads": "num_attention_heads",
}
FAMILIES = {
    "llama": ("Llama", GATED),
    "mistral": ("Mistral", GATED),
    "qwen2": ("Qwen2", GATED),
    "qwen3": ("Qwen3", GATED),
    "opt": ("OPT", PLAIN),
}
V_HEAD_DIM = "v_head_dim"  # channels of each value head, where fewer than head_dim


class NarrowValues:
    """Hooks that let stock attention run with value heads narrower than head_dim: exact, for the rest would be zeros.

    Value rows carry no position, so the kept channels of a head may stand first in it; zeros fill it up to head_dim
    before attention and are left out of what enters the output projection.
    """

    def __init__(self, attention: Any) -> None:
        self.attention = attention

    def fill(self, module: nn.Linear, args: Any, output: Tensor) -> Tensor:
        heads = self.attention.k_proj.weight.shape[0] // self.attention.head_dim
        value = output.unflatten(-1, (heads, -1))
        return nn.functional.pad(value, (0, self.attention.head_dim - value.shape[-1])).flatten(-2)

    def narrow(self, module: nn.Linear, args: tuple[Tensor, ...]) -> tuple[Tensor]:
        heads = args[0].unflatten(-1, (-1, self.attention.head_dim))
        return (heads[..., : module.weight.shape[1] // heads.shape[-2]].flatten(-2),)


def narrow_values(attention: Any, output: nn.Linear) -> None:
    """Register `NarrowValues` on an attention module, once; later hooks on `output` see what its weight sees."""
    if not getattr(attention, "narrow_values", False):
        hooks = NarrowValues(attention)
        attention.v_proj.register_forward_hook(hooks.fill)
        output.register_forward_pre_hook(hooks.narrow)
        attention.narrow_values = True


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


def _resize(base: Any, config: Any, names: dict[str, Any]) -> None:
    built = base.config
    config._attn_implementation = built._attn_implementation  # chosen while the stock class was built
    for module in base.modules():  # rotary embeddings keep the plain one: they compute their frequencies from it
        if getattr(module, "config", None) is built and not hasattr(module, "inv_freq"):
            module.config = config
    for n, layer in enumerate(base.get_submodule(names["layers"])):
        width, attention = value_of(config, n, names["width"]), layer.self_attn
        heads, kv_heads = value_of(config, n, "num_attention_heads"), value_of(config, n, names["kv_heads"])
        value = value_of(config, n, V_HEAD_DIM) or attention.head_dim
        for up in names["up"]:
            _linear(layer, up, rows=width)
        _linear(layer, names["down"], columns=width)
        _linear(attention, "q_proj", rows=heads * attention.head_dim)
        _linear(attention, "k_proj", rows=kv_heads * attention.head_dim)
        _linear(attention, "v_proj", rows=kv_heads * value)
        _linear(layer, names["o"], columns=heads * value)
        if hasattr(attention, "num_key_value_groups"):
            attention.num_key_value_groups = heads // kv_heads
        if hasattr(attention, "num_heads"):
            attention.num_heads, attention.embed_dim = heads, heads * attention.head_dim
        if value != attention.head_dim:
            narrow_values(attention, layer.get_submodule(names["o"]))


def _linear(owner: Any, path: str, rows: int | None = None, columns: int | None = None) -> None:
    old = owner.get_submodule(path)
    shape = (columns or old.in_features, rows or old.out_features)
    if shape != (old.in_features, old.out_features):
        new = nn.Linear(*shape, bias=old.bias is not None, device=old.weight.device, dtype=old.weight.dtype)
        owner.set_submodule(path, new)


def _no_check(self: Any) -> None:
    """Stands for the stock check, which reads one number of heads for all layers."""


def _classes(family: str, prefix: str, names: dict[str, Any]) -> dict[str, type]:
    stock = {part: getattr(transformers, prefix + part) for part in ("Config", "Model", "ForCausalLM")}
    own = {"model_type": MODEL_TYPE.format(family), "validate_architecture": _no_check}
    config_class = type("Config", (stock["Config"],), own)

    def build_base(self, config) -> None:  # vLLM 0.32 tests arguments by isinstance against their annotations
        stock["Model"].__init__(self, _uniform(config))
        _resize(self, config, names)

    def build(self, config) -> None:
        stock["ForCausalLM"].__init__(self, _uniform(config))
        _resize(self.model, config, names)
        self.config = config

    made = {"Config": config_class}
    for part, init in (("Model", build_base), ("ForCausalLM", build)):
        made[part] = type(part, (stock[part],), {"config_class": config_class, "__init__": init})
    for part, cls in made.items():
        cls.__name__ = cls.__qualname__ = f"PerLayer{prefix}{part}"
        cls.__module__ = __name__
    return made


for _family, (_prefix, _names) in FAMILIES.items():
    globals().update({cls.__name__: cls for cls in _classes(_family, _prefix, _names).values()})
