"""A family's row derived from a model itself: where its layers, FFNs and experts are, and which config keys size them.

Nothing here is believed: billhook.models.proof cuts a small random model by the row, and only what holds is offered.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from billhook.errors import ModelError
from billhook.models.experts import JOINED
from billhook.models.families import shape
from billhook.models.modeling_per_layer import ALL_HEADS, MIXED, Family, Refusal

LARGEST = 2**24  # parameters of a small model: its class has sizes that no known key shrinks, where it has more
GATED = ("gate_proj", "up_proj", "down_proj")  # what billhook.models.experts calls an expert's matrices
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
TOP_K = (  # config keys that say how many experts each token goes to
    "num_experts_per_tok",
    "moe_topk",
    "moe_k",
    "moe_top_k",
    "top_k_experts",
    "num_experts_per_token",
)
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
    path, layers = _layers(model, config.num_hidden_layers)
    names = (type(config).__name__, type(model.base_model).__name__, type(model).__name__)
    places, keys = of_attention(layers), dict[str, str]()
    mixture = _mixture(layers, config.hidden_size) if fused else None
    dense = [layer for layer in layers if not (mixture and has(layer, mixture["experts"]))]
    ffn = _ffn(dense, config.hidden_size) if dense else None
    if mixture and dense and (ffn is None or tuple(name.rpartition(".")[2] for name in (*ffn[0], ffn[1])) != GATED):
        mixture = None
    if mixture is None and (ffn is None or len(dense) != len(layers)):
        none = Refusal(("ffn", *MIXED), _why_none(layers))
        places |= {"up": (), "down": "", "refusals": (*places["refusals"], none)}
    elif ffn:
        places |= {"up": ffn[0], "down": ffn[1], "stacked": ffn[2]}
    if mixture:
        places |= mixture
        keys |= mixture_keys(config)
    row = completed(Family(names, path, **places, keys=keys), config)
    return derived(config, fused=False) if mixture and "top_k" not in row.keys else row


def of_attention(layers: nn.ModuleList) -> dict[str, Any]:
    """What every row that is not by hand says beside its FFNs: where a plain attention is, and that none is cut."""
    plain = all(_plain_attention(layer) for layer in layers)
    why = "its attention is not derived from the model, only its FFNs and layers are"
    refusals = (Refusal((*ALL_HEADS, "value"), why),)
    said = {"counters": {}, "as_is": False, "derived": True, "refusals": refusals}
    return {"attention": "self_attn" if plain else "", **said}


def _layers(model: PreTrainedModel, count: int) -> tuple[str, nn.ModuleList]:
    lists = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count
    }
    if not lists:
        raise ModelError(f"no list of {count} decoder layers is found in it")
    name = max(lists, key=lambda name: sum(p.numel() for p in lists[name].parameters()))
    return name, lists[name]


def _plain_attention(layer: nn.Module) -> bool:
    module: Any = getattr(layer, "self_attn", None)
    parts = [getattr(module, name, None) for name in ATTENTION]
    if not all(isinstance(part, nn.Linear) for part in parts) or not isinstance(getattr(module, "head_dim", None), int):
        return False
    q, k, v, o = (part.weight.shape for part in parts)  # type: ignore[union-attr]
    return q[0] == o[1] and k[0] == v[0] and q[0] % k[0] == 0 == k[0] % module.head_dim


def has(layer: nn.Module, path: str) -> bool:
    """Whether a layer has a module at `path`."""
    try:
        layer.get_submodule(path)
    except AttributeError:
        return False
    return True


def _ffn(layers: list[nn.Module], hidden: int) -> tuple[tuple[str, ...], str, bool] | None:
    """Writers and reader of the FFN channels that all of `layers` have at one place, and if stacked."""
    found = [set(_ffns(layer, hidden)) for layer in layers]
    common = [ffn for ffn in _ffns(layers[0], hidden) if all(ffn in others for others in found)]
    return common[0] if len(common) == 1 else None


def _ffns(layer: nn.Module, hidden: int) -> Iterator[tuple[tuple[str, ...], str, bool]]:
    for path, module in layer.named_modules():
        if isinstance(module, nn.ModuleList) or path.rpartition(".")[2] == "experts":
            continue
        linears = {name: shape(m) for name, m in module.named_children() if isinstance(m, nn.Linear | Conv1D)}
        for down, (out, width) in linears.items():
            if out != hidden or width == hidden:
                continue
            at = f"{path}." if path else ""
            up = [f"{at}{name}" for name, size in linears.items() if size == (width, hidden)]
            stacked = [f"{at}{name}" for name, size in linears.items() if size == (2 * width, hidden)]
            if len(up) in (1, 2) and not stacked:
                yield tuple(sorted(up, key=lambda name: "gate" not in name)), f"{at}{down}", False
            elif len(stacked) == 1 and not up:
                yield (stacked[0],), f"{at}{down}", True


def _why_none(layers: nn.ModuleList) -> str:
    for layer in layers:
        for path, module in layer.named_modules():
            if any(param.ndim == 3 for param in module.parameters(False)) and "conv" not in path:
                return f"the experts at {path} are stored in a way of their own, which no row derived can cut"
    return "no FFN is found that all its layers have at one place"


def _mixture(layers: nn.ModuleList, hidden: int) -> dict[str, Any] | None:
    """Where the experts of the layers are, and their router; None unless they are stored as billhook can take apart."""
    for layer in layers:
        for path, module in layer.named_modules():
            if not all(isinstance(getattr(module, name, None), nn.Parameter) for name in JOINED):
                continue
            stock: Any = module
            experts, above = stock.down_proj.shape[0], path.rpartition(".")[0]
            if not hasattr(module, "act_fn") or stock.down_proj.shape[1] != hidden:
                return None
            parent = layer.get_submodule(above)
            routers = [
                (name, router)
                for name, router in parent.named_modules()
                if name and isinstance(weight := getattr(router, "weight", None), nn.Parameter)
                if weight.ndim == 2 and weight.shape[0] == experts
            ]
            if len(routers) != 1:
                return None
            name, router = routers[0]
            own = [*router.named_parameters(recurse=False), *router.named_buffers(recurse=False)]
            biases = [leaf for leaf, tensor in own if tuple(tensor.shape) == (experts,)]
            if len(biases) > 1:
                return None
            at = f"{above}." if above else ""
            shared = [
                child
                for child, inner in parent.named_children()
                if all(isinstance(getattr(inner, n, None), nn.Linear) for n in GATED)
            ]
            holders = {above: parent, f"{at}{name}": router, path: module}
            counters = [
                f"{place}.{leaf}"
                for place, holder in holders.items()
                for leaf, value in vars(holder).items()
                if value == experts and type(value) is int and "expert" in leaf and place != path
            ]
            return {
                "experts": path,
                "router": f"{at}{name}",
                "shared": f"{at}{shared[0]}" if len(shared) == 1 else "",
                "bias": biases[0] if biases else "",
                "expert_counters": tuple(counters),
            }
    return None


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


def _measured(row: Family, model: PreTrainedModel) -> dict[str, int]:
    """The sizes of the FFNs of a model; and its others, under one name, so that a key which moves them is no key."""
    sizes: dict[str, int] = {}
    seen: set[int] = set()

    def take(size: str, parameter: torch.Tensor, value: int) -> None:
        sizes[size] = value
        seen.add(id(parameter))

    for layer in model.get_submodule(row.layers).children():
        if row.experts and has(layer, row.experts):
            experts: Any = layer.get_submodule(row.experts)
            take("experts", experts.down_proj, experts.down_proj.shape[0])
            sizes["expert_width"] = experts.down_proj.shape[-1]
            seen |= {id(p) for p in [*experts.parameters(), *layer.get_submodule(row.router).parameters()]}
            if row.shared and has(layer, row.shared):
                shared: Any = layer.get_submodule(row.shared)
                take("shared_width", shared.down_proj.weight, shared.down_proj.weight.shape[1])
                seen |= {id(p) for p in shared.parameters()}
        elif row.down:
            down: Any = layer.get_submodule(row.down)
            take("width", down.weight, shape(down)[1])
            seen |= {id(p) for name in row.up for p in layer.get_submodule(name).parameters()}
    sizes["others"] = sum(p.numel() for p in model.parameters() if id(p) not in seen)
    return sizes
