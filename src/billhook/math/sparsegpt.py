"""SparseGPT: Massive Language Models Can be Accurately Pruned in One-Shot (Frantar & Alistarh 2023, arXiv:2301.00774).

H = G + delta I, delta = damping * mean(diag G);  H^-1 = U^T U, U upper triangular.  From left to right, in blocks:
1. Mask         of the weights of the block in all rows, those of smallest w_ij^2 / U_jj^2; N:M at every M-th column;
                square blocks of weights by the means of that.
2. Sweep        column j gives up its pruned weights, and its error e = (w - q) / U_jj goes to the columns right of it:
                W_:,k -= e U_jk, at once within the block, at its end for the rest.
Should the sweep end further off than W on the mask, as it can where damping is next to none, that is the answer.

Where this differs from the published code.  The number of zeros is exact over the matrix; the factor comes from one
Cholesky of the reversed H, without its inverse.  A target of its own is met exactly: with
W' = W + (C - W G)(G + delta I)^-1 the error is ||(V - W') X*^T||^2 plus a constant (for delta = 0), so W' is pruned.
"""

import torch
from torch import Tensor

from billhook.math import sparsity
from billhook.math.layerwise import Settings, SparseWeight, Target, dead, finish, nearer
from billhook.math.linalg import factor
from billhook.math.pattern import Pattern
from billhook.math.sparsity import Support
from billhook.tensors import Gram, Weight


def prune(W: Weight, target: Target, pattern: Pattern, settings: Settings) -> SparseWeight:
    """Sweep a weight.  Reads of the settings: damping, zeros, refit, block."""
    idle = dead(target)
    gram = target.gram + torch.diag(idle.to(target.gram.dtype))
    U, used = inverse_factor(gram, settings.damping)
    aim = moved(W.double().masked_fill(idle, 0.0), target, U)
    # the sweep passes over the weights once: float32 is exact enough, and twice as fast
    swept, mask = sweep(aim.float(), U.float(), pattern, settings)
    plain = W.double().masked_fill(~mask | idle, 0.0)
    swept = swept if nearer(swept, plain, W, target) else plain
    return SparseWeight(finish(swept, W, target, mask, settings), used, {"dead": int(idle.sum())})


def inverse_factor(gram: Gram, damping: float) -> tuple[Gram, float]:
    """Upper U with U^T U = (G + delta I)^-1, and the damping that it took.

    With J the reversal, J H J = L L^T makes R = J L J upper with H = R R^T: U = R^-1.
    """
    lower, used = factor(gram.flip(0, 1), damping)
    eye = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    return torch.linalg.solve_triangular(lower.flip(0, 1), eye, upper=True), used


def moved(W: Weight, target: Target, U: Gram) -> Weight:
    """W' in place of W, float64, where the target is not W's own output; U: the factor of `inverse_factor`."""
    W64 = W.double()
    return W64 if target.cross is None else W64 + (target.cross - W64 @ target.gram) @ U.T @ U


def sweep(W: Weight, U: Gram, pattern: Pattern, settings: Settings) -> tuple[Weight, Support]:
    """The weight after step 2 over all blocks, and its support."""
    out, columns = W.shape
    V = W.T.contiguous()  # columns lie together, as the sweep reads them
    stay = torch.ones(V.shape, dtype=torch.bool, device=W.device)
    forced = None if settings.zeros is None else settings.zeros.T
    quota = Quota(pattern, out * columns, forced)
    together = pattern.group or pattern.side  # columns that are masked at one time
    width = max(settings.block // together, 1) * together
    span = width if pattern.group is None else pattern.group
    for start in range(0, columns, width):
        end = min(start + width, columns)
        errors = torch.empty_like(V[start:end])
        for j in range(start, end):
            if (j - start) % span == 0:
                part = slice(j, min(j + span, end))
                # what overflows on an input that is as good as dead is no number, which nothing could be compared with
                scores = (V[part].square() / U.diagonal()[part, None].square()).nan_to_num_(
                    nan=torch.inf, posinf=torch.inf
                )
                stay[part] = quota.keep(scores, None if forced is None else forced[part])
            e = V[j] * ~stay[j] / U[j, j]
            V[j:end].addr_(U[j, j:end], e, alpha=-1)
            errors[j - start] = e
        V[end:].addmm_(U[start:end, end:].T, errors, alpha=-1)
    return V.T * stay.T, stay.T.contiguous()


class Quota:
    """Hands out zeros, part by part of the columns, so that their number is exact in the end.

    What has to be zero comes first; of the others every part gives the same share, rounded so that the sum is right.
    Weights count one by one, or by the pattern's square blocks.
    """

    def __init__(self, pattern: Pattern, entries: int, forced: Support | None) -> None:
        self.pattern = pattern
        total, known = entries // pattern.side**2, self._known(forced)
        self.share = max(round(pattern.share * total) - known, 0) / max(total - known, 1)
        self.seen = self.given = 0

    def _known(self, forced: Support | None) -> int:
        return 0 if forced is None else int(sparsity.whole_blocks(forced, self.pattern.side).sum())

    def keep(self, scores: Tensor, forced: Tensor | None) -> Tensor:
        """Which entries of scores (columns, out) stay."""
        if self.pattern.group is not None:
            return sparsity.keep_mask(scores.T, self.pattern, zeros=None if forced is None else forced.T).T
        side, known = self.pattern.side, self._known(forced)
        means = sparsity.block_means(scores, side)
        self.seen += means.numel() - known
        count = round(self.share * self.seen) - self.given
        self.given += count
        free = means if forced is None else means.masked_fill(sparsity.whole_blocks(forced, side), -torch.inf)
        stay = ~sparsity.lowest_mask(free.reshape(1, -1), count + known).view(means.shape)
        stay = sparsity.spread(stay, side)
        return stay if forced is None else stay & ~forced
