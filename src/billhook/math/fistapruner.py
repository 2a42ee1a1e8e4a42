"""FISTAPruner: convex layer-wise pruning by an l1 penalty (Zhao et al., arXiv:2408.03728, EMNLP 2025).

W (out, in) is the dense weight, X* what enters it after pruning, Y the wanted output;  G = X*^T X*,  C = Y^T X*.
1. FISTA        min_V 1/2 ||X* V^T - Y||_F^2 + lambda sum |V_ij|, K iterations from the best weight so far, L = ||G||_2.
2. Rounding     the smallest |V_ij| go to zero until the pattern holds exactly; the best such weight is kept.
3. Penalty      E_total is the error after rounding, E_round what rounding added.  Where E_round / E_total > xi rounding
                dominates, lambda rises; elsewhere it falls: bisection, until T runs in a row have not helped.

The start is another method's weight, rounded to the pattern: the result is never further off than that.

Our reading, since the paper's body was not at hand (abstract, reviews and the authors' answers were).  Errors are
Frobenius norms, not squares.  Bisection is geometric, from [SMALLEST max|C|, max|C|]: at its upper end V = 0 is
optimal, below its lower end the penalty does nothing that rounding does not.  T counts runs without a gain, K has no
early stop.
Beyond the paper.  Weights that the penalty set to zero but the pattern would keep take one gradient step,
so that the number of zeros is exact.  `normalised` gives the inputs unit energy first: outlier channels no longer set L
for all, the penalty is lambda sum |V_ij| ||X_j||, and rounding uses Wanda's score.  `refit` solves least squares on the
support after every rounding, before its error counts.  A recipe has both unless told otherwise (docs/LOG.md).
"""

import math
from dataclasses import dataclass, replace

import torch

from billhook.math import magnitude, sparsegpt, sparsity, wanda
from billhook.math.layerwise import (
    Settings,
    SparseWeight,
    Target,
    dead,
    finish,
    scaled,
    squared_error,
    start,
    target_cross,
)
from billhook.math.pattern import Pattern
from billhook.math.sparsity import Support
from billhook.tensors import Cross, Gram, Weight

STARTS = {"magnitude": magnitude.prune, "wanda": wanda.prune, "sparsegpt": sparsegpt.prune}
SMALLEST = 1e-6  # lower end of the bisection, as a share of max|C|
POWER_STEPS = 50
IN_THE_LOOP = 10  # iterations of a refit there; as good as 30, which its last one takes (docs/LOG.md)
SAFETY = 1.01  # power iteration comes from below


def prune(W: Weight, target: Target, pattern: Pattern, settings: Settings) -> SparseWeight:
    """Refine a start (`init`; None: sparsegpt) by rounds of steps 1 to 3.

    Reads of the settings: init, normalised, refit, refit_iterations, iterations, ratio, patience, rounds, zeros, and
    what the start reads.
    """
    begun = start(STARTS, "sparsegpt", W, target, pattern, settings)
    dense, scale = W.double(), None
    if settings.normalised:
        dense, target, scale = scaled(dense, target)
    V = begun.weight if scale is None else begun.weight * scale
    C = target_cross(dense, target)
    bracket = [SMALLEST * float(C.abs().max()), float(C.abs().max())]
    # iterates in float32, twice as fast in products and memory; what they are worth is judged in float64
    L = largest_eigenvalue(target.gram)
    smooth = Smooth(dense.float(), target.gram.float(), (C - dense @ target.gram).float(), L)
    within = replace(settings, refit_iterations=min(IN_THE_LOOP, settings.refit_iterations))
    mask, best, error = rounded(V, dense, target, pattern, within)
    first, idle, gains, ran, chosen = error, 0, 0, 0, 0.0
    while idle < settings.patience and ran < settings.rounds and bracket[1] > 0:
        penalty = math.sqrt(bracket[0] * bracket[1])
        V = fista(V.float(), smooth, penalty, settings.iterations, settings.zeros).double()
        before = error_of(V, dense, target)
        stay, candidate, after = rounded(V, dense, target, pattern, within)
        dominates = after - before > settings.ratio * after
        bracket[0 if dominates else 1] = penalty
        ran, idle = ran + 1, idle + 1
        if after < error:
            mask, best, error, idle, gains, chosen = stay, candidate, after, 0, gains + 1, penalty
        V = best
    best = filled(finish(best, dense, target, mask, settings), dense, target, mask, L)
    note: dict[str, float | int] = {
        "runs": ran,
        "gains": gains,
        "penalty": chosen,
        "start_error": first,
        "error": error_of(best, dense, target),
    }
    return SparseWeight(best if scale is None else best / scale, begun.damping, note)


@dataclass(frozen=True)
class Smooth:
    """The part of the problem that has a gradient, (V - centre) G - lack.

    lack = C - centre G, so that it is that of the difference from the dense weight: small numbers, which float32 can
    hold.
    """

    centre: Weight
    gram: Gram
    lack: Cross
    L: float  # a bound of the largest eigenvalue of G


def fista(V: Weight, smooth: Smooth, penalty: float, iterations: int, zeros: Support | None = None) -> Weight:
    """Step 1, in the dtype of its tensors: `iterations` accelerated proximal gradient steps from V.

    Y = Z - ((Z - centre) G - lack) / L;  V = sign(Y) max(|Y| - lambda / L, 0);  Z = V + (t - 1) / t' (V - V_before)
    """
    centre, L = smooth.centre, smooth.L
    gram, lack, Z, t = smooth.gram / L, smooth.lack / L, V, 1.0
    for _ in range(iterations):
        after = torch.nn.functional.softshrink(torch.addmm(lack, Z - centre, gram, alpha=-1).add_(Z), penalty / L)
        if zeros is not None:
            after.masked_fill_(zeros, 0.0)
        later = (1 + math.sqrt(1 + 4 * t * t)) / 2
        V, Z, t = after, torch.lerp(V, after, 1 + (t - 1) / later), later
    return V


def rounded(
    V: Weight, W: Weight, target: Target, pattern: Pattern, settings: Settings
) -> tuple[Support, Weight, float]:
    """Step 2: the support, the weight on it (refitted if asked for), and its error."""
    mask = sparsity.keep_mask(V.abs(), pattern, "matrix", settings.zeros)
    V = finish(V, W, target, mask, settings)
    return mask, V, error_of(V, W, target)


def filled(V: Weight, W: Weight, target: Target, mask: Support, L: float) -> Weight:
    """V, where entries of the support that are zero take one gradient step: of length 1/L, it cannot raise the error.
    Those of dead inputs, which no error knows, stay what they were."""
    gradient = V @ target.gram - target_cross(W, target)
    return torch.where(mask & (V == 0), torch.where(dead(target), W, -gradient / L), V)


def error_of(V: Weight, W: Weight, target: Target) -> float:
    """||X* V^T - Y||_F."""
    return math.sqrt(float(squared_error(V, W, target).sum()))


def largest_eigenvalue(gram: Gram) -> float:
    """A little above ||G||_2, by power iteration."""
    v = torch.randn(len(gram), generator=torch.Generator().manual_seed(0), dtype=gram.dtype).to(gram.device)
    for _ in range(POWER_STEPS):
        v = torch.nn.functional.normalize(gram @ v, dim=0)
    # a Gram of zeros has nothing to divide by
    return SAFETY * float(v @ gram @ v) or 1.0
