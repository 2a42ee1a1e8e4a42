"""What a model's family says about it: its axes, its linear modules, its sizes, and what it cannot give up.

A family is one row of FAMILIES (billhook.modeling_per_layer, since the table travels with checkpoints).  Sizes are read from
tensors, never from the config, so that the axes of a model that has been cut are found the same way.
docs/adding-a-family.md walks through a row.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from billhook.axes import Axis, Slot, blocks
from billhook.errors import BillhookError
from billhook.modeling_per_layer import FAMILIES, FFN_DIM, MIXED, MODEL_TYPE, V_HEAD_DIM, Family, Refusal
from billhook.tensors import Index, Weight

KINDS = {
    "ffn": "FFN channels: gate and up rows with the down column",
    "heads": "query heads, the same number from every KV group",
    "groups": "whole KV groups: key and value head with their query heads",
    "value": "value channels (FASP's V/O): one V row with its O columns",
    "experts": "whole experts of a mixture, with their rows of the router",
    "expert_ffn": "FFN channels of every expert, each its own: gate and up rows with the down column",
    "shared": "FFN channels of the expert that every token goes to",
}
WIDTHS = ("ffn", "expert_ffn", "shared")  # kinds of axis whose units are channels
FFN_SIZES = ("width", "experts", "expert_width", "shared_width")  # what layers that mix experts have, or the others
PER_LAYER_KEYS = ("layer_types", "no_rope_layers")  # config keys that hold one value a layer
OLDER_TYPE = ("phi3", "olmo2")  # transformers 4 calls the kind of their scaling `type` alone
OLDER_ROTARY = {"gpt_neox": ("rotary_emb_base", "rotary_pct")}  # theta and turned share, in transformers 4
ROLES = ("q", "k", "v", "o", "gate", "up", "down")
FUSED = {"qkv": ("q", "k", "v"), "gate_up": ("gate", "up")}  # one matrix in some families: the roles that it has


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
    found = model.get_submodule(row_of(model).layers)
    assert isinstance(found, nn.ModuleList)
    return found


def as_output(model: PreTrainedModel, state: torch.Tensor) -> Any:
    """A hidden state in the form in which the family's layers return it."""
    return (state, None) if row_of(model).tuples else state


def axes(model: PreTrainedModel, kinds: tuple[str, ...] = tuple(KINDS)) -> list[Axis]:
    """Every axis of the given kinds that some layout could do with less of, layer by layer, attention before the FFN."""
    there = [kind for kind in kinds if not refusal(model, kind, "per_layer")]
    found = []
    for n in range(len(layers(model))):
        found += [make(model, n) for kind, make in ATTENTION.items() if kind in there]
        found += [_ffn(model, *one) for one in _ffns(model, n) if one[0] in there]
        found += [_experts(model, n)] if "experts" in there and mixture(model, n) is not None else []
    return found


def refusal(model: PreTrainedModel, kind: str, layout: str) -> str:
    """Why the model cannot give up a kind of axis (or `layers`) in a layout, or ''."""
    row = row_of(model)
    if kind in MIXED and not row.experts:
        return "it is dense, and that is of mixtures of experts"
    if kind == "shared" and not row.shared:
        return "it has no expert that every token goes to"
    if kind == "ffn" and all(mixture(model, n) is not None for n in range(len(layers(model)))):
        return "all its FFNs are mixtures of experts, whose axes are experts and expert_ffn"
    for one in row.refusals:
        if kind in one.kinds and (layout == "uniform" or not one.uniform_only) and _holds(model, one):
            return one.why
    return ""


def _holds(model: PreTrainedModel, one: Refusal) -> bool:
    return not one.key or bool(getattr(model.config, one.key, False))


def linears(model: PreTrainedModel, layer: int) -> list[dict[str, str]]:
    """The linear modules of one layer: path by role, those that share an input together, in the order in which they compute.

    One matrix that does the work of several has one of the roles FUSED.
    """
    row, ffns = row_of(model), [one[1:] for one in _ffns(model, layer)]
    attention: dict[str, str] = {"qkv": row.qkv} if row.qkv else {"q": row.q, "k": row.k, "v": row.v}
    groups: list[dict[str, str]] = [
        {role: _at(model, layer, f"{row.attention}.{name}") for role, name in one.items()}
        for one in (attention, {"o": row.o})
    ]
    roles: tuple[str, ...] = ("gate_up",) if row.stacked else ("gate", "up")[-len(row.up) :]
    groups += [{role: path for role, path in zip(roles, up, strict=True)} for up, _ in ffns]
    groups += [{"down": down} for _, down in ffns]
    for path in (path for one in groups for path in one.values()):
        linear(model, path)
    return groups


def wanted(role: str, roles: Sequence[str]) -> bool:
    """Whether a linear module of `role` is meant by the roles asked for: one that has several, by all of them."""
    return all(part in roles for part in FUSED.get(role, (role,)))


def sizes(model: PreTrainedModel, layer: int) -> dict[str, int]:
    """The sizes of one layer as its tensors have them, under the config's own keys.

    What no stock config can say is there only where it differs from what the family always has.
    """
    row, now = row_of(model), attention(model, layer)
    found = {"heads": now.heads, "kv_heads": now.kv_heads, "head_dim": now.head_dim, **_ffn_sizes(model, layer)}
    said = {key: found[size] for size, key in row.keys.items() if size in found}
    if said.get(FFN_DIM) == 4 * model.config.hidden_size:
        del said[FFN_DIM]
    hidden = shape(linear(model, _at(model, layer, f"{row.attention}.{row.o}")))[0]
    if hidden != model.config.hidden_size:  # until the config has followed, or where another family's stands in for it
        said["hidden_size"] = hidden
    return said | ({V_HEAD_DIM: now.value_dim} if now.value_dim != now.head_dim else {})


def _ffn_sizes(model: PreTrainedModel, layer: int) -> dict[str, int]:
    experts: Any = mixture(model, layer)
    if experts is None:
        return {"width": shape(linear(model, _at(model, layer, row_of(model).down)))[1]}
    found: dict[str, int] = {}
    for kind, _, down in _ffns(model, layer):  # experts last, those of one layer equally wide
        found["shared_width" if kind == "shared" else "expert_width"] = shape(linear(model, down))[1]
    if isinstance(experts, nn.ModuleList):
        return found | {"experts": len(experts)}
    return found | {"experts": len(experts.down_proj), "expert_width": experts.down_proj.shape[-1]}


def experts_per_token(model: PreTrainedModel) -> int:
    """How many experts of a layer every token goes to."""
    return getattr(model.config, row_of(model).keys["top_k"])


def mixture(model: PreTrainedModel, layer: int) -> nn.Module | None:
    """The experts of one layer, together or apart (billhook.experts); None where it has a plain FFN."""
    path = row_of(model).experts
    try:
        return layers(model)[layer].get_submodule(path) if path else None
    except AttributeError:
        return None


def router_path(model: PreTrainedModel, layer: int) -> str:
    """Path of what chooses the experts of one layer."""
    return _at(model, layer, row_of(model).router)


def _ffns(model: PreTrainedModel, layer: int) -> list[tuple[str, tuple[str, ...], str]]:
    """Every FFN of one layer: the kind of its axis, paths of what writes its channels, and of what reads them.

    Of experts only those that are apart.
    """
    row, experts = row_of(model), mixture(model, layer)
    if experts is None:
        return [("ffn", tuple(_at(model, layer, name) for name in row.up), _at(model, layer, row.down))]
    places = [("shared", row.shared)] if row.shared else []
    if isinstance(experts, nn.ModuleList):
        places += [("expert_ffn", f"{row.experts}.{number}") for number in range(len(experts))]
    *up, down = (name.rpartition(".")[2] for name in (*row.up, row.down))
    return [
        (kind, tuple(_at(model, layer, f"{place}.{name}") for name in up), _at(model, layer, f"{place}.{down}"))
        for kind, place in places
    ]


def whole(model: PreTrainedModel, layer: int, key: str) -> int:
    """What one of the sizes that no stock config can say is where a layer has lost none of it."""
    if key == V_HEAD_DIM:
        return attention(model, layer).head_dim
    return shape(linear(model, _at(model, layer, row_of(model).down)))[1]


def attention_module(model: PreTrainedModel, layer: int) -> nn.Module:
    """The attention module of one layer."""
    return model.get_submodule(_at(model, layer, row_of(model).attention))


def row_of(model: PreTrainedModel) -> Family:
    """The row of a model's family."""
    return family_of(getattr(model.config, "model_type", None))


def _at(model: PreTrainedModel, layer: int, name: str) -> str:
    return f"{row_of(model).layers}.{layer}.{name}"


def linear(model: PreTrainedModel, path: str) -> nn.Linear | Conv1D:
    """A linear module of either storage order.

    Raises:
        BillhookError: there is none at `path`.
    """
    try:
        found = model.get_submodule(path)
    except AttributeError:
        found = None
    if not isinstance(found, nn.Linear | Conv1D):
        raise BillhookError(
            f"{path} is {type(found).__name__}, not a Linear: this checkpoint is not a stock {model.config.model_type}"
        )
    return found


def weight_of(model: PreTrainedModel, path: str) -> Weight:
    """The weight of a linear module as (out, in): a view."""
    module = linear(model, path)
    return module.weight.data if isinstance(module, nn.Linear) else module.weight.data.T


def shape(module: nn.Linear | Conv1D) -> tuple[int, int]:
    """Outputs and inputs of a linear module."""
    out, into = module.weight.shape if isinstance(module, nn.Linear) else module.weight.shape[::-1]
    return out, into


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
    row, module = row_of(model), attention_module(model, layer)
    head_dim = cast(int, getattr(module, row.head_dim))
    out = {name: shape(linear(model, _at(model, layer, f"{row.attention}.{name}"))) for name in _parts(row)}
    if row.qkv:
        heads = out[row.o][1] // head_dim
        return Attention(head_dim, heads, (out[row.qkv][0] // head_dim - heads) // 2, head_dim)
    heads, kv_heads = (out[name][0] // head_dim for name in (row.q, row.k))
    return Attention(head_dim, heads, kv_heads, out[row.v][0] // kv_heads)


def _parts(row: Family) -> tuple[str, ...]:
    return (row.qkv, row.o) if row.qkv else (row.q, row.k, row.v, row.o)


def _projections(row: Family, now: Attention) -> dict[str, tuple[str, Index]]:
    """Of q, k and v: the matrix, and the rows of each head in it (heads, head size)."""
    d, heads, kv = now.head_dim, now.heads, now.kv_heads
    if not row.qkv:
        return {
            "q": (row.q, blocks(heads, d)),
            "k": (row.k, blocks(kv, d)),
            "v": (row.v, blocks(kv, now.value_dim)),
        }
    if row.by_group:
        every = torch.arange(kv * (now.group + 2) * d).view(kv, now.group + 2, d)
        found = (every[:, :-2].reshape(heads, d), every[:, -2], every[:, -1])
    else:
        found = (blocks(heads, d), blocks(kv, d) + heads * d, blocks(kv, d) + (heads + kv) * d)
    return {part: (row.qkv, rows) for part, rows in zip("qkv", found, strict=True)}


def _ffn(model: PreTrainedModel, kind: str, up: tuple[str, ...], down: str) -> Axis:
    row = row_of(model)
    width, layer = shape(linear(model, down))[1], int(down.removeprefix(f"{row.layers}.").partition(".")[0])
    index = torch.stack([torch.arange(width), torch.arange(width) + width], 1) if row.stacked else blocks(width)
    return Axis(
        layer,
        kind,
        _rows(model, dict.fromkeys(up, index)),
        _read(model, down, blocks(width)),
        ends_layer=kind == "ffn" and _as_is(model),
    )


def _experts(model: PreTrainedModel, layer: int) -> Axis:
    """One unit is one expert: its module, and the router's row that chooses it."""
    router, bias = router_path(model, layer), row_of(model).bias
    rows = blocks(len(model.get_parameter(f"{router}.weight")))
    return Axis(
        layer,
        "experts",
        (Slot(f"{router}.{bias}", 0, rows),) if bias else (),
        Slot(f"{router}.weight", 0, rows),
        ((f"{router}.num_experts", Fraction(1)),),
        blocks=getattr(model.config, row_of(model).keys.get("groups", ""), None) or 1,
        modules=_at(model, layer, row_of(model).experts),
    )


def _as_is(model: PreTrainedModel) -> bool:
    said: Any = row_of(model).as_is
    return said if isinstance(said, bool) else getattr(model.config, said[0]) == said[1]


def _heads(model: PreTrainedModel, layer: int) -> Axis:
    """One unit is one query head; each KV group gives up the same number."""
    row, now = row_of(model), attention(model, layer)
    per_unit = {"heads": Fraction(1), "entries": Fraction(now.head_dim), "per_group": Fraction(1, now.kv_heads)}
    name, rows = _projections(row, now)["q"]
    return Axis(
        layer,
        "heads",
        _rows(model, {_at(model, layer, f"{row.attention}.{name}"): rows}),
        _read(model, _at(model, layer, f"{row.attention}.{row.o}"), blocks(now.heads, now.value_dim)),
        _counters(model, layer, per_unit),
        blocks=now.kv_heads,
    )


def _groups(model: PreTrainedModel, layer: int) -> Axis:
    """One unit is a KV head with the query heads that share it: contiguous, as repeat_kv lays them out."""
    row, now = row_of(model), attention(model, layer)
    owned: dict[str, Index] = {}
    for name, rows in _projections(row, now).values():
        path, rows = _at(model, layer, f"{row.attention}.{name}"), rows.reshape(now.kv_heads, -1)
        owned[path] = torch.cat([owned[path], rows], 1) if path in owned else rows
    per_unit = {
        "heads": Fraction(now.group),
        "kv_heads": Fraction(1),
        "entries": Fraction(now.group * now.head_dim),
    }
    return Axis(
        layer,
        "groups",
        _rows(model, owned),
        _read(model, _at(model, layer, f"{row.attention}.{row.o}"), blocks(now.kv_heads, now.group * now.value_dim)),
        _counters(model, layer, per_unit),
    )


def _value(model: PreTrainedModel, layer: int) -> Axis:
    """One unit is a value channel: one V row with its O column in every query head of the group.

    Each KV head gives up the same number, so that heads stay equally wide.
    """
    row, now = row_of(model), attention(model, layer)
    name, rows = _projections(row, now)["v"]
    columns = torch.arange(now.heads * now.value_dim).view(now.kv_heads, now.group, now.value_dim)
    return Axis(
        layer,
        "value",
        _rows(model, {_at(model, layer, f"{row.attention}.{name}"): rows.reshape(-1, 1)}),
        _read(
            model,
            _at(model, layer, f"{row.attention}.{row.o}"),
            columns.transpose(1, 2).reshape(-1, now.group),
        ),
        blocks=now.kv_heads,
    )


ATTENTION = {"heads": _heads, "groups": _groups, "value": _value}


def _counters(model: PreTrainedModel, layer: int, per_unit: Mapping[str, Fraction]) -> tuple[tuple[str, Fraction], ...]:
    row, at = row_of(model), _at(model, layer, row_of(model).attention)
    return tuple((f"{at}.{name}", per_unit[what]) for name, what in row.counters.items() if what in per_unit)


def _rows(model: PreTrainedModel, owned: Mapping[str, Index]) -> tuple[Slot, ...]:
    """The slots of outputs of linear modules, with their biases."""
    found = []
    for path, index in owned.items():
        module = linear(model, path)
        found.append(Slot(f"{path}.weight", 0 if isinstance(module, nn.Linear) else 1, index))
        if module.bias is not None:
            found.append(Slot(f"{path}.bias", 0, index))
    return tuple(found)


def _read(model: PreTrainedModel, path: str, index: Index) -> Slot:
    """The slot of inputs of a linear module."""
    return Slot(f"{path}.weight", 1 if isinstance(linear(model, path), nn.Linear) else 0, index)
