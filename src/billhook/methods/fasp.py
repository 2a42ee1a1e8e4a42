"""FASP: the units of an axis that matter least go, and what reads the axis is refitted (`billhook.cuts.narrowing`)."""

from collections.abc import Iterator, Sequence
from typing import Any

from billhook.choices import GRADIENT_SCORES, MIXED, VALUE_BASES
from billhook.errors import BillhookError, SettingsError
from billhook.methods.narrowed import NarrowingSettings
from billhook.planning.method import LAYOUT, Method, Opened, Planned, Run, Texts
from billhook.planning.recipe import Recipe
from billhook.runtime.options import option


class FaspSettings(NarrowingSettings):
    """What may be chosen of the cut and, before it, of the basis of values."""

    value_basis: str = option("principal", f"what a value channel is: {', '.join(VALUE_BASES)}", names=VALUE_BASES)


def _turns(recipe: Recipe) -> bool:
    """Whether values are turned before the cut."""
    return "value" in recipe.kinds and recipe.settings.value_basis == "principal"


class Fasp(Method):
    name = "fasp"
    title = "Fast and Accurate Structured Pruning of LLMs"
    paper = "arXiv:2501.09412"
    does = (
        "Scores the units of an axis layer by layer, takes away the lowest, and refits what reads the axis by least squares. "
        "--score wanda --axes ffn,value --layout per_layer --stream dense is nearest to the paper; value channels (its V/O) need "
        "another attention shape than stock classes have. Layers go whole by --allocation sensitivity."
    )
    needs = "calibration text; no gradients, no training"
    costs = "one forward pass, and a factorisation of each reader's Gram; an allocation that measures costs passes of its own"
    loads = LAYOUT
    example = "billhook prune demo --method fasp --ratio 0.2 -o smaller"
    Settings = FaspSettings
    kinds = ("ffn", "heads", "groups", "value", "expert_ffn", "shared", "layers")
    default_kinds = ("ffn",)
    allocates = True

    def fits(self, recipe: Recipe) -> None:
        if "layers" in recipe.kinds and recipe.shape.allocation != "sensitivity":
            raise SettingsError(
                "axis 'layers' is weighed against the others: use --layout per_layer --allocation sensitivity, or --method auto"
            )
        by_gradients = recipe.settings.score in GRADIENT_SCORES
        if set(recipe.kinds) & set(MIXED) and (recipe.shape.allocation != "equal" or by_gradients):
            raise SettingsError(
                "experts of a layer keep equal sizes: use --allocation equal, and a --score that needs no gradients"
            )

    def judges(self, recipe: Recipe) -> bool:
        return recipe.shape.allocation == "sensitivity"

    def why_whole(self, recipe: Recipe) -> str:
        if recipe.shape.allocation in ("sensitivity", "global"):
            return f"allocation {recipe.shape.allocation} tries cuts on the whole model"
        if _turns(recipe):
            return "value_basis principal turns the values of the whole model first"
        score = recipe.settings.score
        return f"score {score} needs gradients of the whole model" if score in GRADIENT_SCORES else ""

    def why_alone(self, recipe: Recipe) -> str:
        if _turns(recipe):
            return "values are turned first, in one process: use --value-basis channels"
        if recipe.settings.stream == "dense":
            return ""
        return f"in the stream {recipe.settings.stream} a layer sees what became of those before: use --stream dense, or leave it out"

    def why_apart(self, recipe: Recipe, count: int) -> str:
        return ""

    def why_unforeseen(self, recipe: Recipe) -> str:
        by_scores = recipe.shape.allocation == "standardised"
        return "allocation standardised compares scores of the whole model" if by_scores else ""

    def plan(self, opened: Opened, recipe: Recipe, texts: Texts, run: Run) -> Planned:
        (planned,) = self.plan_each(opened, [recipe], texts, run)
        if isinstance(planned, BillhookError):
            raise planned
        self.turn(opened.model, recipe, texts, run, planned.plan)
        return planned

    def turn(self, model: Any, recipe: Recipe, texts: Texts, run: Run, plan: Any = None) -> None:
        """Turn the values of a model in place, for a plan if there is one, where the recipe says so."""
        from billhook.cuts.values import turn_values

        if _turns(recipe) and len(texts.calibration):
            turn_values(model, texts.calibration, run, plan)

    def plan_each(
        self, opened: Opened, recipes: Sequence[Recipe], texts: Texts, run: Run
    ) -> list[Planned | BillhookError]:
        from billhook.planning.axis_plan import axis_plan, gradient_scores

        first = recipes[0]
        self.turn(opened.model, first, texts, run)
        scores = gradient_scores(opened.model, first, first.settings.score, texts.calibration, run)
        plans: list[Planned | BillhookError] = []
        for recipe in recipes:
            settings = recipe.settings.cut
            try:
                plans.append(Planned(axis_plan(opened, recipe, settings, texts, scores, run), settings, scores))
            except BillhookError as error:
                plans.append(error)
        return plans

    def carry_out(self, model: Any, texts: Texts, planned: Planned, run: Run) -> dict[str, Any]:
        from billhook.cuts.narrowing import narrow
        from billhook.cuts.parallel import shared

        cut = shared if run.workers.many else narrow
        return {"cuts": cut(model, texts.calibration, planned.plan, planned.settings, run, planned.scores)}

    def at_once(self, recipe: Recipe) -> bool:
        return recipe.settings.stream == "dense"

    def carry_out_each(
        self, model: Any, texts: Texts, planned: Sequence[Planned], run: Run
    ) -> Iterator[tuple[Any, list[Any]]]:
        from billhook.cuts.narrowing import narrow_each

        plans, scores = [one.plan for one in planned], [one.scores for one in planned]
        return narrow_each(model, texts.calibration, plans, planned[0].settings, run, scores)


METHOD = Fasp()
