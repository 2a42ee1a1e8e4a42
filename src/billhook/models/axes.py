"""Named axes: one coupled group of parameters, wherever it lives.

An Axis is a set of Slots.  Slot(param, dim, index) says: along `dim` of `param`, unit u owns the entries index[u].
Removing unit u means dropping index[u] from every slot.  Nothing above this file knows what kind of layer it cuts.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from billhook.choices import KINDS, MIXED
from billhook.models.families import (
    Attention,
    attention,
    bias_path,
    feed_forwards,
    has_ffn,
    holds,
    layers,
    linear,
    mixture,
    module_path,
    rotary_pairs,
    router_path,
    row_of,
    shape,
)
from billhook.models.modeling_per_layer import Family
from billhook.tensors import Columns, Index, Kept, Scores, Units


@dataclass(frozen=True, eq=False)
class Slot:
    """Along `dim` of the parameter named `param`, unit u of the axis owns the entries index[u]."""

    param: str
    dim: int
    index: Index


@dataclass(frozen=True, eq=False)
class Axis:
    """One coupled group: what writes it, what reads it, and the module attributes that cache its size."""

    layer: int
    kind: str
    writers: tuple[Slot, ...]
    reader: Slot
    counters: tuple[tuple[str, Fraction], ...] = ()  # (path of an attribute, its share for each unit)
    blocks: int = 1  # units form this many equal contiguous blocks, cut evenly
    modules: str = ""  # path of a list of modules; unit u owns the u-th as a whole
    ends_layer: bool = False  # whether the reader's output is added to the layer's output unchanged

    @property
    def slots(self) -> tuple[Slot, ...]:
        return (*self.writers, self.reader)

    @property
    def units(self) -> int:
        return len(self.reader.index)

    @property
    def reader_module(self) -> str:
        """Path of the module whose weight reads the axis."""
        return self.reader.param.removesuffix(".weight")

    def columns(self, units: Units) -> Kept:
        """Columns of the reader that belong to `units`, ascending."""
        return self.reader.index[units.cpu()].flatten().sort().values.to(units.device)

    def pool(self, scores: Columns) -> Scores:
        """Column scores of the reader, summed over the columns of each unit."""
        return scores[self.reader.index.to(scores.device)].sum(1)

    def price(self, model: PreTrainedModel) -> int:
        """Parameters that one unit owns."""
        owned_params = next(model.get_submodule(self.modules).children()).parameters() if self.modules else ()
        return sum(param.numel() for param in owned_params) + sum(
            slot.index.shape[1] * param.numel() // param.shape[slot.dim]
            for slot, owner, leaf in owners(model, self)
            if isinstance(param := getattr(owner, leaf), nn.Parameter)
        )


def blocks(units: int, inner: int = 1) -> Index:
    """Positions of each unit in a flat dimension laid out as (units, inner)."""
    return torch.arange(units * inner).view(units, inner)


def reader_weight(model: PreTrainedModel, axis: Axis) -> Tensor:
    """The weight that reads `axis` seen as (out, in): a view, so that assigning to its entries edits the model."""
    return model.get_parameter(axis.reader.param).data.movedim(axis.reader.dim, -1)


def owners(model: PreTrainedModel, axis: Axis) -> Iterator[tuple[Slot, nn.Module, str]]:
    """Each slot with the module that holds its parameter and the parameter's name there."""
    for slot in axis.slots:
        path, _, leaf = slot.param.rpartition(".")
        yield slot, model.get_submodule(path), leaf


def axes(model: PreTrainedModel, kinds: tuple[str, ...] = tuple(KINDS)) -> list[Axis]:
    """Every axis of the given kinds that can be cut in some layout, layer by layer, attention before the FFN."""
    possible = [kind for kind in kinds if not refusal(model, kind, "per_layer")]
    result = []
    for n in range(len(layers(model))):
        result += [make(model, n) for kind, make in ATTENTION.items() if kind in possible]
        result += [_ffn(model, kind, up, down) for kind, up, down in feed_forwards(model, n) if kind in possible]
        result += [_experts(model, n)] if "experts" in possible and mixture(model, n) is not None else []
    return result


def refusal(model: PreTrainedModel, kind: str, layout: str) -> str:
    """Why the model cannot give up a kind of axis (or `layers`) in a layout, or ''."""
    row, numbers = row_of(model), range(len(layers(model)))
    for entry in row.refusals:
        if kind in entry.kinds and (layout == "uniform" or not entry.uniform_only) and holds(model, entry):
            return entry.why
    if kind == "groups" and row.attention and any(rotary_pairs(model, n) for n in numbers):
        return "its KV heads keep rotary pairs of their own"
    if kind in MIXED and all(mixture(model, n) is None for n in numbers):
        return "only mixtures of experts have that axis, and it is dense"
    if kind == "shared" and not row.shared:
        return "it has no shared expert, to which every token goes"
    if kind == "ffn" and row.experts and all(mixture(model, n) is not None or not has_ffn(model, n) for n in numbers):
        return "all its FFNs are mixtures of experts, whose axes are experts and expert_ffn"
    return ""


def _projections(row: Family, sizes: Attention) -> dict[str, tuple[str, Index]]:
    """For q, k and v: the name of the matrix, and the rows of each head in it (heads, head size)."""
    d, heads, kv = sizes.key_dim, sizes.heads, sizes.kv_heads
    if not row.qkv:
        return {
            "q": (row.q, blocks(heads, d)),
            "k": (row.k, blocks(kv, d)),
            "v": (row.v, blocks(kv, sizes.value_dim)),
        }
    if row.by_group:
        rows_by_group = torch.arange(kv * (sizes.group + 2) * d).view(kv, sizes.group + 2, d)
        parts = (rows_by_group[:, :-2].reshape(heads, d), rows_by_group[:, -2], rows_by_group[:, -1])
    else:
        parts = (blocks(heads, d), blocks(kv, d) + heads * d, blocks(kv, d) + (heads + kv) * d)
    return {part: (row.qkv, rows) for part, rows in zip("qkv", parts, strict=True)}


def _ffn(model: PreTrainedModel, kind: str, up: tuple[str, ...], down: str) -> Axis:
    row = row_of(model)
    width, layer = shape(linear(model, down))[1], int(down.removeprefix(f"{row.layers}.").partition(".")[0])
    index = torch.stack([torch.arange(width), torch.arange(width) + width], 1) if row.stacked else blocks(width)
    return Axis(
        layer,
        kind,
        _rows(model, dict.fromkeys(up, index)),
        _read(model, down, blocks(width)),
        ends_layer=kind == "ffn" and _ffn_ends_layer(model),
    )


def _experts(model: PreTrainedModel, layer: int) -> Axis:
    """One unit is one expert: its module, and its row of the router."""
    router, named = router_path(model, layer), bias_path(row_of(model))
    bias = module_path(model, layer, named)
    rows = blocks(len(model.get_parameter(f"{router}.weight")))
    counters = [module_path(model, layer, name) for name in row_of(model).expert_counters]
    if not row_of(model).derived:
        counters = [f"{router}.num_experts"]
    return Axis(
        layer,
        "experts",
        (Slot(bias, _last_dim(model, bias), rows),) if named else (),
        Slot(f"{router}.weight", 0, rows),
        tuple((counter, Fraction(1)) for counter in counters),
        blocks=getattr(model.config, row_of(model).keys.get("groups", ""), None) or 1,
        modules=module_path(model, layer, row_of(model).experts),
    )


def _last_dim(model: PreTrainedModel, path: str) -> int:
    """The last dimension of a parameter or buffer."""
    above, _, leaf = path.rpartition(".")
    return getattr(model.get_submodule(above), leaf).ndim - 1


def _ffn_ends_layer(model: PreTrainedModel) -> bool:
    """Whether an FFN's output is added to its layer's output unchanged."""
    rule: Any = row_of(model).as_is
    return rule if isinstance(rule, bool) else getattr(model.config, rule[0]) == rule[1]


def _heads(model: PreTrainedModel, layer: int) -> Axis:
    """One unit is one query head; each KV group gives up the same number."""
    row, sizes = row_of(model), attention(model, layer)
    per_unit = {"heads": Fraction(1), "entries": Fraction(sizes.head_dim), "per_group": Fraction(1, sizes.kv_heads)}
    name, rows = _projections(row, sizes)["q"]
    return Axis(
        layer,
        "heads",
        (
            *_rows(model, {module_path(model, layer, f"{row.attention}.{name}"): rows}),
            *_sinks(model, layer, blocks(sizes.heads)),
        ),
        _read(model, module_path(model, layer, f"{row.attention}.{row.o}"), blocks(sizes.heads, sizes.value_dim)),
        _counters(model, layer, per_unit),
        blocks=sizes.kv_heads,
    )


def _groups(model: PreTrainedModel, layer: int) -> Axis:
    """One unit is a KV head with the query heads that share it; those are contiguous, as in repeat_kv."""
    row, sizes = row_of(model), attention(model, layer)
    owned: dict[str, Index] = {}
    for name, rows in _projections(row, sizes).values():
        path, rows = module_path(model, layer, f"{row.attention}.{name}"), rows.reshape(sizes.kv_heads, -1)
        owned[path] = torch.cat([owned[path], rows], 1) if path in owned else rows
    per_unit = {
        "heads": Fraction(sizes.group),
        "kv_heads": Fraction(1),
        "entries": Fraction(sizes.group * sizes.head_dim),
    }
    return Axis(
        layer,
        "groups",
        (*_rows(model, owned), *_sinks(model, layer, blocks(sizes.kv_heads, sizes.group))),
        _read(
            model,
            module_path(model, layer, f"{row.attention}.{row.o}"),
            blocks(sizes.kv_heads, sizes.group * sizes.value_dim),
        ),
        _counters(model, layer, per_unit),
    )


def _value(model: PreTrainedModel, layer: int) -> Axis:
    """One unit is a value channel: one V row with its O column in every query head of the group.

    Each KV head gives up the same number, so that heads stay equally wide.
    """
    row, sizes = row_of(model), attention(model, layer)
    name, rows = _projections(row, sizes)["v"]
    columns = torch.arange(sizes.heads * sizes.value_dim).view(sizes.kv_heads, sizes.group, sizes.value_dim)
    return Axis(
        layer,
        "value",
        _rows(model, {module_path(model, layer, f"{row.attention}.{name}"): rows.reshape(-1, 1)}),
        _read(
            model,
            module_path(model, layer, f"{row.attention}.{row.o}"),
            columns.transpose(1, 2).reshape(-1, sizes.group),
        ),
        blocks=sizes.kv_heads,
    )


ATTENTION = {"heads": _heads, "groups": _groups, "value": _value}  # kinds of attention's axes


def _sinks(model: PreTrainedModel, layer: int, index: Index) -> tuple[Slot, ...]:
    """The slot of attention's sinks, where it has them."""
    row = row_of(model)
    return (Slot(module_path(model, layer, f"{row.attention}.{row.sinks}"), 0, index),) if row.sinks else ()


def _counters(model: PreTrainedModel, layer: int, per_unit: Mapping[str, Fraction]) -> tuple[tuple[str, Fraction], ...]:
    row, path = row_of(model), module_path(model, layer, row_of(model).attention)
    return tuple((f"{path}.{name}", per_unit[unit]) for name, unit in row.counters.items() if unit in per_unit)


def _rows(model: PreTrainedModel, owned: Mapping[str, Index]) -> tuple[Slot, ...]:
    """The slots of the outputs of linear modules, and of their biases."""
    slots = []
    for path, index in owned.items():
        module = linear(model, path)
        slots.append(Slot(f"{path}.weight", 0 if isinstance(module, nn.Linear) else 1, index))
        if module.bias is not None:
            slots.append(Slot(f"{path}.bias", 0, index))
    return tuple(slots)


def _read(model: PreTrainedModel, path: str, index: Index) -> Slot:
    """The slot of the inputs of a linear module."""
    return Slot(f"{path}.weight", 1 if isinstance(linear(model, path), nn.Linear) else 0, index)
