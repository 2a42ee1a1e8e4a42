"""Bits by layer under a budget of bytes: what few bits of each layer alone cost the model, and a knapsack."""

from collections.abc import Sequence
from typing import Any

import torch

from billhook.cuts.quantizing import paths
from billhook.errors import BillhookError
from billhook.math import grids, knapsack
from billhook.math.grids import GRIDS
from billhook.math.knapsack import Choice
from billhook.models.families import layers, weight_of
from billhook.planning.sensitivity import Probe
from billhook.runtime.run import Run
from billhook.tensors import Probes

HALF = 16  # bits of a matrix without codes
PLAIN = 32  # of a vector


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


def smaller_uniform(model: Any, offered: Sequence[str], budget: tuple[int, str]) -> str | None:
    """The type of most bits that all layers may have within the budget."""
    memory, tables = budget
    fitting = [name for name in offered if size_of(model, [name] * len(layers(model)), tables) <= memory]
    return max(fitting, key=lambda name: GRIDS[name].bits) if fitting else None


@torch.no_grad()
def bits_by_layer(
    model: Any, seen: Probes, offered: Sequence[str], budget: tuple[int, str], run: Run
) -> tuple[list[str], dict[str, Any]]:
    """The type of each layer that costs least together, and what each was measured to cost alone.

    Args:
        seen: windows (windows, length) on which a layer of few bits, rounded to nearest, is compared with the dense
            model.
        budget: bytes of all weights; type of embedding and head.

    Raises:
        BillhookError: no types keep within the budget.
    """
    memory, tables = budget
    order = sorted(offered, key=lambda name: -GRIDS[name].bits)
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
