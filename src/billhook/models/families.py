"""What a model's family says about it: its axes, its linear modules, its sizes, and what it cannot give up.

A family is one row of FAMILIES (billhook.models.modeling_per_layer, since the table travels with checkpoints).  Sizes are read from
tensors, never from the config, so that the axes of a model that has been cut are found the same way.
docs/adding-a-family.md walks through a row.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from billhook.errors import BillhookError
from billhook.models.modeling_per_layer import FAMILIES, FFN_DIM, MODEL_TYPE, V_HEAD_DIM, Family
from billhook.tensors import Weight

WIDTHS = ("ffn", "expert_ffn", "shared")  # kinds of axis whose units are channels
FFN_SIZES = ("width", "experts", "expert_width", "shared_width")  # what layers that mix experts have, or the others
PER_LAYER_KEYS = ("layer_types", "no_rope_layers")  # config keys that hold one value a layer
OLDER_TYPE = ("phi3", "olmo2")  # transformers 4 calls the kind of their scaling `type` alone
OLDER_ROTARY = {"gpt_neox": ("rotary_emb_base", "rotary_pct")}  # theta and turned share, in transformers 4
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


def linears(model: PreTrainedModel, layer: int) -> list[dict[str, str]]:
    """The linear modules of one layer: path by role, those that share an input together, in the order in which they compute.

    One matrix that does the work of several has one of the roles FUSED.
    """
    row, ffns = row_of(model), [one[1:] for one in feed_forwards(model, layer)]
    attention: dict[str, str] = {"qkv": row.qkv} if row.qkv else {"q": row.q, "k": row.k, "v": row.v}
    groups: list[dict[str, str]] = [
        {role: module_path(model, layer, f"{row.attention}.{name}") for role, name in one.items()}
        for one in (attention, {"o": row.o})
    ]
    roles: tuple[str, ...] = ("gate_up",) if row.stacked else ("gate", "up")[-len(row.up) :]
    groups += [{role: path for role, path in zip(roles, up, strict=True)} for up, _ in ffns]
    groups += [{"down": down} for _, down in ffns]
    for path in (path for one in groups for path in one.values()):
        linear(model, path)
    return groups


def role_wanted(role: str, roles: Sequence[str]) -> bool:
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
    hidden = shape(linear(model, module_path(model, layer, f"{row.attention}.{row.o}")))[0]
    if hidden != model.config.hidden_size:  # until the config has followed, or where another family's stands in for it
        said["hidden_size"] = hidden
    return said | ({V_HEAD_DIM: now.value_dim} if now.value_dim != now.head_dim else {})


def _ffn_sizes(model: PreTrainedModel, layer: int) -> dict[str, int]:
    experts: Any = mixture(model, layer)
    if experts is None:
        return {"width": shape(linear(model, module_path(model, layer, row_of(model).down)))[1]}
    found: dict[str, int] = {}
    for kind, _, down in feed_forwards(model, layer):  # experts last, those of one layer equally wide
        found["shared_width" if kind == "shared" else "expert_width"] = shape(linear(model, down))[1]
    if isinstance(experts, nn.ModuleList):
        return found | {"experts": len(experts)}
    return found | {"experts": len(experts.down_proj), "expert_width": experts.down_proj.shape[-1]}


def experts_per_token(model: PreTrainedModel) -> int:
    """How many experts of a layer every token goes to."""
    return getattr(model.config, row_of(model).keys["top_k"])


def mixture(model: PreTrainedModel, layer: int) -> nn.Module | None:
    """The experts of one layer, together or apart (billhook.models.experts); None where it has a plain FFN."""
    path = row_of(model).experts
    try:
        return layers(model)[layer].get_submodule(path) if path else None
    except AttributeError:
        return None


def router_path(model: PreTrainedModel, layer: int) -> str:
    """Path of what chooses the experts of one layer."""
    return module_path(model, layer, row_of(model).router)


def feed_forwards(model: PreTrainedModel, layer: int) -> list[tuple[str, tuple[str, ...], str]]:
    """Every FFN of one layer: the kind of its axis, paths of what writes its channels, and of what reads them.

    Of experts only those that are apart.
    """
    row, experts = row_of(model), mixture(model, layer)
    if experts is None:
        return [("ffn", tuple(module_path(model, layer, name) for name in row.up), module_path(model, layer, row.down))]
    places = [("shared", row.shared)] if row.shared else []
    if isinstance(experts, nn.ModuleList):
        places += [("expert_ffn", f"{row.experts}.{number}") for number in range(len(experts))]
    *up, down = (name.rpartition(".")[2] for name in (*row.up, row.down))
    return [
        (
            kind,
            tuple(module_path(model, layer, f"{place}.{name}") for name in up),
            module_path(model, layer, f"{place}.{down}"),
        )
        for kind, place in places
    ]


def uncut_size(model: PreTrainedModel, layer: int, key: str) -> int:
    """What one of the sizes that no stock config can say is where a layer has lost none of it."""
    if key == V_HEAD_DIM:
        return attention(model, layer).head_dim
    return shape(linear(model, module_path(model, layer, row_of(model).down)))[1]


def attention_module(model: PreTrainedModel, layer: int) -> nn.Module:
    """The attention module of one layer."""
    return model.get_submodule(module_path(model, layer, row_of(model).attention))


def row_of(model: PreTrainedModel) -> Family:
    """The row of a model's family."""
    return family_of(getattr(model.config, "model_type", None))


def module_path(model: PreTrainedModel, layer: int, name: str) -> str:
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
    out = {name: shape(linear(model, module_path(model, layer, f"{row.attention}.{name}"))) for name in _parts(row)}
    if row.qkv:
        heads = out[row.o][1] // head_dim
        return Attention(head_dim, heads, (out[row.qkv][0] // head_dim - heads) // 2, head_dim)
    heads, kv_heads = (out[name][0] // head_dim for name in (row.q, row.k))
    return Attention(head_dim, heads, kv_heads, out[row.v][0] // kv_heads)


def _parts(row: Family) -> tuple[str, ...]:
    return (row.qkv, row.o) if row.qkv else (row.q, row.k, row.v, row.o)


def check_known(model: PreTrainedModel) -> None:
    """Refuse a model whose layers hold more than its row speaks of: a cut would leave that as it is.

    Raises:
        BillhookError: names the first such parameter; or attention's sizes do not fit one another.
    """
    row, family = row_of(model), model.config.model_type
    for n in range(len(layers(model))):
        within = f"{row.layers}.{n}"
        known = {path for one in linears(model, n) for path in one.values()}
        if mixture(model, n) is not None:
            known |= {f"{within}.{name}" for name in (row.router, row.experts, f"{row.shared}_gate")}
        for name, param in layers(model)[n].named_parameters():
            path = f"{within}.{name}"
            if param.ndim > 1 and path.rpartition(".")[0] not in known:
                raise BillhookError(
                    f"{path} is nothing that billhook knows of {family}: a setting of its config adds it, and no cut would be right"
                )
        now, columns = attention(model, n), shape(linear(model, f"{within}.{row.attention}.{row.o}"))[1]
        if now.heads % now.kv_heads or columns != now.heads * now.value_dim:
            raise BillhookError(
                f"layer {n}: {now.heads} query heads of {now.head_dim} do not fit its other projections"
            )
