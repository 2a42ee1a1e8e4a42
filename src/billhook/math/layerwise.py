"""The layer-wise problem of one linear layer to sparsify: its target output, errors, and the best weight on a support.

W (out, in) is the weight; X* (tokens, in) is its input after pruning, G = X*^T X*; Y (tokens, out) is the target
output, by default the dense weight's output for the same input, Y = X* W^T; C = Y^T X*.
The support of a weight is the set of entries that may be nonzero.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from billhook.errors import one_of
from billhook.math.pattern import Pattern
from billhook.math.sparsity import Support
from billhook.tensors import Columns, Cross, Gram, Weight

STRETCH = 40  # iterations of a refit between two residuals that are computed in float64
Rows = Tensor  # float64 (out,), one number for each output of a weight


@dataclass(frozen=True)
class Target:
    """Sums over the calibration text, in float64; without `cross` the target output is the dense weight's own."""

    gram: Gram
    cross: Cross | None = None  # C = Y^T X*
    energy: Rows | None = None  # ||Y_:,i||^2 of each output; needed with `cross`

    def __post_init__(self) -> None:
        if (self.cross is None) != (self.energy is None):
            raise ValueError(
                "a target with a cross-correlation needs the energy of the outputs, and the other way round"
            )


@dataclass(frozen=True)
class Settings:
    """Settings of all solvers together; each documents which of them it reads."""

    damping: float = 1e-2  # ridge as a share of the mean diagonal of G
    zeros: Tensor | None = None  # Bool (out, in), entries that have to stay zero
    refit: bool = False  # least squares on the support; FISTAPruner does it after every rounding
    refit_iterations: int = 30
    block: int = 128  # SparseGPT: columns between two updates of the later ones
    init: str | None = None  # FISTAPruner, ADMM: method whose weight they start from; None for their own choice
    normalised: bool = False  # FISTAPruner: columns of unit energy
    iterations: int = 20  # FISTAPruner: K; ADMM: all iterations
    ratio: float = 0.3  # FISTAPruner: xi
    patience: int = 3  # FISTAPruner: T
    rounds: int = 8  # FISTAPruner: the most runs of FISTA
    gradual: int = 15  # ADMM: iterations over which the sparsity rises
    rho: float = 1.0  # ADMM: penalty
    metric: str = ""  # OptiShear: alpha,F1,beta,F2
    tokens: int = 0  # OptiShear: number of tokens in the sum G


@dataclass(frozen=True)
class SparseWeight:
    """A sparse weight in float64, zero outside its support."""

    weight: Weight
    damping: float  # damping that the method used
    note: dict[str, float | int]  # counts of the method, for the report


Prune = Callable[[Weight, Target, Pattern, Settings], SparseWeight]  # type of every solver of one linear layer


def target_cross(W: Weight, target: Target) -> Cross:
    """C = Y^T X*; equals W G if the target is the dense weight's own output."""
    return W.double() @ target.gram if target.cross is None else target.cross


def squared_error(V: Weight, W: Weight, target: Target) -> Rows:
    """||X* V_i^T - Y_i||^2 of every output i.

    From sums alone: v G v^T - 2 v c^T + ||y||^2; if Y = X* W^T, (v - w) G (v - w)^T, which has no cancellation.
    """
    if target.cross is None or target.energy is None:
        D = V.double() - W.double()
        return ((D @ target.gram) * D).sum(1).clamp(min=0)
    V64 = V.double()
    return ((V64 @ target.gram - 2 * target.cross) * V64).sum(1).add(target.energy).clamp(min=0)


def scaled(W: Weight, target: Target) -> tuple[Weight, Target, Columns]:
    """The same problem with inputs of unit energy, and the scale d that undoes it: V = V' / d.

        W' = W D,  G' = D^-1 G D^-1,  C' = C D^-1  with D = diag(d), d_j = sqrt(G_jj), 1 for a dead input

    Errors are the same in both problems.  |V'| is Wanda's score of V.
    """
    d = target.gram.diagonal().sqrt()
    d = torch.where(d > 0, d, 1.0)
    cross = None if target.cross is None else target.cross / d
    return W.double() * d, Target(target.gram / d / d[:, None], cross, target.energy), d


def refit(
    W: Weight, target: Target, mask: Support, damping: float, start: Weight | None = None, iterations: int = 30
) -> Weight:
    """The weight on a support whose output is nearest to the target.

        v_i = argmin over v with support S_i of ||X* v^T - Y_i||^2 + delta ||v - w_i||^2
        v_i (G_SS + delta I) = c_i,S + delta w_i,S          delta = damping * mean(diag G)

    Every row has its own support, so all rows run conjugate gradients in parallel, as in ALPS (arXiv:2406.07831),
    preconditioned by the diagonal and started from `start` (None: W) on the support.  Iterations are in float32, twice
    as fast, on a residual that is computed anew in float64 every `STRETCH` iterations.  A row's result is taken only if
    its error without the ridge is no larger than that of the start.
    """
    W64, G = W.double(), target.gram
    delta = float(damping * G.diagonal().mean())
    first = (W64 if start is None else start.double()).masked_fill(~mask, 0.0)
    V, pull = first.clone(), target_cross(W, target) + delta * W64
    for done in range(0, iterations, STRETCH):
        residual = (pull - V @ G - delta * V) * mask
        V += _step(residual.float(), G.float(), mask, delta, min(STRETCH, iterations - done))
    better = squared_error(V, W, target) <= squared_error(first, W, target)
    return torch.where(better[:, None], V, first)


def _step(residual: Tensor, gram: Tensor, mask: Support, delta: float, iterations: int) -> Tensor:
    """The solution of V_i (G_SS + delta I) = residual_i on every row's support, by conjugate gradients from zero."""
    diagonal = gram.diagonal() + delta
    scale = torch.where(diagonal > 0, 1 / diagonal, 0.0)
    V, P = torch.zeros_like(residual), residual * scale
    before = (residual * P).sum(1, keepdim=True)
    for _ in range(iterations):
        GP = torch.addmm(P, P, gram, beta=delta).mul_(mask)
        # the denominator of a solved row is zero
        step = _ratio(before, (P * GP).sum(1, keepdim=True))
        V.addcmul_(step, P)
        residual.addcmul_(step, GP, value=-1)
        Z = residual * scale
        after = (residual * Z).sum(1, keepdim=True)
        P, before = Z.addcmul_(_ratio(after, before), P), after
    return V


def finish(V: Tensor, W: Weight, target: Target, mask: Support, settings: Settings) -> Weight:
    """V on the support, in float64, refitted if the settings ask for it."""
    V = V.double().masked_fill(~mask, 0.0)  # a product would leave negative zeros
    return refit(W, target, mask, settings.damping, V, settings.refit_iterations) if settings.refit else V


def start(
    methods: Mapping[str, Prune], default: str, W: Weight, target: Target, pattern: Pattern, settings: Settings
) -> SparseWeight:
    """The weight to refine, by `init` or the default: "dense", or the weight of one of the methods, not refitted.

    Weights of dead inputs are set to zero: no zeros cost less, and the size of such a weight says nothing.
    """
    name = one_of("start", settings.init or default, ("dense", *methods))
    if name == "dense":
        begun = SparseWeight(W.double(), settings.damping, {})
    else:
        begun = methods[name](W, target, pattern, replace(settings, refit=False, init=None))
    return replace(begun, weight=begun.weight.masked_fill(dead(target), 0.0))


def dead(target: Target) -> Tensor:
    """Bool (in,), the inputs that are zero in every token.  No error depends on their weights."""
    return target.gram.diagonal() == 0


def nearer(V: Weight, first: Weight, W: Weight, target: Target) -> bool:
    """Whether V's error over all outputs is no larger than that of `first`; never if it is NaN."""
    return bool(squared_error(V, W, target).sum() <= squared_error(first, W, target).sum())


def _ratio(above: Tensor, below: Tensor) -> Tensor:
    return torch.where(below > 0, above / below, 0.0)
