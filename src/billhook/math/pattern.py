"""Sparsity patterns: a share of zeros, or N of every M neighbours along the input.  Loads no torch."""

import re
from dataclasses import dataclass

from billhook.errors import SettingsError


@dataclass(frozen=True)
class Pattern:
    """Either a share of zeros (`sparsity`), or exactly `zeros` in every `group` of consecutive weights of a row."""

    sparsity: float | None = None
    zeros: int | None = None  # N
    group: int | None = None  # M

    def __post_init__(self) -> None:
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
        return f"{100 * (self.sparsity or 0):g}%" if self.group is None else f"{self.zeros}:{self.group}"


def parse(text: str) -> Pattern:
    """The pattern "N:M": N zeros in every group of M weights.

    Raises:
        BillhookError: the text is not of that form, or N is not from 1 to M - 1.
    """
    match = re.fullmatch(r"\s*(\d+)\s*:\s*(\d+)\s*", text)
    if match is None:
        raise SettingsError(f"pattern {text!r} is not N:M (N zeros in every M weights of a row), as in 2:4")
    return Pattern(zeros=int(match[1]), group=int(match[2]))


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
