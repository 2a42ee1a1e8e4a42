"""Where the parts of a decoder are that a derived row names: its layers, their FFNs, experts and attention."""

from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from billhook.errors import ModelError
from billhook.models.experts import JOINED
from billhook.models.families import shape
from billhook.models.modeling_per_layer import Family

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


class Ffn(NamedTuple):
    """Paths of an FFN's linear modules within a layer, and how many channels it has."""

    up: tuple[str, ...]
    down: str
    stacked: bool
    width: int

    @property
    def gated(self) -> bool:
        """Whether a gate and an up matrix write it, each by itself."""
        return len(self.up) == 2


def decoder_layers(model: PreTrainedModel, count: int) -> tuple[str, nn.ModuleList]:
    """The largest list of so many modules, and its path.

    Raises:
        BillhookError: there is none.
    """
    lists = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count
    }
    if not lists:
        raise ModelError(f"no list of {count} decoder layers is found in it")
    name = max(lists, key=lambda name: sum(p.numel() for p in lists[name].parameters()))
    return name, lists[name]


def is_plain_attention(layer: nn.Module) -> bool:
    """Whether a layer's `self_attn` has q, k, v and o of sizes that its head size divides."""
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


def ffn(layers: list[nn.Module], hidden: int) -> Ffn | None:
    """The widest FFN that all of `layers` have at one place, in one module if there is such a one."""
    for find in (_within_a_module, _across_modules):
        found = [set(find(layer, hidden)) for layer in layers]
        if common := set.intersection(*found):
            widest = max(one.width for one in common)
            best = [one for one in common if one.width == widest]
            return best[0] if len(best) == 1 else None
    return None


def _within_a_module(layer: nn.Module, hidden: int) -> Iterator[Ffn]:
    """Of modules whose linear children are an FFN's and no others, and which have no parameters beside."""
    for path, module in layer.named_modules():
        if isinstance(module, nn.ModuleList) or path.rpartition(".")[2] == "experts" or [*module.parameters(False)]:
            continue
        at = f"{path}." if path else ""
        linears = {f"{at}{name}": shape(m) for name, m in module.named_children() if isinstance(m, nn.Linear | Conv1D)}
        yield from (one for one in _matching(linears, hidden) if len(linears) == len(one.up) + 1)


def _across_modules(layer: nn.Module, hidden: int) -> Iterator[Ffn]:
    """Of the whole layer: its writers and its reader are in modules of their own."""
    return _matching({path: shape(m) for path, m in layer.named_modules() if isinstance(m, nn.Linear | Conv1D)}, hidden)


def _matching(linears: dict[str, tuple[int, int]], hidden: int) -> Iterator[Ffn]:
    for down, (out, width) in linears.items():
        if out != hidden or width == hidden:
            continue
        up = [name for name, size in linears.items() if size == (width, hidden)]
        stacked = [name for name, size in linears.items() if size == (2 * width, hidden)]
        if len(up) in (1, 2) and not stacked:
            yield Ffn(tuple(sorted(up, key=lambda name: "gate" not in name)), down, False, width)
        elif len(stacked) == 1 and not up:
            yield Ffn((stacked[0],), down, True, width)


def why_no_ffn(layers: nn.ModuleList) -> str:
    """Why neither FFNs nor experts of the layers can be cut."""
    for layer in layers:
        for path, module in layer.named_modules():
            if any(param.ndim == 3 for param in module.parameters(False)) and "conv" not in path:
                return f"the experts at {path} are stored in a way of their own, which no row derived can cut"
    return "no FFN is found that all its layers have at one place"


def mixture(layers: nn.ModuleList, hidden: int) -> dict[str, Any]:
    """Where the experts of the layers are, and their router; {} unless they are stored as billhook can take apart."""
    for layer in layers:
        for path, module in layer.named_modules():
            if all(isinstance(getattr(module, name, None), nn.Parameter) for name in JOINED):
                return _of_experts(layer, path, module, hidden)
    return {}


def _of_experts(layer: nn.Module, path: str, experts: Any, hidden: int) -> dict[str, Any]:
    count, above = experts.down_proj.shape[0], path.rpartition(".")[0]
    if experts.down_proj.shape[1] != hidden:
        return {}
    parent, at = layer.get_submodule(above), f"{above}." if above else ""
    routers = [name for name, module in parent.named_modules() if name and _chooses(module, count)]
    named = [*parent.named_parameters(), *parent.named_buffers()]
    biases = [name for name, tensor in named if tensor.numel() == count == tensor.shape[-1]]
    if len(routers) != 1 or len(biases) > 1:
        return {}
    shared = [
        name
        for name, child in parent.named_children()
        if all(isinstance(getattr(child, leaf, None), nn.Linear) for leaf in Family.expert)
    ]
    holders = {above: parent, f"{at}{routers[0]}": parent.get_submodule(routers[0])}
    counters = [
        f"{place}.{leaf}"
        for place, holder in holders.items()
        for leaf, value in vars(holder).items()
        if value == count and type(value) is int and "expert" in leaf
    ]
    return {
        "experts": path,
        "router": f"{at}{routers[0]}",
        "shared": f"{at}{shared[0]}" if len(shared) == 1 else "",
        "bias": f"{at}{biases[0]}" if biases else "",
        "expert_counters": tuple(counters),
    }


def _chooses(module: nn.Module, experts: int) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, nn.Parameter) and weight.ndim == 2 and weight.shape[0] == experts
