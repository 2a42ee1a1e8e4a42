"""AdaPruner's solution space (Kong et al. 2025, arXiv:2503.06184): calibration samples with an importance metric.

The paper's method section is not public; its outline is.  Here a point of the space is a mixture of windows from a pool
and a metric.  The scores at any point are a few sums over what one backward pass over the pool has left
(`UnitEvidence`):

    S = w * dL_n/dw for every entry of a slot in window n;  A_n, B_n, D_n the sums of S, |S|, S^2 over a unit's entries
    pi_n  share of window n in the mixture, summing to 1

A term that is linear in n is exact for every mixture.  A term that takes a modulus after summing over windows
(LLM-Pruner's param_first and param_mix, arXiv:2305.11627) is summed for mixtures of whole clusters only: windows drawn
inside a cluster change it only through the clusters' shares.
"""

import hashlib
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from billhook.models.plan import AxisKey
from billhook.tensors import Clusters, Scores, Shares, SlotMixtures, SlotUnits, SlotWindows, WindowUnits

Levels = tuple[int, ...]  # the weight of a window of each cluster


@dataclass(frozen=True)
class UnitEvidence:
    """What a pool of windows says of the units of one axis, slot by slot: its writers in order, then its reader."""

    signed: SlotWindows  # A
    absolute: SlotWindows  # B
    squared: SlotWindows  # D
    first: SlotMixtures  # sum |S_pi|, S_pi = sum_n pi_n S_n, for every mixture of clusters
    mixed: SlotMixtures  # sum |S_pi - 1/2 sum_n pi_n S_n^2|
    energy: WindowUnits  # sum_c ||W_:,c||_2^2 sum_t x_tc^2 over the reader's columns c of the unit
    magnitude: SlotUnits  # sum w^2


@dataclass(frozen=True)
class PoolEvidence:
    """The evidence of every axis, and which cluster each window of the pool belongs to."""

    units: Mapping[AxisKey, UnitEvidence]
    clusters: Clusters

    @property
    def count(self) -> int:
        return int(self.clusters.max()) + 1


@dataclass(frozen=True)
class Solution:
    """One point: which samples, which metric."""

    levels: Levels  # the weight of each cluster's windows
    count: int = 0  # how many windows are drawn of those whose level is not 0; 0: all
    draw: int = 0  # seed that decides which windows are drawn
    coefficients: Mapping[str, float] = field(default_factory=dict)  # coefficient of each term, by its name in TERMS
    power: float = 1.0  # power that every term is raised to
    reduction: str = "sum"  # how the slots of a unit become one number: a name in REDUCTIONS
    within: bool = True  # whether terms are divided by their mean in the layer, not in the whole model

    def describe(self) -> dict[str, Any]:
        return {**asdict(self), "levels": list(self.levels), "coefficients": dict(self.coefficients)}


Term = Callable[[UnitEvidence, Tensor, int], Tensor]  # evidence, pi, number of the mixture -> (slots or 1, units)
TERMS: dict[str, tuple[Term, str]] = {
    "vectorize": (lambda e, pi, m: (pi @ e.signed).abs(), "|sum_n pi_n A_n|: LLM-Pruner's vector-wise first order"),
    "param_first": (lambda e, pi, m: e.first[m], "sum |w g|, g the mixture's gradient: LLM-Pruner's Element1"),
    "param_second": (lambda e, pi, m: pi @ e.squared, "sum_n pi_n D_n: LLM-Pruner's Element2, a diagonal Fisher"),
    "param_mix": (lambda e, pi, m: e.mixed[m], "both orders: LLM-Pruner's param_mix"),
    "window_first": (lambda e, pi, m: pi @ e.absolute, "sum_n pi_n B_n: first order, window by window"),
    "gate_fisher": (
        lambda e, pi, m: (pi @ e.signed[-1].square())[None],
        "sum_n pi_n A_n^2 of the reader (arXiv:2204.09656)",
    ),
    "magnitude": (lambda e, pi, m: e.magnitude, "sum w^2: no data"),
    "energy": (lambda e, pi, m: (pi @ e.energy)[None], "squared output error of zeroing what reads the unit"),
}
LLM_PRUNER = ("vectorize", "param_first", "param_second", "param_mix")
REDUCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "sum": lambda slots: slots.sum(0),
    "prod": lambda slots: slots.prod(0),
    "max": lambda slots: slots.amax(0),
    "down": lambda slots: slots[-1],  # only the reader
}
FEW = 4  # the most clusters for which windows may also weigh twice


def mixtures(clusters: int) -> list[Levels]:
    """Every mixture of clusters that evidence is gathered for: in lowest terms, so that no two are the same."""
    levels = (0, 1, 2) if clusters <= FEW else (0, 1)
    return [mixture for mixture in itertools.product(levels, repeat=clusters) if 1 in mixture]


def shares(clusters: Clusters, solution: Solution) -> Shares:
    """pi: the share of each window in the mixture, float32."""
    weights = torch.tensor(solution.levels, dtype=torch.float32)[clusters]
    if solution.count and solution.count < int((weights > 0).sum()):
        order = torch.randperm(len(weights), generator=torch.Generator().manual_seed(solution.draw))
        drawn = order[weights[order] > 0][: solution.count]
        weights = torch.zeros_like(weights).index_copy_(0, drawn, weights[drawn])
    return weights / weights.sum()


def scores(evidence: PoolEvidence, solution: Solution) -> dict[AxisKey, Scores]:
    """The importance of every unit at one point of the space.

        s_u = sum_t c_t (R_t,u / mean R_t)^p,   R_t = the reduction of term t over the unit's slots

    The means are over the units of one axis (`within`) or over all of the same kind; float64 from there on.
    """
    pi, mixture = shares(evidence.clusters, solution), mixtures(evidence.count).index(solution.levels)
    reduce = REDUCTIONS[solution.reduction]
    total: dict[AxisKey, Scores] = {}
    for name, coefficient in solution.coefficients.items():
        if coefficient:
            term = TERMS[name][0]
            raw = {place: reduce(term(units, pi, mixture).double()) for place, units in evidence.units.items()}
            means = _means(raw, solution.within)
            for place, values in raw.items():
                part = coefficient * (values / means[place]).pow(solution.power)
                total[place] = total[place] + part if place in total else part
    return total


def _means(raw: Mapping[AxisKey, Tensor], within: bool) -> dict[AxisKey, Tensor]:
    """What each axis's values are divided by; 1 where all of them are 0."""
    means = {place: values.mean() for place, values in raw.items()}
    if not within:
        kinds = {kind for _, kind in raw}
        of_kind = {kind: torch.stack([mean for (_, k), mean in means.items() if k == kind]).mean() for kind in kinds}
        means = {place: of_kind[place[1]] for place in means}
    return {place: mean if mean > 0 else torch.ones_like(mean) for place, mean in means.items()}


def known_metrics(clusters: int, terms: Sequence[str] = tuple(TERMS)) -> dict[str, Solution]:
    """The known metrics, each alone on the whole pool: a search starts from them and never ends behind the best."""
    whole_pool = Solution((1,) * clusters)
    return {name: replace(whole_pool, coefficients={name: 1.0}) for name in terms}


def digest(dropped: Mapping[AxisKey, Tensor]) -> str:
    """A digest of the units that go: equal for equal masks."""
    sha256 = hashlib.sha256()
    for (layer, kind), units in sorted(dropped.items()):
        sha256.update(f"{layer} {kind}".encode() + units.cpu().numpy().tobytes())
    return sha256.hexdigest()[:16]
