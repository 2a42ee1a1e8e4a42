"""Fewer experts in every layer of a mixture: dropped or merged.

On the calibration text, for each layer, g_j(x) is the router's weight of expert j for a token x that goes to it, E_j(x)
what the expert puts out. `reap`       drops those of lowest mean g_j(x) ||E_j(x)|| over their tokens: REAP
(arXiv:2510.13999), whose authors find
             dropping better than merging where a model writes text.
`frequency`  drops those that fewest tokens go to.
`random`     drops any: the control.
`uncurl`     merges those whose router logits are alike: UNCURL (arXiv:2409.01483), billhook.math.merging.  The router's
row of a
             group is the mean of its members', weighted as they are.
The router keeps choosing `top_k` among those that stay, and what it gives them is normalised as the family does.
UNCURL reduces for a task: the calibration text says which.
"""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from transformers import PreTrainedModel

from billhook.calibration.forward import run_layer
from billhook.calibration.passage import Route
from billhook.calibration.routers import Mixture, Routing, mixtures
from billhook.cuts.settings import Reducing as Settings
from billhook.math import merging, selection
from billhook.models.axes import Axis, axes, owners
from billhook.models.plan import Cut, Plan, UnitScores
from billhook.models.surgery import drop_layers, remove, without
from billhook.runtime.progress import Clock
from billhook.runtime.run import Run
from billhook.tensors import Scores, Tokens, Units, precise


@torch.no_grad()
def reduce_experts(
    model: PreTrainedModel,
    tokens: Tokens,
    plan: Plan,
    settings: Settings,
    run: Run,
    _: UnitScores | None = None,
) -> list[Cut]:
    """Take experts away by a plan, in place.

    Args:
        tokens: calibration windows (windows, length).

    Returns:
        what became of each mixture: relative errors of what it puts out, without and with the merge.
    """
    if plan.empty:
        return []
    draw, cuts = torch.Generator().manual_seed(settings.seed), [Cut(**one) for one in run.finished.found]
    for cut in cuts:
        _at_random(cut.units, draw)  # as the earlier run did, so that the rest are drawn alike
    by_layer = {axis.layer: axis for axis in axes(model, ("experts",))}
    for layer in mixtures(model, tokens, run, Route(settings.stream)):
        n, count = layer.layer, plan.drops.get((layer.layer, "experts"), 0)
        if count and n not in plan.layers:
            cut, drop = _reduced(model, by_layer[n], layer, count, settings.way, draw, run.clock)
            with run.clock("saving"):
                run.finished.save(n, [asdict(cut)], [(by_layer[n], drop)])
            cuts.append(cut)
        layer.seen.clear()  # states of all of the text, which would stay until the next layer's are there
    drop_layers(model, plan.layers)
    return cuts


def _reduced(
    model: PreTrainedModel, axis: Axis, layer: Mixture, count: int, way: str, draw: torch.Generator, clock: Clock
) -> tuple[Cut, Units]:
    with clock("score"):
        routing = layer.routing
        groups = _alike(routing, axis.units - count, axis.blocks) if way == "uncurl" else []
        drop = (
            _others(groups, routing) if groups else selection.lowest(_scores(way, routing, draw), count, axis.blocks)[0]
        )
    with clock("errors"), without(model, [(axis, drop)]):
        dropped = _error(layer, held_out=False)
    with clock("surgery"):
        for members in groups:
            _merge(model, axis, members, routing)
        remove(model, axis, drop)
    with clock("errors"):
        share = float(routing.output[drop].sum() / routing.output.sum()) if routing.output.sum() > 0 else 0.0
        own, held = _error(layer, held_out=False), _error(layer, held_out=True)
    return Cut(axis.layer, axis.kind, axis.units, len(drop), 0.0, dropped or 0.0, own or 0.0, held, share), drop


def _scores(way: str, routing: Routing, draw: torch.Generator) -> Scores:
    every: Mapping[str, Scores] = {
        "reap": routing.saliency,
        "frequency": routing.frequency,
        "random": _at_random(len(routing.frequency), draw),
    }
    return every[way]


def _at_random(units: int, draw: torch.Generator) -> Scores:
    return torch.rand(units, generator=draw, dtype=torch.float64)


def _alike(routing: Routing, left: int, blocks: int) -> list[list[int]]:
    """Experts to merge, `left` groups in all: where the router has groups of its own, as many from each."""
    size, found = len(routing.frequency) // blocks, []
    for start in range(0, len(routing.frequency), size):
        own = slice(start, start + size)
        members = merging.groups(routing.logits[own, own], left // blocks)
        found += [[start + one for one in some] for some in members]
    return found


def _reference(members: list[int], routing: Routing) -> int:
    return max(members, key=lambda one: (float(routing.frequency[one]), -one))


def _others(groups: list[list[int]], routing: Routing) -> Units:
    gone = {one for members in groups for one in members} - {_reference(members, routing) for members in groups}
    return torch.tensor(sorted(gone), dtype=torch.long)


def _merge(model: PreTrainedModel, axis: Axis, members: list[int], routing: Routing) -> None:
    """Steps 3 and 4 on one group: its reference becomes what they are together."""
    if len(members) == 1:
        return
    listed: Any = model.get_submodule(axis.modules)
    reference, frequency = listed[_reference(members, routing)], routing.frequency[members]
    turned: dict[str, list[torch.Tensor]] = {name: [] for name, _ in reference.named_parameters()}
    for one in (listed[number] for number in members):
        pairs = [
            (a.weight.T, b.weight.T) if name == "down_proj" else (a.weight, b.weight)
            for (name, a), b in zip(reference.named_children(), one.children(), strict=True)
        ]
        order = merging.aligned([(a.cpu(), b.cpu()) for a, b in pairs]).to(one.down_proj.weight.device)
        for name, param in one.named_parameters():
            by_input = name == "down_proj.weight"
            turned[name].append(param if name == "down_proj.bias" else param[:, order] if by_input else param[order])
    for name, weights in turned.items():
        reference.get_parameter(name).copy_(merging.weighted(weights, frequency))
    for _, router, leaf in owners(model, axis):
        rows = getattr(router, leaf).data
        rows[_reference(members, routing)] = merging.weighted(list(rows[members]), frequency)


def _error(layer: Mixture, *, held_out: bool) -> float | None:
    """||B'(x) - B(x)||_F / ||B(x)||_F of the mixture as it is now; None without windows of that side."""
    off, whole = 0.0, 0.0
    for given, put_out, side in layer.seen:
        if side == held_out:
            x, y = given.read(), put_out.read()
            off += float(precise((run_layer(layer.block, x, {}) - y).float().square()).sum())
            whole += float(precise(y.float().square()).sum())
    return (off / whole) ** 0.5 if whole > 0 else None
