"""AdaPruner: FASP with calibration samples and importance metric that were searched (`billhook.search.adapruner`)."""

from dataclasses import replace
from typing import Any

from billhook.cuts.settings import Narrowing
from billhook.methods.narrowed import NarrowingSettings
from billhook.methods.searched import SearchedSettings, asked
from billhook.planning.method import LAYOUT, Method, Opened, Planned, Run, Text, Texts
from billhook.planning.recipe import Recipe
from billhook.runtime.options import option


class AdaPrunerSettings(NarrowingSettings, SearchedSettings):
    """What may be chosen of the search, and of the cut that it ends with."""

    pool: int = option(64, "windows of calibration text to choose from", ge=1, searching=True)
    pool_len: int = option(128, "tokens in each of them", ge=2, searching=True)
    clusters: int = option(4, "groups of such windows, by subject", ge=1, le=8, searching=True)

    @property
    def restores(self) -> bool:
        return self.cut.restoration

    @property
    def cut(self) -> Narrowing:
        """As the cut takes them: the paper's own space repairs nothing."""
        return replace(super().cut, restoration=False) if self.space == "paper" else super().cut


class AdaPruner(Method):
    name = "adapruner"
    title = "Adaptive Pruning by Bayesian optimisation of calibration samples and importance metric"
    paper = "arXiv:2503.06184"
    does = (
        "Searches which calibration samples and which importance metric prune this model best, and prunes by them. What wins is "
        "restored by FASP's least squares; --space paper keeps to what the paper's abstract names, without. Of the paper no more "
        "than the outline is public."
    )
    needs = "calibration and validation text (extra: search)"
    costs = "one backward pass over a pool of short windows, then a forward pass of a few windows for each trial"
    loads = LAYOUT
    example = "billhook search demo --ratio 0.2 --calibration wiki.txt --calibration news.txt -o smaller"
    Settings = AdaPrunerSettings
    kinds = ("ffn", "heads", "groups")
    default_kinds = ("ffn",)
    trims = False
    command = "search"

    def searches(self, recipe: Recipe) -> bool:
        return True

    def why_whole(self, recipe: Recipe) -> str:
        return "a search tries candidates on the whole model"

    def why_alone(self, recipe: Recipe) -> str:
        return ""

    def why_unforeseen(self, recipe: Recipe) -> str:
        return "a search runs as long as its trials do"

    def draw(self, opened: Opened, recipe: Recipe, text: Text, run: Run) -> Texts:
        from billhook.planning.texts import draw
        from billhook.search.inputs import read_inputs

        inputs = read_inputs(opened, asked(recipe), run.tick)
        return draw(opened, recipe, inputs.calibration, inputs)

    def plan(self, opened: Opened, recipe: Recipe, texts: Texts, run: Run) -> Planned:
        from billhook.planning.axis_plan import axis_plan
        from billhook.search.adapruner import search

        settings = recipe.settings.cut
        base = axis_plan(opened, recipe, settings, texts, {}, run)
        won = search(opened.model, asked(recipe), base, texts.search, texts.calibration, settings, run)
        return Planned(won.plan, settings, won.scores, {"search": won.record})

    def carry_out(self, model: Any, texts: Texts, planned: Planned, run: Run) -> dict[str, Any]:
        from billhook.cuts.narrowing import narrow

        return {"cuts": narrow(model, texts.calibration, planned.plan, planned.settings, run, planned.scores)}


METHOD = AdaPruner()
