"""One linear layer to sparsify: what it should put out, how far a sparse weight is from it, and the best one on a support.

W (out, in) is the weight; X* (tokens, in) is what enters it after pruning, G = X*^T X*; Y (tokens, out) is the output
that is wanted, by default the dense weight's own on the same input, Y = X* W^T; C = Y^T X*.
The support of a weight is the set of its entries that may be other than zero.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from billhook.errors import one_of
from billhook.math.pattern import Pattern
from billhook.math.sparsity import Support
from billhook.tensors import Columns, Cross, Gram, Weight

STRETCH = 40  # iterations of a refit between two residuals in float64
Rows = Tensor  # float64 (out,): one number for each output of a weight


@dataclass(frozen=True)
class Target:
    """Sums over the calibration text, in float64; without `cross` the wanted output is the dense weight's own."""

    gram: Gram
    cross: Cross | None = None  # C = Y^T X*
    energy: Rows | None = None  # ||Y_:,i||^2 of each output; goes with cross

    def __post_init__(self) -> None:
        if (self.cross is None) != (self.energy is None):
            raise ValueError(
                "a target with a cross-correlation needs the energy of the outputs, and the other way round"
            )


@dataclass(frozen=True)
class Settings:
    """What may be chosen, for all methods together; each says what it reads."""

    damping: float = 1e-2  # ridge as a share of the mean diagonal of G
    zeros: Tensor | None = None  # Bool (out, in): what has to stay zero
    refit: bool = False  # least squares on the support; FISTAPruner does it after every rounding
    refit_iterations: int = 30
    block: int = 128  # columns that SparseGPT sweeps between two updates of the rest
    init: str | None = None  # whose weight FISTAPruner and ADMM start from; None: the method's own choice
    normalised: bool = False  # FISTAPruner: columns of unit energy
    iterations: int = 20  # FISTAPruner: K; ADMM: of all
    ratio: float = 0.3  # FISTAPruner: xi
    patience: int = 3  # FISTAPruner: T
    rounds: int = 8  # FISTAPruner: runs of FISTA at most
    gradual: int = 15  # ADMM: iterations over which the sparsity rises
    rho: float = 1.0  # ADMM: penalty
    metric: str = ""  # OptiShear: alpha,F1,beta,F2
    tokens: int = 0  # OptiShear: that G is a sum over


@dataclass(frozen=True)
class Found:
    """A sparse weight in float64, zero outside its support; `note` has what the method counted on the way."""

    weight: Weight
    damping: float  # that it took
    note: dict[str, float | int]


Prune = Callable[[Weight, Target, Pattern, Settings], Found]  # what every method of one linear layer is


def wanted(W: Weight, target: Target) -> Cross:
    """C = Y^T X*, which is W G where the dense weight's own output is wanted."""
    return W.double() @ target.gram if target.cross is None else target.cross


def squared_error(V: Weight, W: Weight, target: Target) -> Rows:
    """||X* V_i^T - Y_i||^2 of every output i.

    From sums alone: v G v^T - 2 v c^T + ||y||^2, and where Y = X* W^T, (v - w) G (v - w)^T, which cancels nothing.
    """
    if target.cross is None or target.energy is None:
        D = V.double() - W.double()
        return ((D @ target.gram) * D).sum(1).clamp(min=0)
    V64 = V.double()
    return ((V64 @ target.gram - 2 * target.cross) * V64).sum(1).add(target.energy).clamp(min=0)


def scaled(W: Weight, target: Target) -> tuple[Weight, Target, Columns]:
    """The same layer with inputs of unit energy, and the scale d that undoes it: V = V' / d.

        W' = W D,  G' = D^-1 G D^-1,  C' = C D^-1  with D = diag(d), d_j = sqrt(G_jj), 1 for a dead input

    Errors are the same on both sides.  |V'| is Wanda's score of V.
    """
    d = target.gram.diagonal().sqrt()
    d = torch.where(d > 0, d, 1.0)
    cross = None if target.cross is None else target.cross / d
    return W.double() * d, Target(target.gram / d / d[:, None], cross, target.energy), d


def refit(
    W: Weight, target: Target, mask: Support, damping: float, start: Weight | None = None, iterations: int = 30
) -> Weight:
    """The weight on a support that comes nearest to the wanted output.

        v_i = argmin over v with support S_i of ||X* v^T - Y_i||^2 + delta ||v - w_i||^2
        v_i (G_SS + delta I) = c_i,S + delta w_i,S          delta = damping * mean(diag G)

    Every row has a support of its own, so all rows run conjugate gradients side by side, as ALPS does
    (arXiv:2406.07831), preconditioned by the diagonal and started from `start` (none: W) on the support.  They run in
    float32, twice as fast, on what is left of the residual, which is taken anew in float64 every `STRETCH` iterations.  A
    row is taken only where its error without the ridge is no larger than its start's.
    """
    W64, G = W.double(), target.gram
    delta = float(damping * G.diagonal().mean())
    first = (W64 if start is None else start.double()).masked_fill(~mask, 0.0)
    V, pull = first.clone(), wanted(W, target) + delta * W64
    for done in range(0, iterations, STRETCH):
        residual = (pull - V @ G - delta * V) * mask
        V += _step(residual.float(), G.float(), mask, delta, min(STRETCH, iterations - done))
    better = squared_error(V, W, target) <= squared_error(first, W, target)
    return torch.where(better[:, None], V, first)


def _step(residual: Tensor, gram: Tensor, mask: Support, delta: float, iterations: int) -> Tensor:
    """What solves V_i (G_SS + delta I) = residual_i on every row's support, by conjugate gradients from zero."""
    diagonal = gram.diagonal() + delta
    scale = torch.where(diagonal > 0, 1 / diagonal, 0.0)
    V, P = torch.zeros_like(residual), residual * scale
    before = (residual * P).sum(1, keepdim=True)
    for _ in range(iterations):
        GP = torch.addmm(P, P, gram, beta=delta).mul_(mask)
        # a row that is solved has nothing left to divide by
        step = _ratio(before, (P * GP).sum(1, keepdim=True))
        V.addcmul_(step, P)
        residual.addcmul_(step, GP, value=-1)
        Z = residual * scale
        after = (residual * Z).sum(1, keepdim=True)
        P, before = Z.addcmul_(_ratio(after, before), P), after
    return V


def finish(V: Tensor, W: Weight, target: Target, mask: Support, settings: Settings) -> Weight:
    """V on the support, in float64, refitted where the settings ask for it."""
    V = V.double().masked_fill(~mask, 0.0)  # a product would leave zeros with a sign
    return refit(W, target, mask, settings.damping, V, settings.refit_iterations) if settings.refit else V


def start(
    methods: Mapping[str, Prune], default: str, W: Weight, target: Target, pattern: Pattern, settings: Settings
) -> Found:
    """The weight to refine, `init` or the default: "dense", or that of one of the methods, not refitted.

    Where an input is dead it is zero, whosever it is: no zeros cost less, and none is to be had by the size of such a weight.
    """
    name = one_of("start", settings.init or default, ("dense", *methods))
    if name == "dense":
        begun = Found(W.double(), settings.damping, {})
    else:
        begun = methods[name](W, target, pattern, replace(settings, refit=False, init=None))
    return replace(begun, weight=begun.weight.masked_fill(dead(target), 0.0))


def dead(target: Target) -> Tensor:
    """Bool (in,): the inputs that are zero in every token.  No error knows their weights."""
    return target.gram.diagonal() == 0


def nearer(V: Weight, first: Weight, W: Weight, target: Target) -> bool:
    """Whether V is no further off than `first`, over all outputs: NaN never is."""
    return bool(squared_error(V, W, target).sum() <= squared_error(first, W, target).sum())


def _ratio(above: Tensor, below: Tensor) -> Tensor:
    return torch.where(below > 0, above / below, 0.0)
