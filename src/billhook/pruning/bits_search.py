"""QPruner's refinement: types of layers by Bayesian optimisation of a measured loss (arXiv:2412.11629).

A point is three numbers: how far a layer's worth is its mutual information rather than its sensitivity, and how worth
leans and bends over the depth.  Layers are raised from the fewest bits by that worth until the budget is spent
(`math.qpruner`), all weights are rounded to nearest in place, and the loss is the divergence from the dense model's
predictions.  The starts are tried first; what is best of all is the answer.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from billhook.cuts.quantizing import paths
from billhook.math import grids
from billhook.math.grids import GRIDS
from billhook.math.qpruner import raised
from billhook.models.families import layers, weight_of
from billhook.planning.bits import Limit, bits_by_layer, by_information, layer_bytes, smaller_uniform
from billhook.planning.sensitivity import Probe
from billhook.runtime.run import Run
from billhook.search.samplers import Study
from billhook.search.space import Dimension
from billhook.tensors import Probes

TRIALS = 24
DIMENSIONS = {
    "information": Dimension(0.0, 1.0, 0.05),
    "slope": Dimension(-2.0, 2.0, 0.1),
    "bend": Dimension(-2.0, 2.0, 0.1),
}
CENTRE = {"information": 0.0, "slope": 0.0, "bend": 0.0}


@torch.no_grad()
def searched(model: Any, seen: Probes, limit: Limit, run: Run) -> tuple[list[str], dict[str, Any]]:
    """The types of layers of the least measured loss, and what was tried; holds the dense weights besides the model.

    Args:
        seen: windows (windows, length) that the loss is measured on.

    Raises:
        BillhookError: no types keep within the limit; the extra `search` is not installed.
    """
    study = Study(DIMENSIONS, "gp", seed=0)
    starts, why = {}, {}
    for name, start in (("sensitivity", bits_by_layer), ("mi", by_information)):
        starts[name], told = start(model, seen, limit, run)
        why |= told
    if uniform := smaller_uniform(model, limit):
        starts[uniform] = [uniform] * len(layers(model))
    measured = _Measured(model, seen)
    tried = [{"start": name, "kl": measured.loss(types)} for name, types in starts.items()]
    for done in range(TRIALS):
        run.tick("searching bits", done, TRIALS)
        ((number, point),) = study.ask(1, [] if done else [CENTRE, {**CENTRE, "information": 1.0}])
        loss = measured.loss(_decoded(model, limit, point, why))
        study.tell(number, loss)
        tried.append({"start": None, "kl": loss, **point})
    run.tick("searching bits", TRIALS, TRIALS)
    best = min(measured.known, key=measured.known.__getitem__)
    return list(best), {**why, "tried": tried, "by_layer": list(best)}


def _decoded(model: Any, limit: Limit, point: Mapping[str, float], why: Mapping[str, Any]) -> list[str]:
    """The types that a point stands for."""
    types = sorted(limit.types, key=lambda name: GRIDS[name].bits)
    sensitivity = [max(losses[-1] - losses[0], 0.0) for losses in why["losses"]]
    informed, felt = _shares(why["information"]), _shares(sensitivity)
    worth, last = [], max(len(felt) - 1, 1)
    for n, (ours, theirs) in enumerate(zip(informed, felt, strict=True)):
        depth = 2 * n / last - 1
        leaning = math.exp(point["slope"] * depth + point["bend"] * (depth * depth - 1 / 3))
        worth.append(ours ** point["information"] * theirs ** (1 - point["information"]) * leaning)
    sizes, other = layer_bytes(model, limit, types)
    return [types[k] for k in raised(worth, [GRIDS[name].bits for name in types], sizes, limit.memory - other)]


def _shares(values: Sequence[float]) -> list[float]:
    """Positive shares of 1: a layer that was measured to be worth nothing counts a little."""
    least = max(sum(values), 1e-12) / len(values) / 1000
    total = sum(max(value, least) for value in values)
    return [max(value, least) / total for value in values]


class _Measured:
    """The loss of types of layers, each measured once."""

    def __init__(self, model: Any, seen: Probes):
        self.model, self.probe, self.known = model, Probe(model, seen), dict[tuple[str, ...], float]()
        divided = ((n, path, weight_of(model, path)) for n, _, path in paths(model))
        self.dense = [(n, path, W.clone()) for n, path, W in divided if grids.divides(W.shape[1])]

    def loss(self, types: Sequence[str]) -> float:
        """KL in nats a token from the dense model, all weights rounded to nearest; the model is left dense."""
        key = tuple(types)
        if key not in self.known:
            for n, path, W in self.dense:
                weight_of(self.model, path).copy_(grids.nearest(W, GRIDS[types[n]]).values())
            self.known[key] = self.probe.divergence(0)
            for _, path, W in self.dense:
                weight_of(self.model, path).copy_(W)
        return self.known[key]
