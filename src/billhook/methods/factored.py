"""What methods that factor weights have in common."""

from typing import Any

from billhook.choices import MOMENTS
from billhook.planning.method import Method, Opened, Planned, Run, Texts
from billhook.planning.recipe import Recipe
from billhook.runtime.options import option


def moment(default: str) -> Any:
    """By what a weight is factored."""
    return option(default, f"what decides the factors: {', '.join(MOMENTS)}", names=MOMENTS)


class Factored(Method):
    """A method that replaces linear weights by two thin ones."""

    needs = "calibration text; no gradients, no training"
    loads = (
        "transformers with trust_remote_code, billhook.load; vLLM was not tried; others by `billhook export --merge`, which "
        "multiplies the two thin matrices out and saves nothing"
    )
    budgets = ("ratio", "params", "memory")
    layouts = ("per_layer",)
    trims = False

    def why_whole(self, recipe: Recipe) -> str:
        return f"{self.name} puts new weights in the place of those in files"

    def why_unforeseen(self, recipe: Recipe) -> str:
        return f"{self.name} factors weights, which grows by their cubes"

    def check(self, opened: Opened, recipe: Recipe) -> None:
        from billhook.planning import rank_plan

        rank_plan.check(opened.model, recipe.shape.layout)

    def carry_out(self, model: Any, texts: Texts, planned: Planned, run: Run) -> dict[str, Any]:
        from dataclasses import asdict

        from billhook.cuts.low_rank import factorise

        found = factorise(model, texts.calibration, planned.plan.ranks, planned.settings, run)
        return {"low_rank": [asdict(one) for one in found]}
