"""Which weights of a matrix go: a share of all, or N of every M neighbours along the input, counted exactly."""

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from billhook.errors import BillhookError, one_of
from billhook.tensors import Weight

Support = Tensor  # Bool (out, in): which entries of a weight may be other than zero
WITHIN = ("row", "matrix")


@dataclass(frozen=True)
class Pattern:
    """Either a share of zeros (`sparsity`), or exactly `zeros` in every `group` of consecutive weights of a row."""

    sparsity: float | None = None
    zeros: int | None = None  # N
    group: int | None = None  # M

    def __post_init__(self) -> None:
        if self.zeros is not None and self.group is not None and self.sparsity is None:
            if self.zeros < 1:
                raise BillhookError(f"pattern {self}: N counts the zeros of each group and is at least 1")
            if self.zeros >= self.group:
                raise BillhookError(f"pattern {self}: N zeros in every M weights leave nothing unless N is below M")
        elif self.sparsity is None or self.zeros is not None or self.group is not None:
            raise BillhookError("a pattern is either a share of zeros or N zeros in every M weights")
        elif not 0 <= self.sparsity <= 1:
            raise BillhookError(f"sparsity {self.sparsity:g} is not a share between 0 and 1")

    @property
    def share(self) -> float:
        """Fraction of the weights that are zero."""
        if self.zeros is not None and self.group is not None:
            return self.zeros / self.group
        return self.sparsity or 0.0

    def __str__(self) -> str:
        return f"{100 * (self.sparsity or 0):g}%" if self.group is None else f"{self.zeros}:{self.group}"


def parse(text: str) -> Pattern:
    """The pattern "N:M": N zeros in every group of M weights.

    Raises:
        BillhookError: the text is not of that form, or N is not from 1 to M - 1.
    """
    found = re.fullmatch(r"\s*(\d+)\s*:\s*(\d+)\s*", text)
    if found is None:
        raise BillhookError(f"pattern {text!r} is not N:M (N zeros in every M weights of a row), as in 2:4")
    return Pattern(zeros=int(found[1]), group=int(found[2]))


def parse_layer_sparsity(text: str) -> dict[int, float]:
    """`0:0.3,29:0.7` as a mapping.

    Raises:
        BillhookError: it is not written like that.
    """
    found = {}
    for part in filter(None, (one.strip() for one in text.split(","))):
        number, _, share = part.partition(":")
        try:
            found[int(number)] = float(share)
        except ValueError:
            raise BillhookError(
                f"--layer-sparsity {part!r}: write LAYER:SHARE with commas, like 0:0.3,29:0.7"
            ) from None
    return found


def check(pattern: Pattern, columns: int, name: str) -> None:
    """Refuse a pattern whose groups do not tile the input of the weight called `name`.

    Raises:
        BillhookError: M does not divide the number of columns.
    """
    if pattern.group is not None and columns % pattern.group:
        raise BillhookError(f"{name} has {columns} inputs, which groups of {pattern.group} ({pattern}) do not divide")


def keep_mask(scores: Weight, pattern: Pattern, within: str = "row", zeros: Support | None = None) -> Support:
    """True where a weight stays: all but the lowest scores, exactly as many as the pattern says, ties included.

    A share s drops round(s in) of each row (`within="row"`) or round(s out in) of the whole (`"matrix"`); N:M drops N of
    every M consecutive inputs whatever `within`.  Among ties the lower index goes first.  `zeros` marks entries that have
    to go: they are the first to count, and where there are more of them than the pattern asks for, all of them go.
    """
    one_of("scope of a sparsity pattern", within, WITHIN)
    if zeros is not None:
        scores = scores.masked_fill(zeros, -torch.inf)
    if pattern.group is not None and pattern.zeros is not None:
        groups, count = scores.reshape(-1, pattern.group), pattern.zeros
    else:
        groups = scores if within == "row" else scores.reshape(1, -1)
        count = round(pattern.share * groups.shape[1])
    stay = ~lowest_mask(groups, count).view(scores.shape)
    return stay if zeros is None else stay & ~zeros


def lowest_mask(scores: Tensor, count: int) -> Tensor:
    """True at the `count` lowest of every row of scores (groups, size); among ties, at the lower index."""
    if count == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    # selection, then ties by their place: several times faster than a stable sort of a whole matrix
    threshold = scores.kthvalue(count, dim=1, keepdim=True).values
    below, tied = scores < threshold, scores == threshold
    room = count - below.sum(1, keepdim=True)
    return below | (tied & (tied.cumsum(1) <= room))


SPARSE_SHARE = (
    0.05  # share of exact zeros from which a model was masked: rounding leaves some in a million, masks a tenth or more
)
