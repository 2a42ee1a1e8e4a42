"""A weight as the product of two thin ones: one factoriser, by four moments of its input.

W (out, in) maps X (tokens, in) to Y = X W^T + b;  mu is the mean of X,  X_k are blocks of its rows with means mu_k.
With a moment M (in, in),

    C = W M W^T,   Q = eigenvectors of C, the largest eigenvalue first,   W ~ Q_r (Q_r^T W)

plain      M = I                                        truncated SVD of W: no text decides
whitened   M = X^T X                                    LLM-ROM (Chavan et al. 2023, arXiv:2312.07046)
centred    M = X^T X - T mu mu^T                        principal components of the output
pooled     M = sum_k (X_k^T X_k - T_k mu_k mu_k^T)      Bolaco (Ji et al. 2024, arXiv:2405.10616)

The last two leave the mean output as it is: b becomes b + (I - Q_r Q_r^T) W mu.  Then ||Y - Y_r||^2 is the sum of the
eigenvalues that are dropped, for `whitened` and `centred` exactly, the least that any product of that rank can have
(Eckart and Young 1936): never above that of `plain` on the same text.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import sqrt

import torch

from billhook.tensors import Bias, Expand, Gram, InputSum, Reduce, Weight, precise

STEP = 8  # ranks are multiples of it: what kernels of half precision like


@dataclass(frozen=True)
class InputSums:
    """Sums over X, float64."""

    gram: Gram  # X^T X
    total: InputSum  # sum of the rows of X
    means: Gram  # sum_k T_k mu_k mu_k^T
    count: int  # T, rows of X

    def __add__(self, other: "InputSums") -> "InputSums":
        return InputSums(
            self.gram + other.gram, self.total + other.total, self.means + other.means, self.count + other.count
        )


def block_sums(gram: Gram, total: InputSum, count: int) -> InputSums:
    """The sums of one block of rows."""
    return InputSums(gram, total, total.outer(total) / count, count)


MOMENTS: dict[str, Callable[[InputSums], Gram]] = {
    "plain": lambda sums: torch.eye(len(sums.gram), dtype=sums.gram.dtype, device=sums.gram.device),
    "whitened": lambda sums: sums.gram,
    "centred": lambda sums: sums.gram - sums.total.outer(sums.total) / sums.count,
    "pooled": lambda sums: sums.gram - sums.means,
}
CENTRED = ("centred", "pooled")  # moments that leave the mean output as it is


@dataclass(frozen=True)
class Factors:
    """Q and Q^T W to the full rank, with the mean output where it is kept: they serve every rank."""

    expand: Expand
    reduce: Reduce
    mean: Bias | None  # W mu

    def cast(self, dtype: torch.dtype) -> "Factors":
        """The same in another dtype."""
        return Factors(self.expand.to(dtype), self.reduce.to(dtype), None if self.mean is None else self.mean.to(dtype))

    def at(self, rank: int) -> tuple[Expand, Reduce, Bias]:
        """Q_r, Q_r^T W, and what is added to b."""
        expand, reduce = self.expand[:, :rank], self.reduce[:rank]
        if self.mean is None:
            return expand, reduce, torch.zeros_like(self.expand[:, 0])
        return expand, reduce, self.mean - expand @ (expand.mT @ self.mean)


def factors(W: Weight, sums: InputSums, moment: str) -> Factors:
    """Factors of a weight by one of `MOMENTS`."""
    W = precise(W).to(sums.gram.device)
    # Y lies in the span of W's columns, so that a tall W is first written in a basis of it
    basis, inner = torch.linalg.qr(W) if W.shape[0] > W.shape[1] else (None, W)
    C = inner @ MOMENTS[moment](sums) @ inner.mT
    Q = torch.linalg.eigh((C + C.mT) / 2).eigenvectors.flip(1)
    mean = W @ sums.total / sums.count if moment in CENTRED else None
    return Factors(Q if basis is None else basis @ Q, Q.mT @ inner, mean)


def output_error(W: Weight, found: tuple[Expand, Reduce, Bias], sums: InputSums) -> float:
    """||X (W - W_r)^T - 1 c^T||_F / ||X W^T||_F, where c is what is added to b."""
    W = precise(W).to(sums.gram.device)
    expand, reduce, added = found
    D = W - expand @ reduce
    square = ((D @ sums.gram) * D).sum() - 2 * added @ D @ sums.total + sums.count * added.square().sum()
    whole = ((W @ sums.gram) * W).sum()
    return sqrt(max(float(square / whole), 0.0)) if whole > 0 else 0.0


def rank_for(share: float, outputs: int, inputs: int) -> int:
    """The largest multiple of `STEP` whose two factors hold at most `share` of the entries of a weight."""
    return STEP * int(share * outputs * inputs / (outputs + inputs) / STEP)
