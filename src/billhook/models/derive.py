"""A family's row derived from a model itself: where its layers, FFNs and experts are, and which config keys size them.

Nothing here is believed: billhook.models.proof cuts a small random model by the row, and only what holds is offered.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from billhook.errors import ModelError
from billhook.models import places
from billhook.models.families import bias_path, shape
from billhook.models.modeling_per_layer import ALL_HEADS, MIXED, Family, Refusal
from billhook.models.shrink import TOP_K

LARGEST = 2**24  # parameters of a small model: its class has sizes that no known key shrinks, where it has more
BESIDE = "no FFN of gate, up and down is found beside its experts"
STEP = 8  # by how much a config key is changed to see which sizes follow


def built(config: PreTrainedConfig, device: str = "meta") -> PreTrainedModel:
    """A model of a config; on the meta device it has no weights."""
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)


def derived(config: PreTrainedConfig, fused: bool = True) -> Family:
    """The row of a small config's model type, not yet proved; without `fused`, experts are left as they are.

    Raises:
        BillhookError: its decoder layers cannot be found.
    """
    model = built(config)
    if (count := sum(p.numel() for p in model.parameters())) > LARGEST:
        raise ModelError(f"no small model of it can be made: the smallest found has {count:,} parameters")
    path, layers = places.decoder_layers(model, config.num_hidden_layers)
    names = (type(config).__name__, type(model.base_model).__name__, type(model).__name__)
    found, keys = of_attention(layers), mixture_keys(config)
    mixture = places.mixture(layers, config.hidden_size) if fused and "top_k" in keys else {}
    plain = [layer for layer in layers if not (mixture and places.has(layer, mixture["experts"]))]
    ffn = places.ffn(plain, config.hidden_size) if plain else None
    if ffn and (ffn.gated or not mixture):
        found |= {"up": ffn.up, "down": ffn.down, "stacked": ffn.stacked}
    elif not mixture:
        none = Refusal(("ffn", *MIXED), places.why_no_ffn(layers))
        found |= {"up": (), "down": "", "refusals": (*found["refusals"], none)}
    else:
        beside = (Refusal(("ffn",), BESIDE),) if plain else ()
        found |= {"up": (), "down": "", "refusals": (*found["refusals"], *beside)}
    return completed(Family(names, path, **found, **mixture, keys=keys if mixture else {}), config)


def of_attention(layers: nn.ModuleList) -> dict[str, Any]:
    """What every row that is not by hand says beside its FFNs: where a plain attention is, and that none is cut."""
    plain = all(places.is_plain_attention(layer) for layer in layers)
    why = "its attention is not derived from the model, only its FFNs and layers are"
    refusals = (Refusal((*ALL_HEADS, "value"), why),)
    said = {"counters": {}, "as_is": False, "derived": True, "refusals": refusals}
    return {"attention": "self_attn" if plain else "", **said}


def mixture_keys(config: PreTrainedConfig) -> dict[str, str]:
    """The config keys by which a router chooses: how many experts a token goes to, and of how many groups."""
    top = [key for key in TOP_K if isinstance(getattr(config, key, None), int)]
    keys = {"top_k": top[0]} if top else {}
    return keys | ({"groups": "n_group", "top_groups": "topk_group"} if getattr(config, "n_group", None) else {})


def completed(row: Family, config: PreTrainedConfig) -> Family:
    """The row with the config keys that say its sizes: a key is changed, and what follows is seen."""
    before, keys = _measured(row, built(config)), dict(row.keys)
    values = config.to_dict()
    for key, value in values.items():
        if type(value) is not int or value not in before.values() or key.endswith("token_id"):
            continue
        try:
            after = _measured(row, built(type(config).from_dict(values | {key: value + STEP})))
        except Exception:  # a class may refuse the value in any way
            continue
        moved = [size for size in before if after.get(size) != before[size]]
        if len(moved) == 1 and after[moved[0]] == before[moved[0]] + STEP:
            keys.setdefault(moved[0], key)
    kinds = {"width": "ffn", "experts": "experts", "expert_width": "expert_ffn", "shared_width": "shared"}
    missing = [
        Refusal((kinds[size],), "no key of its config says their number alone")
        for size in kinds
        if size in before and size not in keys
    ]
    return replace(row, keys=keys, refusals=(*row.refusals, *missing))


def _tensor(layer: nn.Module, path: str) -> torch.Tensor:
    above, _, leaf = path.rpartition(".")
    return getattr(layer.get_submodule(above), leaf)


def _measured(row: Family, model: PreTrainedModel) -> dict[str, int]:
    """The sizes of the FFNs of a model; and its others, under one name, so that a key which moves them is no key."""
    sizes: dict[str, int] = {}
    seen: set[int] = set()

    def take(size: str, parameter: torch.Tensor, value: int) -> None:
        sizes[size] = value
        seen.add(id(parameter))

    for layer in model.get_submodule(row.layers).children():
        if row.experts and places.has(layer, row.experts):
            experts: Any = layer.get_submodule(row.experts)
            take("experts", experts.down_proj, experts.down_proj.shape[0])
            if bias := bias_path(row):
                seen.add(id(_tensor(layer, bias)))
            sizes["expert_width"] = experts.down_proj.shape[-1]
            seen |= {id(p) for p in [*experts.parameters(), *layer.get_submodule(row.router).parameters()]}
            if row.shared and places.has(layer, row.shared):
                shared: Any = layer.get_submodule(row.shared)
                take("shared_width", shared.down_proj.weight, shared.down_proj.weight.shape[1])
                seen |= {id(p) for p in shared.parameters()}
        elif row.down:
            down: Any = layer.get_submodule(row.down)
            take("width", down.weight, shape(down)[1])
            seen |= {id(p) for name in row.up for p in layer.get_submodule(name).parameters()}
    sizes["others"] = sum(p.numel() for p in model.parameters() if id(p) not in seen)
    return sizes
