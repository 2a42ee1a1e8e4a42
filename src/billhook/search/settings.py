"""What a search reads of a recipe."""

from typing import Any, Protocol, runtime_checkable


@runtime_checkable
class SearchSettings(Protocol):
    """The settings of a search, and those of the prune that it tries; `billhook.pruning.recipe.Recipe` has them all."""

    @property
    def trials(self) -> int: ...  # how many candidates are proposed
    @property
    def minutes(self) -> float | None: ...  # the time that the whole search may take; None: any
    @property
    def space(self) -> str: ...  # what is open to choose: full, paper, or comma-separated names of groups of dimensions
    @property
    def sampler(self) -> str: ...  # a name in SAMPLERS
    @property
    def objective(self) -> str: ...  # a name in SEARCH_OBJECTIVES
    @property
    def seed(self) -> int: ...  # what the sampler, the pool and the order of validation windows are drawn by
    @property
    def calibration(self) -> str: ...  # the texts that calibrate, joined by +
    @property
    def validation(
        self,
    ) -> tuple[str, ...]: ...  # the texts that try candidates; none: an end of each that calibrates
    @property
    def seq_len(self) -> int: ...  # tokens of a calibration window, and of a window that decides
    @property
    def pool(self) -> int: ...  # AdaPruner: windows that calibration samples are chosen from
    @property
    def pool_len(
        self,
    ) -> int: ...  # tokens in each of them, and of an overlap of the texts
    @property
    def clusters(self) -> int: ...  # AdaPruner: groups of such windows
    @property
    def layout(self) -> str: ...  # AdaPruner: uniform or per_layer
    @property
    def floor(self) -> float: ...  # AdaPruner: share of its FFN channels that a layer keeps at least
    @property
    def width_step(self) -> int: ...  # AdaPruner: what widths are a multiple of
    @property
    def restores(self) -> bool: ...  # AdaPruner: whether kept weights are restored

    def model_dump(self, *, mode: str, exclude: set[str]) -> dict[str, Any]:
        """Everything that decides the result, as plain data."""
        ...
