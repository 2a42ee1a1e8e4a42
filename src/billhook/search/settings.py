"""What a search reads of a recipe."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class SearchSettings:
    """The settings of a search, and those of the prune that it tries."""

    trials: int  # how many candidates are proposed
    minutes: float | None  # the time that the whole search may take; None: any
    space: str  # what is open to choose: full, paper, or comma-separated names of groups of dimensions
    sampler: str  # a name in SAMPLERS
    objective: str  # a name in SEARCH_OBJECTIVES
    validation: tuple[str, ...]  # the texts that try candidates; none: an end of each that calibrates
    calibration: str  # the texts that calibrate, joined by +
    seq_len: int  # tokens of a calibration window, and of a window that decides
    seed: int  # what the sampler, the pool and the order of validation windows are drawn by
    layout: str  # uniform or per_layer
    floor: float  # share of its FFN channels that a layer keeps at least
    width_step: int  # what widths are a multiple of
    restores: bool  # whether kept weights are restored
    decides: Mapping[str, Any]  # everything that decides the result, as plain data
    pool: int = 0  # windows that calibration samples are chosen from
    pool_len: int = 128  # tokens in each of them, and of an overlap of the texts
    clusters: int = 0  # groups of such windows
