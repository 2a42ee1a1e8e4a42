"""How sizes are written down: `uniform` is a stock config, `per_layer` one whose layers differ."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedModel

from billhook.errors import BillhookError
from billhook.models import modeling_per_layer as per_layer
from billhook.models.axes import refusal
from billhook.models.families import FFN_SIZES, attention, family_of, layers, sizes, stock_type, uncut_size

CODE = Path(per_layer.__file__)
AUTO = (AutoConfig, AutoModel, AutoModelForCausalLM)  # in the order of a row's classes


def register(model_type: str) -> None:
    """Have transformers' Auto classes load a per-layer checkpoint by our own copy of the code, never by what came with it."""
    if model_type != (stock := stock_type(model_type)):
        config, base, causal = per_layer.classes_of(stock)
        AutoConfig.register(model_type, config, exist_ok=True)
        AutoModel.register(config, base, exist_ok=True)
        AutoModelForCausalLM.register(config, causal, exist_ok=True)


def layer_sizes(model: PreTrainedModel) -> list[dict[str, int]]:
    """Every layer's sizes, under the config's own keys."""
    return [sizes(model, n) for n in range(len(layers(model)))]


def largest_sizes(model: PreTrainedModel) -> dict[str, int]:
    """The largest of every size that a stock config can say."""
    found = layer_sizes(model)
    said = dict.fromkeys(key for one in found for key in one if key not in per_layer.OWN_KEYS)
    return {key: max(one[key] for one in found if key in one) for key in said}


def stock_holder(model: PreTrainedModel, changes: Mapping[str, Any]) -> str:
    """The stock family that can hold the model with `changes` to its config: its own, one that stands in for it, or ''.

    LlamaConfig, for one, refuses hidden_size % heads != 0 since transformers 5.4; Mistral computes the same without.
    """
    own = stock_type(model.config.model_type)
    row, config = family_of(own), {**_plain(model.config.to_dict()), **changes}
    if any(key in changes for key in per_layer.OWN_KEYS):
        return ""
    if (
        "head_dim" not in row.keys
        and model.config.hidden_size != config[row.keys["heads"]] * attention(model, 0).head_dim
    ):
        return ""  # whose head size is hidden_size / heads
    biased = any(config.get(key) for key in ("attention_bias", "mlp_bias"))
    for family in (own, *([row.stand_in] if row.stand_in and not biased else [])):
        try:
            CONFIG_MAPPING[family].from_dict({**config, "model_type": family})
        except Exception:  # each transformers release raises its own validation errors
            continue
        return family
    return ""


def layout_of(model: PreTrainedModel) -> str:
    """The plainest layout that holds the model."""
    return "per_layer" if _why_not_uniform(model) else "uniform"


def _why_not_uniform(model: PreTrainedModel) -> str:
    first, *rest = layer_sizes(model)
    keys = family_of(model.config.model_type).keys
    ffn = {keys[size] for size in FFN_SIZES if size in keys}
    for n, other in enumerate(rest, start=1):
        # where some layers have experts, and others a plain FFN, these compare among themselves
        alike = {key: value for key, value in first.items() if key in other or key not in ffn}
        if alike != {key: value for key, value in other.items() if key in first or key not in ffn}:
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
    """Write the sizes that the tensors have into the config in memory: the `uniform` layout.

    Where another family's config must stand in, the one in memory keeps what it has: it would refuse to be saved.

    Raises:
        BillhookError: no stock config can say them.
    """
    if why := _why_not_uniform(model):
        raise BillhookError(f"{why}: use --layout per_layer")
    found = largest_sizes(model)
    if stock_holder(model, found) == stock_type(model.config.model_type):
        for key, value in found.items():
            setattr(model.config, key, value)


def config_json(model: PreTrainedModel, written: dict[str, Any]) -> dict[str, Any]:
    """What config.json must say for the tensors that the model has; `written` is what transformers wrote.

    Sizes that all layers share stand once; the others in `per_layer_config`, with the largest as the global value, and the
    modelling file is named.
    """
    found, stock = layer_sizes(model), stock_type(model.config.model_type)
    row = family_of(stock)
    largest = largest_sizes(model)
    config = _plain(written) | largest | {"num_hidden_layers": len(found)}
    if layout_of(model) == "uniform":
        holder = stock_holder(model, largest)
        swapped = {"sliding_window": None} if holder != stock else {}
        return config | swapped | {"model_type": holder, "architectures": [family_of(holder).classes[-1]]}
    differing = sorted({key for one in found for key, value in one.items() if largest.get(key) != value})
    return config | {
        "model_type": per_layer.MODEL_TYPE.format(stock),
        "architectures": [f"PerLayer{row.classes[-1]}"],
        "auto_map": auto_map(stock),
        "per_layer_config": {
            str(n): {key: one.get(key, uncut_size(model, n, key)) for key in differing} for n, one in enumerate(found)
        },
    }


def auto_map(stock: str) -> dict[str, str]:
    """Where transformers finds the classes of a per-layer model of a family."""
    classes = zip(AUTO, family_of(stock).classes, strict=True)
    return {auto.__name__: f"{CODE.stem}.PerLayer{own}" for auto, own in classes}


def write_code(to: Path) -> None:
    """Put the modelling file beside a checkpoint whose config names it."""
    shutil.copyfile(CODE, to / CODE.name)


def _plain(config: dict[str, Any]) -> dict[str, Any]:
    """Without what only a per-layer config has."""
    return {k: v for k, v in config.items() if k not in ("auto_map", "per_layer_config", *per_layer.OWN_KEYS)}
