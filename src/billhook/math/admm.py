"""Fast and Effective Weight Update for Pruned Large Language Models (Boza 2024, arXiv:2401.02938).

Inputs are scaled to unit energy (W', G', C': `support.scaled`); then, with (G' + delta I + rho I)^-1 formed once, from
SparseGPT's weights V (the paper: from the dense ones; `init`):
1. Mask         from |V + U|, sparsity s (1 - (1 - k/K)^3) after k of the first K iterations, fixed from then on;
2. Projection   Z = (V + U) on the mask;   U = U + V - Z;
3. Ridge        V = (C' + delta W' + rho (Z - U)) (G' + delta I + rho I)^-1.
The answer is (V + U) on the mask, or the start rounded to the pattern, should that be nearer.

A dead input has nothing to put out and no energy to scale: G'_jj is 1 and W'_j is 0 in steps 1 to 3, so that its
weights are the first to go and delta and rho mean to it what they mean to the others; those that the pattern keeps stay
what they were.

Where this differs from the published code.  The one threshold for the matrix follows the cubic schedule (the code
computes it, but applies the final share from the start there); within N:M groups what the groups would keep is exempt
and the lowest of the rest go first, for any N and M.  delta is `damping` (0.1 in the code), the output wanted may be
another than the dense weight's, and `refit` may follow.
"""

import torch

from billhook.math import magnitude, sparsegpt, sparsity, wanda
from billhook.math.layerwise import Settings, SparseWeight, Target, dead, finish, nearer, scaled, start, target_cross
from billhook.math.linalg import factor
from billhook.math.pattern import Pattern
from billhook.math.sparsity import Support
from billhook.tensors import Weight

STARTS = {"magnitude": magnitude.prune, "wanda": wanda.prune, "sparsegpt": sparsegpt.prune}


def prune(W: Weight, target: Target, pattern: Pattern, settings: Settings) -> SparseWeight:
    """Alternate between the mask and the layer.

    Reads of the settings: init (None: sparsegpt), damping, rho, iterations, gradual, refit, zeros, and what the start
    reads.
    """
    begun = start(STARTS, "sparsegpt", W, target, pattern, settings)
    dense, target, scale = scaled(W, target)
    first = begun.weight * scale
    V = first.float()  # heuristic on its way: float32 is exact enough, and twice as fast
    U = torch.zeros_like(V)
    idle = dead(target)
    # so the diagonal of G' is 1, rho counts in its units and one factor damps for both
    lower, total = factor(target.gram + torch.diag(idle.to(target.gram)), settings.damping + settings.rho)
    damping = total - settings.rho
    inverse = torch.cholesky_inverse(lower).float()
    pull = (target_cross(dense, target) + damping * dense.masked_fill(idle, 0.0)).float()
    mask = torch.ones_like(V, dtype=torch.bool)
    stay = sparsity.keep_mask(first.abs(), pattern, "matrix", settings.zeros)
    share = float((~stay).double().mean())  # of zeros: a pattern gives as many whatever the scores
    for k in range(1, settings.iterations + 1):
        if k <= settings.gradual:
            part = 1 - (1 - k / settings.gradual) ** 3
            mask = rising(V + U, pattern, Pattern(sparsity=part * share), settings.zeros)
        Z = (V + U) * mask
        U = U + V - Z
        V = (pull + settings.rho * (Z - U)) @ inverse
    V = (V + U).double().masked_fill(~mask, 0.0)
    first = first.masked_fill(~stay, 0.0)
    if not nearer(V, first, dense, target):
        V, mask = first, stay
    V = finish(torch.where(idle, dense, V), dense, target, mask, settings)
    return SparseWeight(V / scale, damping, {})


def rising(V: Weight, pattern: Pattern, due: Pattern, zeros: Support | None) -> Support:
    """Step 1: the mask when the zeros `due` are, some of those of a pattern; when all are, exactly the pattern."""
    scores = V.abs()
    final = sparsity.keep_mask(scores, pattern, "matrix", zeros)
    return sparsity.keep_mask(scores.masked_fill(final, torch.inf), due, "matrix", zeros)
