"""What methods whose gates learn on the calibration text have in common."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from billhook.choices import SEARCH_OBJECTIVES
from billhook.cuts.settings import Narrowing
from billhook.errors import SettingsError
from billhook.methods.narrowed import NarrowingSettings
from billhook.planning.method import LAYOUT, Method, MethodSettings, Planned, Run, Texts
from billhook.planning.recipe import Recipe
from billhook.runtime.options import option

CUT = Narrowing(restoration=False, stream="dense")  # where training has made up for what goes


def steps(default: int, least: int = 1) -> Any:
    """How long gates learn."""
    return option(default, "steps of learning", ge=least)


def rate(default: float) -> Any:
    """How fast they do."""
    return option(default, "highest rate of learning; falls to 0 as a cosine", gt=0)


def objective(default: str) -> Any:
    """By what."""
    return option(default, "nll: loss of the cut model; kl: divergence from the unpruned", names=SEARCH_OBJECTIVES)


def adapter_rate() -> Any:
    """How fast adapters train."""
    return option(1e-3, "highest rate of adapters", gt=0)


class GatedSettings(MethodSettings):
    """How gates learn."""

    steps: int = steps(128)
    windows: int = option(1, "windows of a step", ge=1)
    rate: float = rate(0.05)
    objective: str = objective("kl")

    @property
    def learned(self) -> dict[str, Any]:
        """What decides how gates learn, for the record."""
        return self.model_dump(exclude=set(NarrowingSettings.model_fields))


@dataclass(frozen=True)
class Learned:
    """What a cut takes besides its plan."""

    cut: Narrowing = CUT
    updates: Mapping[str, Any] = field(default_factory=dict)  # of adapters, by path of the module
    scales: Mapping[tuple[int, str], Any] = field(default_factory=dict)  # of all units, by (layer, kind)


class GatedMethod(Method):
    """A method that multiplies what units put out by gates, and cuts the units whose gates close."""

    loads = LAYOUT
    kinds = ("ffn", "groups")
    default_kinds = ("ffn",)
    trims = False

    def fits(self, recipe: Recipe) -> None:
        if (windows := recipe.settings.windows) > recipe.samples:
            raise SettingsError(f"--windows {windows}: the calibration has {recipe.samples}: raise --samples")

    def searches(self, recipe: Recipe) -> bool:
        return True

    def why_whole(self, recipe: Recipe) -> str:
        return f"{self.name} learns on the whole model"

    def why_apart(self, recipe: Recipe, count: int) -> str:
        windows = recipe.settings.windows
        return f"--windows {windows} of a step cannot be shared alike: give a multiple" if windows % count else ""

    def why_unforeseen(self, recipe: Recipe) -> str:
        return f"{self.name} decides by what it learns"

    def carry_out(self, model: Any, texts: Texts, planned: Planned, run: Run) -> dict[str, Any]:
        from billhook.cuts.narrowing import narrow
        from billhook.training.adapting import merge
        from billhook.training.gating import fold

        found: Learned = planned.settings
        merge(model, found.updates)
        fold(model, found.scales)
        return {"cuts": narrow(model, texts.calibration, planned.plan, found.cut, run, planned.scores)}
