"""How sizes are written down: `uniform` is a stock config, `per_layer` one whose layers differ."""

import json
import shutil
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedModel

from billhook.errors import ModelError
from billhook.models import modeling_per_layer as per_layer
from billhook.models.axes import refusal
from billhook.models.families import FFN_SIZES, attention, family_of, layers, sizes, stock_type, uncut_size
from billhook.models.multimodal import within

CODE = Path(per_layer.__file__)
AUTO = (AutoConfig, AutoModel, AutoModelForCausalLM)  # in the same order as a row's classes


def register(model_type: str) -> None:
    """Make transformers' Auto classes load a per-layer checkpoint by billhook's code, never by the code beside it."""
    if model_type != (stock := stock_type(model_type)):
        config, base, causal = per_layer.classes_of(stock)
        AutoConfig.register(model_type, config, exist_ok=True)
        AutoModel.register(config, base, exist_ok=True)
        AutoModelForCausalLM.register(config, causal, exist_ok=True)


def register_all() -> None:
    """The same for every family."""
    for stock in per_layer.FAMILIES:
        register(per_layer.MODEL_TYPE.format(stock))


def layer_sizes(model: PreTrainedModel) -> list[dict[str, Any]]:
    """Every layer's sizes, under the config's own keys."""
    return [sizes(model, n) for n in range(len(layers(model)))]


def largest_sizes(model: PreTrainedModel) -> dict[str, int]:
    """The largest value over layers of every size that a stock config can hold."""
    sizes_of_layers = layer_sizes(model)
    keys = dict.fromkeys(key for layer in sizes_of_layers for key in layer if key not in per_layer.OWN_KEYS)
    return {key: max(layer[key] for layer in sizes_of_layers if key in layer) for key in keys}


def stock_holder(model: PreTrainedModel, changes: Mapping[str, Any]) -> str:
    """The stock family that can hold the model with `changes` to its config: its own, its stand-in, or ''.

    For example, LlamaConfig refuses hidden_size % heads != 0 since transformers 5.4; Mistral computes the same and does
    not.
    """
    stock = stock_type(model.config.model_type)
    row, config = family_of(stock), {**plain(model.config.to_dict(), stock), **changes}
    if any(key in changes for key in per_layer.OWN_KEYS):
        return ""
    if (
        not row.only_ffns
        and "head_dim" not in row.keys
        and model.config.hidden_size != config[row.keys["heads"]] * attention(model, 0).head_dim
    ):
        return ""  # the family's head size is hidden_size / heads
    biased = any(config.get(key) for key in ("attention_bias", "mlp_bias"))
    alone = row.stand_in and not biased and within(model) is None
    families = (stock, *([row.stand_in] if alone else []))
    return next((family for family in families if takes(family, config)), "")


def takes(family: str, config: Mapping[str, Any]) -> bool:
    """Whether a family's config can be made of such values."""
    return _takes(family, json.dumps(config, sort_keys=True, default=str))


@lru_cache(maxsize=64)
def _takes(family: str, content: str) -> bool:
    try:
        CONFIG_MAPPING[family].from_dict({**json.loads(content), "model_type": family})
    except Exception:  # each transformers release raises its own validation errors
        return False
    return True


def layout_of(model: PreTrainedModel) -> str:
    """`uniform` if that can hold the model, else `per_layer`."""
    return "per_layer" if _why_not_uniform(model) else "uniform"


def _why_not_uniform(model: PreTrainedModel) -> str:
    first, *others = layer_sizes(model)
    if any(per_layer.RANKS in layer for layer in (first, *others)):
        return "some weights are two thin ones, which fits no stock config"
    if any(per_layer.PAIRS in layer for layer in (first, *others)):
        return "KV heads keep rotary pairs of their own, which fits no stock config"
    keys = family_of(model.config.model_type).keys
    ffn = {keys[size] for size in FFN_SIZES if size in keys}
    for n, other in enumerate(others, start=1):
        # layers with experts are compared with one another, and so are layers with a plain FFN
        common = {key: value for key, value in first.items() if key in other or key not in ffn}
        if common != {key: value for key, value in other.items() if key in first or key not in ffn}:
            return f"layer {n} has {other}, layer 0 has {first}, and the uniform layout needs equal layers"
        first = other | first
    if per_layer.V_HEAD_DIM in first:
        return "value heads are narrower than the others, which fits no stock config"
    if per_layer.FFN_DIM in first:
        return refusal(model, "ffn", "uniform")
    if not stock_holder(model, first):
        return f"no stock config takes {first}"
    return ""


def update_config(model: PreTrainedModel) -> None:
    """Write the tensors' sizes into the config in memory: the `uniform` layout.

    If another family's config has to stand in, the one in memory stays as it is: it would refuse these sizes.

    Raises:
        BillhookError: no stock config can hold the sizes.
    """
    if why := _why_not_uniform(model):
        raise ModelError(f"{why}: use --layout per_layer")
    largest = largest_sizes(model)
    if stock_holder(model, largest) == stock_type(model.config.model_type):
        for key, value in largest.items():
            setattr(model.config, key, value)


def config_json(model: PreTrainedModel, written: dict[str, Any]) -> dict[str, Any]:
    """The content of config.json for the model's tensors; `written` is what transformers wrote.

    Sizes that all layers share are global.  The others are in `per_layer_config`, with the largest as the global value,
    and `auto_map` names the modelling file.
    """
    sizes_of_layers, stock = layer_sizes(model), stock_type(model.config.model_type)
    row = family_of(stock)
    largest = largest_sizes(model)
    config = plain(written, stock) | largest | {"num_hidden_layers": len(sizes_of_layers)}
    if layout_of(model) == "uniform":
        holder = stock_holder(model, largest)
        swapped = {"sliding_window": None} if holder != stock else {}
        return config | swapped | {"model_type": holder, "architectures": [family_of(holder).classes[-1]]}
    differing = sorted({key for layer in sizes_of_layers for key, value in layer.items() if largest.get(key) != value})
    return config | {
        "model_type": per_layer.MODEL_TYPE.format(stock),
        "architectures": [f"PerLayer{row.classes[-1]}"],
        "auto_map": auto_map(stock),
        "per_layer_config": {
            str(n): {key: layer.get(key, uncut_size(model, n, key)) for key in differing}
            for n, layer in enumerate(sizes_of_layers)
        },
    }


def auto_map(stock: str) -> dict[str, str]:
    """The entry of config.json by which transformers finds the classes of a per-layer model."""
    classes = zip(AUTO, family_of(stock).classes, strict=True)
    return {auto.__name__: f"{CODE.stem}.PerLayer{own}" for auto, own in classes}


def write_code(to: Path) -> None:
    """Copy the modelling file into a checkpoint's folder."""
    shutil.copyfile(CODE, to / CODE.name)


def plain(config: dict[str, Any], stock: str) -> dict[str, Any]:
    """A config without the keys that only per-layer configs have; MLA's `v_head_dim` is a stock config's own."""
    foreign = [key for key in per_layer.OWN_KEYS if not hasattr(CONFIG_MAPPING[stock], key)]
    foreign += [] if family_of(stock).uneven else ["per_layer_config"]
    return {k: v for k, v in config.items() if k not in ("auto_map", *foreign)}
