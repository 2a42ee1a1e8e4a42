"""Bits by layer under a budget of bytes: what few bits of each layer alone cost the model, and a knapsack; or what the
layers' outputs tell of the loss (QPruner)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from billhook.cuts.quantizing import paths
from billhook.errors import BillhookError
from billhook.math import grids, knapsack, qpruner
from billhook.math.grids import GRIDS
from billhook.math.knapsack import Choice
from billhook.models.families import layers, weight_of
from billhook.planning.sensitivity import Probe
from billhook.runtime.run import Run
from billhook.tensors import Probes

HALF = 16  # bits of a matrix without codes
PLAIN = 32  # of a vector


@dataclass(frozen=True)
class Limit:
    """What all weights may take, and in which types."""

    memory: int  # bytes
    types: tuple[str, ...]  # that layers may have
    tables: str  # type of embedding and head


def stored_as(model: Any, path: str, tables: str) -> str:
    """The type of a module outside the layers, or of one whose rows are no whole blocks.

    Args:
        tables: type of embedding and head.
    """
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    module = model.get_submodule(path)
    return tables if any(module is one for one in ends) and grids.divides(module.weight.shape[-1]) else "F16"


def size_of(model: Any, types: Sequence[str], tables: str) -> int:
    """Bytes of all weights, a tied one once.

    Args:
        types: of each layer.
        tables: type of embedding and head.
    """
    bits = {id(param): param.numel() * (PLAIN if param.ndim < 2 else HALF) for param in model.parameters()}
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        if tables in GRIDS and grids.divides(module.weight.shape[-1]):
            bits[id(module.weight)] = round(module.weight.numel() * GRIDS[tables].bits)
    for n, _, path in paths(model):
        weight = model.get_submodule(path).weight
        if grids.divides(weight.shape[-1]):
            bits[id(weight)] = round(weight.numel() * GRIDS[types[n]].bits)
    return sum(bits.values()) // 8


def bounds(model: Any, offered: Sequence[str], tables: str) -> tuple[int, int]:
    """The least and the most bytes that the types give."""
    sizes = [size_of(model, [name] * len(layers(model)), tables) for name in offered]
    return min(sizes), max(sizes)


def layer_bytes(model: Any, limit: Limit, order: Sequence[str]) -> tuple[list[list[int]], int]:
    """Bytes of each layer at each of the types, and those of all that is in no layer or has no type."""
    total, sizes = len(layers(model)), []
    for n in range(total):
        at = [sum(_bytes(model, path, name) for m, _, path in paths(model) if m == n) for name in order]
        sizes.append(at)
    return sizes, size_of(model, [order[0]] * total, limit.tables) - sum(at[0] for at in sizes)


def _bytes(model: Any, path: str, name: str) -> int:
    weight = model.get_submodule(path).weight
    return round(weight.numel() * GRIDS[name].bits) // 8 if grids.divides(weight.shape[-1]) else 0


def smaller_uniform(model: Any, limit: Limit) -> str | None:
    """The type of most bits that all layers may have within the limit."""
    total = len(layers(model))
    fitting = [name for name in limit.types if size_of(model, [name] * total, limit.tables) <= limit.memory]
    return max(fitting, key=lambda name: GRIDS[name].bits) if fitting else None


@torch.no_grad()
def bits_by_layer(model: Any, seen: Probes, limit: Limit, run: Run) -> tuple[list[str], dict[str, Any]]:
    """The type of each layer that costs least together, and what each was measured to cost alone.

    Args:
        seen: windows (windows, length) on which a layer of few bits, rounded to nearest, is compared with the dense
            model.

    Raises:
        BillhookError: no types keep within the limit.
    """
    memory, tables = limit.memory, limit.tables
    order = sorted(limit.types, key=lambda name: -GRIDS[name].bits)
    losses, probe, total = [], Probe(model, seen), len(layers(model))
    for n in range(total):
        run.tick("trying types", n, total)
        losses.append([_divergence(model, probe, n, name) for name in order])
        probe.advance()
    run.tick("trying types", total, total)
    most = size_of(model, [order[0]] * total, tables)
    choices = []
    for n in range(total):
        others = [[name if n == m else order[0] for m in range(total)] for name in order]
        saved = [most - size_of(model, types, tables) for types in others]
        choices.append(Choice(n, range(len(order)), saved, losses[n]))
    if most <= memory:
        return [order[0]] * total, {"losses": losses, "order": order}
    step = min(b - a for choice in choices for a, b in zip(choice.savings, choice.savings[1:], strict=False) if b > a)
    for wish in (most - memory + step / 2, most - memory + step, most - memory + 2 * step, most - memory + 4 * step):
        numbers, _ = knapsack.solve(choices, min(wish, sum(max(choice.savings) for choice in choices)))
        types = [order[number] for number in numbers]
        if size_of(model, types, tables) <= memory:
            return types, {"losses": losses, "order": order, "by_layer": types}
    raise BillhookError(f"--memory {memory:,}: no types of the layers come to so much: raise it")


@torch.no_grad()
def by_information(model: Any, seen: Probes, limit: Limit, run: Run) -> tuple[list[str], dict[str, Any]]:
    """QPruner's start: types by how much each layer's output tells of the loss of its token, and that, in nats.

    Args:
        seen: windows (windows, length).
    """
    probe, total, told = Probe(model, seen), len(layers(model)), []
    logits = torch.cat([model(window[None], use_cache=False).logits[0, :-1].float() for window in probe.tokens])
    losses = torch.nn.functional.cross_entropy(logits, probe.tokens[:, 1:].flatten(), reduction="none")
    for n in range(total):
        run.tick("what layers tell", n, total)
        probe.advance()
        told.append(qpruner.mutual_information(qpruner.principal(probe.state[:, :-1].flatten(0, 1)), losses))
    run.tick("what layers tell", total, total)
    order = sorted(limit.types, key=lambda name: GRIDS[name].bits)
    sizes, other = layer_bytes(model, limit, order)
    numbers = qpruner.raised(told, [GRIDS[name].bits for name in order], sizes, limit.memory - other)
    types = [order[number] for number in numbers]
    return types, {"information": told, "by_layer": types}


def _divergence(model: Any, probe: Probe, layer: int, name: str) -> float:
    """KL in nats a token from the dense model, with one layer rounded to a type, which is undone."""
    before = {}
    for n, _, path in paths(model):
        weight = weight_of(model, path)
        if n == layer and grids.divides(weight.shape[1]):
            before[path] = weight.clone()
            weight.copy_(grids.nearest(weight, GRIDS[name]).values())
    found = probe.divergence(layer)
    for path, weight in before.items():
        weight_of(model, path).copy_(weight)
    return max(found, 0.0)
