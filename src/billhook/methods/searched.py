"""Settings of a search, which `billhook search` has."""

from typing import Any

from billhook.choices import GROUPS, SAMPLERS, SEARCH_OBJECTIVES, SPACES
from billhook.planning.method import MethodSettings
from billhook.planning.recipe import Recipe
from billhook.runtime.options import option
from billhook.search.settings import SearchSettings

OF_A_SEARCH = ("trials", "minutes", "space", "sampler", "objective", "validation")
OF_A_POOL = ("pool", "pool_len", "clusters")


class SearchedSettings(MethodSettings):
    """What may be chosen of a search, whatever it searches."""

    trials: int = option(64, "candidates, the known metrics among them", ge=1, searching=True)
    minutes: float | None = option(None, "end with the round after which no other fits in", gt=0, searching=True)
    space: str = option(
        "full",
        f"full, paper, or some of {', '.join(GROUPS)}, with commas",
        completes={**SPACES, **GROUPS},
        searching=True,
    )
    sampler: str = option("tpe", ", ".join(SAMPLERS), names=SAMPLERS, searching=True)
    objective: str = option(
        "nll", "nll: loss of the cut model; kl: divergence from the unpruned", names=SEARCH_OBJECTIVES, searching=True
    )
    validation: tuple[str, ...] = option(
        (),
        "text that candidates are tried on; may be repeated",
        shown="the last fifth of --calibration",
        searching=True,
    )

    @property
    def texts(self) -> tuple[str, ...]:
        return self.validation

    @property
    def restores(self) -> bool:
        """Whether kept weights are refitted."""
        return False


def asked(recipe: Recipe, **given: Any) -> SearchSettings:
    """What a search reads of a recipe; `given` has what the method's settings lack of it."""
    chosen, shape, text = recipe.settings, recipe.shape, recipe.calibration
    decides = {name: value for name, value in recipe.flat().items() if name not in ("trials", "minutes")}
    return SearchSettings(
        **{name: getattr(chosen, name) for name in (*OF_A_SEARCH, *OF_A_POOL) if hasattr(chosen, name)},
        **given,
        calibration=text.source,
        seq_len=text.seq_len,
        seed=text.seed,
        layout=shape.layout,
        floor=shape.floor,
        width_step=shape.width_step,
        restores=chosen.restores,
        decides=decides,
    )
