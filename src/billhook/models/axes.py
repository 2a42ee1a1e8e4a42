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
    feed_forwards,
    layers,
    linear,
    mixture,
    module_path,
    router_path,
    row_of,
    shape,
)
from billhook.models.modeling_per_layer import Family, Refusal
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
    counters: tuple[tuple[str, Fraction], ...] = ()  # (path of an attribute, how much it holds for each unit)
    blocks: int = 1  # units form this many equal contiguous blocks, cut evenly
    modules: str = ""  # path of a list of modules, of which unit u owns the u-th whole
    ends_layer: bool = False  # whether what the reader puts out is added to the layer's output as it is

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
        whole = next(model.get_submodule(self.modules).children()).parameters() if self.modules else ()
        return sum(param.numel() for param in whole) + sum(
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
    """Every axis of the given kinds that some layout could do with less of, layer by layer, attention before the FFN."""
    there = [kind for kind in kinds if not refusal(model, kind, "per_layer")]
    found = []
    for n in range(len(layers(model))):
        found += [make(model, n) for kind, make in ATTENTION.items() if kind in there]
        found += [_ffn(model, *one) for one in feed_forwards(model, n) if one[0] in there]
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
        modules=module_path(model, layer, row_of(model).experts),
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
        _rows(model, {module_path(model, layer, f"{row.attention}.{name}"): rows}),
        _read(model, module_path(model, layer, f"{row.attention}.{row.o}"), blocks(now.heads, now.value_dim)),
        _counters(model, layer, per_unit),
        blocks=now.kv_heads,
    )


def _groups(model: PreTrainedModel, layer: int) -> Axis:
    """One unit is a KV head with the query heads that share it: contiguous, as repeat_kv lays them out."""
    row, now = row_of(model), attention(model, layer)
    owned: dict[str, Index] = {}
    for name, rows in _projections(row, now).values():
        path, rows = module_path(model, layer, f"{row.attention}.{name}"), rows.reshape(now.kv_heads, -1)
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
        _read(
            model,
            module_path(model, layer, f"{row.attention}.{row.o}"),
            blocks(now.kv_heads, now.group * now.value_dim),
        ),
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
        _rows(model, {module_path(model, layer, f"{row.attention}.{name}"): rows.reshape(-1, 1)}),
        _read(
            model,
            module_path(model, layer, f"{row.attention}.{row.o}"),
            columns.transpose(1, 2).reshape(-1, now.group),
        ),
        blocks=now.kv_heads,
    )


ATTENTION = {"heads": _heads, "groups": _groups, "value": _value}


def _counters(model: PreTrainedModel, layer: int, per_unit: Mapping[str, Fraction]) -> tuple[tuple[str, Fraction], ...]:
    row, at = row_of(model), module_path(model, layer, row_of(model).attention)
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
