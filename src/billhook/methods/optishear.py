"""OptiShear: Wanda's score with transformed parts, which ones is searched (`billhook.search.optishear`)."""

from typing import Any

from billhook.choices import SAMPLERS
from billhook.errors import SettingsError
from billhook.math import metric
from billhook.methods.searched import SearchedSettings, asked
from billhook.methods.zeros import ZerosMethod, ZerosSettings
from billhook.planning.method import Method, Opened, Planned, Run, Text, Texts
from billhook.planning.recipe import Recipe
from billhook.runtime.options import option


class OptiShearSettings(ZerosSettings, SearchedSettings):
    """A metric, or how to search for one."""

    sampler: str = option("nsga2", ", ".join(SAMPLERS), names=SAMPLERS, searching=True)
    metric: str = option("", "alpha,F1,beta,F2 of its score", shown="searched")

    @property
    def solver(self) -> dict[str, Any]:
        return {"metric": self.metric and str(metric.parse(self.metric))}


class OptiShear(ZerosMethod):
    name = "optishear"
    title = "OptiShear: evolutionary metric search for each model"
    paper = "arXiv:2502.10735"
    does = (
        "Transforms the parts of Wanda's score; which transformation is searched, unless --metric names it. "
        "`billhook search --method optishear` has the options of the search. Nothing is repaired unless --refit."
    )
    needs = "calibration and validation text (extra: search)"
    costs = "two forward passes, then one of a few windows for each trial"
    example = "billhook search demo --method optishear --sparsity 0.5 --calibration wiki.txt -o sparse"
    Settings = OptiShearSettings
    command = "search"

    def fits(self, recipe: Recipe) -> None:
        super().fits(recipe)
        if recipe.settings.metric:
            metric.parse(recipe.settings.metric)
        elif recipe.settings.refit:
            raise SettingsError(
                "--refit repairs weights, and the search tries metrics without: search first, then give its --metric with --refit"
            )

    def searches(self, recipe: Recipe) -> bool:
        return not recipe.settings.metric

    def why_whole(self, recipe: Recipe) -> str:
        return "a search tries candidates on the whole model" if self.searches(recipe) else ""

    def why_unforeseen(self, recipe: Recipe) -> str:
        return "a search runs as long as its trials do" if self.searches(recipe) else ""

    def why_alone(self, recipe: Recipe) -> str:
        if not self.searches(recipe):
            return super().why_alone(recipe)
        return "the search for a metric of zeros works in one process: leave it out"

    def why_apart(self, recipe: Recipe, count: int) -> str:
        return Method.why_apart(self, recipe, count) if self.searches(recipe) else ""

    def draw(self, opened: Opened, recipe: Recipe, text: Text, run: Run) -> Texts:
        if recipe.settings.metric:
            return super().draw(opened, recipe, text, run)
        from billhook import data
        from billhook.planning.texts import draw
        from billhook.search.inputs import read_texts

        texts = read_texts(opened, asked(recipe), run.tick)
        return draw(opened, recipe, data.joined(texts.calibration), texts)

    def plan(self, opened: Opened, recipe: Recipe, texts: Texts, run: Run) -> Planned:
        planned = super().plan(opened, recipe, texts, run)
        if recipe.settings.metric:
            return planned
        from billhook.search.optishear import search

        won = search(opened.model, asked(recipe), planned.settings, texts.search, texts.calibration, run)
        return Planned(planned.plan, won.masking, record={"search": won.record})


METHOD = OptiShear()
