"""What a model's family says about it: where its linear modules are, its sizes, and what cannot be cut.

A family is one row of FAMILIES: in billhook.models.modeling_per_layer, which travels with checkpoints, or in
billhook.models.stock_families, whose layers cannot differ. Sizes are read from tensors, never from the config, so that
they are right for a model that has been cut. docs/adding-a-family.md explains a row.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from billhook.errors import ModelError
from billhook.models import modeling_per_layer
from billhook.models.modeling_per_layer import FFN_DIM, MODEL_TYPE, PAIRS, RANKS, V_HEAD_DIM, Family, LowRank, Refusal
from billhook.models.stock_families import STOCK_FAMILIES
from billhook.runtime import plug_ins
from billhook.tensors import RotaryPairs, Weight

WIDTHS = ("ffn", "expert_ffn", "shared")  # kinds of axis whose units are channels
FFN_SIZES = ("width", "experts", "expert_width", "shared_width")  # sizes of plain FFNs and of mixtures of experts
PER_LAYER_KEYS = ("layer_types", "no_rope_layers", "mlp_layer_types")  # config keys with one value for each layer
OLDER_TYPE = ("phi3", "olmo2")  # families whose kind of rope scaling transformers 4 reads under `type` alone
OLDER_ROTARY = {"gpt_neox": ("rotary_emb_base", "rotary_pct")}  # keys in transformers 4 of theta and rotated share
FUSED = {"qkv": ("q", "k", "v"), "gate_up": ("gate", "up")}  # roles of matrices that some families fuse

FAMILIES: dict[str, Family] = modeling_per_layer.FAMILIES | STOCK_FAMILIES
KNOWN: dict[str, Family] = plug_ins.added("families", FAMILIES)
DERIVED: dict[str, Family] = {}  # rows of other types, each proved on the model at hand (billhook.models.proof)


def family_of(model_type: str | None) -> Family:
    """The row of a model type.

    Raises:
        BillhookError: there is none; the message lists the supported families.
    """
    stock = stock_type(model_type or "")
    if stock in DERIVED:
        return DERIVED[stock]
    if stock not in KNOWN:
        raise ModelError(
            f"model family {model_type!r} is not supported: billhook knows {', '.join(KNOWN)} (docs/adding-a-family.md)"
        )
    return KNOWN[stock]


def stock_type(model_type: str) -> str:
    """The stock family's model type, for per-layer checkpoints as well."""
    return model_type.removeprefix(MODEL_TYPE.format(""))


def layers(model: PreTrainedModel) -> nn.ModuleList:
    """The decoder layers, in order."""
    modules = model.get_submodule(row_of(model).layers)
    assert isinstance(modules, nn.ModuleList)
    return modules


def as_output(model: PreTrainedModel, state: torch.Tensor) -> Any:
    """A hidden state as the family's layers return it: a tensor or a tuple."""
    return (state, None) if row_of(model).tuples else state


def linears(model: PreTrainedModel, layer: int) -> list[dict[str, str]]:
    """The linear modules of one layer, path by role, in groups that share an input, in the order in which they compute.

    A fused matrix has one of the roles in FUSED.
    """
    row, ffns = row_of(model), [(up, down) for _, up, down in feed_forwards(model, layer)]
    attention: dict[str, str] = {"qkv": row.qkv} if row.qkv else {"q": row.q, "k": row.k, "v": row.v}
    groups: list[dict[str, str]] = [
        {role: module_path(model, layer, f"{row.attention}.{name}") for role, name in group.items()}
        for group in (attention, {"o": row.o})
        if row.attention
    ]
    roles: tuple[str, ...] = ("gate_up",) if row.stacked else ("gate", "up")[-len(row.up) :]
    groups += [{role: path for role, path in zip(roles, up, strict=True)} for up, _ in ffns]
    groups += [{"down": down} for _, down in ffns]
    for path in (path for group in groups for path in group.values()):
        operator(model, path)
    return groups


def role_wanted(role: str, roles: Sequence[str]) -> bool:
    """Whether `roles` include a linear module of `role`; for a fused one they have to name all its parts."""
    return all(part in roles for part in FUSED.get(role, (role,)))


def sizes(model: PreTrainedModel, layer: int) -> dict[str, Any]:
    """The sizes of one layer's tensors, under the config's own keys; ranks, by path in the layer, under theirs.

    Sizes that no stock config can hold are included only if they differ from the family's fixed value.
    """
    row = row_of(model)
    if row.only_ffns:
        settled = {kind for entry in row.refusals if entry.key and holds(model, entry) for kind in entry.kinds}
        kinds: dict[str, str] = dict(zip(FFN_SIZES, ("ffn", "experts", "expert_ffn", "shared"), strict=True))
        return {
            row.keys[size]: value
            for size, value in _ffn_sizes(model, layer).items()
            if size in row.keys and kinds[size] not in settled
        } | row.settled
    heads = attention(model, layer)
    values = {"heads": heads.heads, "kv_heads": heads.kv_heads, "head_dim": heads.head_dim, **_ffn_sizes(model, layer)}
    config = {key: values[size] for size, key in row.keys.items() if size in values}
    if config.get(FFN_DIM) == 4 * model.config.hidden_size:
        del config[FFN_DIM]
    hidden = shape(operator(model, module_path(model, layer, f"{row.attention}.{row.o}")))[0]
    if hidden != model.config.hidden_size:  # the config is not updated yet, or another family's will replace it
        config["hidden_size"] = hidden
    own = {V_HEAD_DIM: heads.value_dim} if heads.value_dim != heads.head_dim else {}
    own |= {PAIRS: pairs} if (pairs := rotary_pairs(model, layer)) else {}
    return config | own | ({RANKS: found} if (found := ranks(model, layer)) else {})


def holds(model: PreTrainedModel, entry: Refusal) -> bool:
    """Whether the model's config is one that a refusal is of."""
    return not entry.key or bool(getattr(model.config, entry.key, False))


def ranks(model: PreTrainedModel, layer: int) -> dict[str, int]:
    """The rank of every linear module of one layer that is two thin ones, by its path in the layer."""
    thin: dict[str, Any] = {p: m for p, m in layers(model)[layer].named_modules() if isinstance(m, LowRank)}
    return {path: module.reduce.out_features for path, module in thin.items()}


def _ffn_sizes(model: PreTrainedModel, layer: int) -> dict[str, int]:
    experts: Any = mixture(model, layer)
    if experts is None and not has_ffn(model, layer):
        return {}
    if experts is None:
        return {"width": shape(operator(model, module_path(model, layer, row_of(model).down)))[1]}
    values: dict[str, int] = {}
    for kind, _, down in feed_forwards(model, layer):  # the experts of one layer are equally wide
        values["shared_width" if kind == "shared" else "expert_width"] = shape(operator(model, down))[1]
    if isinstance(experts, nn.ModuleList):
        return values | {"experts": len(experts)}
    width = experts.down_proj.shape[1 if getattr(experts, "is_transposed", False) else 2]
    return values | {"experts": len(experts.down_proj), "expert_width": width}


def experts_per_token(model: PreTrainedModel) -> int:
    """How many experts of a layer each token goes to."""
    return getattr(model.config, row_of(model).keys["top_k"])


def mixture(model: PreTrainedModel, layer: int) -> nn.Module | None:
    """The experts of one layer, fused or not (billhook.models.experts); None for a layer with a plain FFN."""
    path = row_of(model).experts
    return _part(model, layer, path) if path else None


def has_ffn(model: PreTrainedModel, layer: int) -> bool:
    """Whether a layer without experts has an FFN."""
    row = row_of(model)
    return bool(row.down) and not (row.bare and _part(model, layer, row.down) is None)


def _part(model: PreTrainedModel, layer: int, path: str) -> nn.Module | None:
    try:
        return layers(model)[layer].get_submodule(path)
    except AttributeError:
        return None


def router_path(model: PreTrainedModel, layer: int) -> str:
    """Path of the router, which chooses the experts of one layer."""
    return module_path(model, layer, row_of(model).router)


def bias_path(row: Family) -> str:
    """Path within a layer of what is added where a router chooses, or ''."""
    return row.bias if "." in row.bias or not row.bias else f"{row.router}.{row.bias}"


def feed_forwards(model: PreTrainedModel, layer: int) -> list[tuple[str, tuple[str, ...], str]]:
    """Every FFN of one layer: the kind of its axis, the paths of its writers, and of its reader.

    Fused experts are left out.
    """
    row, experts = row_of(model), mixture(model, layer)
    if experts is None and not has_ffn(model, layer):
        return []
    if experts is None:
        return [("ffn", tuple(module_path(model, layer, name) for name in row.up), module_path(model, layer, row.down))]
    places = [("shared", row.shared)] if row.shared else []
    if isinstance(experts, nn.ModuleList):
        places += [("expert_ffn", f"{row.experts}.{number}") for number in range(len(experts))]
    *up, down = row.expert
    return [
        (
            kind,
            tuple(module_path(model, layer, f"{place}.{name}") for name in up),
            module_path(model, layer, f"{place}.{down}"),
        )
        for kind, place in places
    ]


def uncut_size(model: PreTrainedModel, layer: int, key: str) -> Any:
    """The size before any cut of one of those that no stock config can hold."""
    if key in (RANKS, PAIRS):
        return {}
    if key == V_HEAD_DIM:
        return attention(model, layer).head_dim
    return shape(operator(model, module_path(model, layer, row_of(model).down)))[1]


def attention_module(model: PreTrainedModel, layer: int) -> nn.Module:
    """The attention module of one layer."""
    return model.get_submodule(module_path(model, layer, row_of(model).attention))


def rotary_pairs(model: PreTrainedModel, layer: int) -> RotaryPairs:
    """The rotary pairs that queries and keys of one layer keep, where each KV head keeps its own; (): all."""
    return getattr(attention_module(model, layer), PAIRS, ())


def narrow_heads(model: PreTrainedModel) -> list[int]:
    """The layers whose heads have lost value channels or rotary pairs."""
    if not row_of(model).attention:
        return []
    heads = {n: attention(model, n) for n in range(len(layers(model)))}
    return [n for n, one in heads.items() if not one.key_dim == one.value_dim == one.head_dim]


def row_of(model: PreTrainedModel) -> Family:
    """The row of a model's family."""
    return family_of(getattr(model.config, "model_type", None))


def module_path(model: PreTrainedModel, layer: int, name: str) -> str:
    return f"{row_of(model).layers}.{layer}.{name}"


def linear(model: PreTrainedModel, path: str) -> nn.Linear | Conv1D:
    """The linear module at `path` that has one weight, in either storage order.

    Raises:
        BillhookError: there is no linear module at `path`, or its weight is two thin ones.
    """
    module = operator(model, path)
    if isinstance(module, LowRank):
        raise ModelError(f"{path} is two thin matrices: cut or quantise a model before its weights are factored")
    return module


def operator(model: PreTrainedModel, path: str) -> nn.Linear | Conv1D | LowRank:
    """What is linear at `path`, whole or as two thin modules.

    Raises:
        BillhookError: there is no such thing at `path`.
    """
    try:
        module = model.get_submodule(path)
    except AttributeError:
        module = None
    if not isinstance(module, nn.Linear | Conv1D | LowRank):
        raise ModelError(
            f"{path} is {type(module).__name__}, not a Linear: this checkpoint is not a stock {model.config.model_type}"
        )
    return module


def weight_of(model: PreTrainedModel, path: str) -> Weight:
    """The weight of a linear module as (out, in): a view."""
    module = linear(model, path)
    return module.weight.data if isinstance(module, nn.Linear) else module.weight.data.T


def shape(module: nn.Linear | Conv1D | LowRank) -> tuple[int, int]:
    """Outputs and inputs of a linear module."""
    if isinstance(module, LowRank):
        thin: Any = module
        return thin.expand.out_features, thin.reduce.in_features
    outputs, inputs = module.weight.shape if isinstance(module, nn.Linear) else module.weight.shape[::-1]
    return outputs, inputs


@dataclass(frozen=True)
class Attention:
    """The sizes of one layer's attention."""

    head_dim: int
    heads: int
    kv_heads: int
    value_dim: int  # channels of one value head; head_dim unless some were cut
    key_dim: int  # of one query or key head, likewise

    @property
    def group(self) -> int:
        """How many query heads share one KV head."""
        return self.heads // self.kv_heads


def attention(model: PreTrainedModel, layer: int) -> Attention:
    """The sizes of one layer's attention, read from its tensors.

    Raises:
        BillhookError: its row says nothing of attention.
    """
    if not row_of(model).attention:
        raise ModelError(f"{model.config.model_type}: its row says nothing of attention")
    row, module = row_of(model), attention_module(model, layer)
    head_dim = cast(int, getattr(module, row.head_dim))
    out = {name: shape(operator(model, module_path(model, layer, f"{row.attention}.{name}"))) for name in _parts(row)}
    if row.qkv:
        heads = out[row.o][1] // head_dim
        return Attention(head_dim, heads, (out[row.qkv][0] // head_dim - heads) // 2, head_dim, head_dim)
    key_dim = 2 * len(pairs[0]) if (pairs := rotary_pairs(model, layer)) else head_dim
    heads, kv_heads = (out[name][0] // key_dim for name in (row.q, row.k))
    return Attention(head_dim, heads, kv_heads, out[row.v][0] // kv_heads, key_dim)


def _parts(row: Family) -> tuple[str, ...]:
    return (row.qkv, row.o) if row.qkv else (row.q, row.k, row.v, row.o)


def check_known(model: PreTrainedModel) -> None:
    """Refuse a model whose layers have parameters that its row does not cover: a cut would leave them uncut.

    Raises:
        BillhookError: there is such a parameter (named), or attention's sizes do not fit one another.
    """
    row, family = row_of(model), model.config.model_type
    if row.derived:  # proved on the same structure
        return
    for n in range(len(layers(model))):
        within = f"{row.layers}.{n}"
        covered = {path for group in linears(model, n) for path in group.values()}
        if mixture(model, n) is not None:
            covered |= {f"{within}.{name}" for name in (row.router, row.experts, f"{row.shared}_gate")}
        covered |= {f"{within}.{path}.{thin}" for path in ranks(model, n) for thin in ("reduce", "expand")}
        beside = tuple(f"{within}.{name}." for name in row.beside)
        for name, param in layers(model)[n].named_parameters():
            path = f"{within}.{name}"
            if param.ndim > 1 and path.rpartition(".")[0] not in covered and not path.startswith(beside):
                raise ModelError(
                    f"{path} is nothing that billhook knows of {family}: a setting of its config adds it, and no cut "
                    "would be right"
                )
        if not row.attention:
            continue
        heads, columns = attention(model, n), shape(operator(model, f"{within}.{row.attention}.{row.o}"))[1]
        if heads.heads % heads.kv_heads or columns != heads.heads * heads.value_dim:
            raise ModelError(
                f"layer {n}: {heads.heads} query heads of {heads.head_dim} do not fit its other projections"
            )
