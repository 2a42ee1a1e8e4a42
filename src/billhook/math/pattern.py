"""Sparsity patterns: a share of zeros, one by one or in blocks, or N of every M neighbours along the input.

Loads no torch.
"""

import re
from dataclasses import dataclass

from billhook.errors import SettingsError

BLOCK = "block"  # block16: blocks of 16 x 16 weights


@dataclass(frozen=True)
class Pattern:
    """Either a share of zeros (`sparsity`), or exactly `zeros` in every `group` of consecutive weights of a row.

    A share may be of square blocks, `side` weights wide and high, which go whole: MLPruning's last level
    (arXiv:2105.14636).
    """

    sparsity: float | None = None
    zeros: int | None = None  # N
    group: int | None = None  # M
    side: int = 1  # of the blocks; 1: weights go one by one

    def __post_init__(self) -> None:
        if self.side < 1 or (self.side > 1 and self.sparsity is None):
            raise SettingsError("blocks are one weight wide or more, and what goes of them is a share")
        if self.zeros is not None and self.group is not None and self.sparsity is None:
            if self.zeros < 1:
                raise SettingsError(f"pattern {self}: N counts the zeros of each group and is at least 1")
            if self.zeros >= self.group:
                raise SettingsError(f"pattern {self}: N zeros in every M weights leave nothing unless N is below M")
        elif self.sparsity is None or self.zeros is not None or self.group is not None:
            raise SettingsError("a pattern is either a share of zeros or N zeros in every M weights")
        elif not 0 <= self.sparsity <= 1:
            raise SettingsError(f"sparsity {self.sparsity:g} is not a share between 0 and 1")

    @property
    def share(self) -> float:
        """Fraction of the weights that are zero."""
        if self.zeros is not None and self.group is not None:
            return self.zeros / self.group
        return self.sparsity or 0.0

    def __str__(self) -> str:
        if self.group is not None:
            return f"{self.zeros}:{self.group}"
        return f"{100 * (self.sparsity or 0):g}%" + (f" {BLOCK}{self.side}" if self.side > 1 else "")


def parse(text: str) -> Pattern:
    """The pattern "N:M": N zeros in every group of M weights.

    Raises:
        BillhookError: the text is not of that form, or N is not from 1 to M - 1.
    """
    match = re.fullmatch(r"\s*(\d+)\s*:\s*(\d+)\s*", text)
    if match is None:
        raise SettingsError(f"pattern {text!r} is not N:M (N zeros in every M weights of a row), as in 2:4")
    return Pattern(zeros=int(match[1]), group=int(match[2]))


def block_side(text: str) -> int:
    """16 of the pattern "block16", whose zeros fill blocks of 16 x 16; 0 of another text."""
    match = re.fullmatch(rf"\s*{BLOCK}([1-9]\d*)\s*", text)
    return int(match[1]) if match else 0


def parse_layer_sparsity(text: str) -> dict[int, float]:
    """`0:0.3,29:0.7` as a mapping.

    Raises:
        BillhookError: the text has another form.
    """
    shares = {}
    for part in filter(None, (item.strip() for item in text.split(","))):
        number, _, share = part.partition(":")
        try:
            shares[int(number)] = float(share)
        except ValueError:
            raise SettingsError(
                f"--layer-sparsity {part!r}: write LAYER:SHARE with commas, like 0:0.3,29:0.7"
            ) from None
    return shares
