"""REAP, UNCURL and their controls: fewer experts in a mixture (`billhook.cuts.experts`)."""

from typing import Any

from billhook.choices import EXPERT_STREAMS, WAYS
from billhook.cuts.settings import Reducing
from billhook.methods.narrowed import stream
from billhook.planning.method import Method, MethodSettings, Opened, Planned, Run, Texts
from billhook.planning.recipe import Recipe
from billhook.runtime.options import option


class ExpertsSettings(MethodSettings):
    """Which experts go, and how."""

    experts: str = option(Reducing.way, f"how experts go: {', '.join(WAYS)}", names=WAYS)
    stream: str = stream(Reducing.stream, EXPERT_STREAMS)


class Experts(Method):
    name = "experts"
    title = "REAP the Experts, and UNCURL: fewer experts in a mixture"
    paper = "arXiv:2510.13999"
    does = (
        "Takes experts away in every layer of a mixture. --experts says how: reap, frequency and random drop, uncurl "
        "(arXiv:2409.01483) merges. The calibration text is the task: experts that it does not use go first."
    )
    needs = "calibration text, of the task"
    costs = "one forward pass"
    example = "billhook prune MIXTURE --method experts --ratio 0.25 -o smaller"
    Settings = ExpertsSettings
    kinds = ("experts",)
    default_kinds = ("experts",)

    def why_unforeseen(self, recipe: Recipe) -> str:
        return "experts counts what its text does"

    def plan(self, opened: Opened, recipe: Recipe, texts: Texts, run: Run) -> Planned:
        from billhook.models.plan import Plan
        from billhook.planning.budget import solved
        from billhook.planning.planners import planner

        plan = solved(opened, recipe, planner(opened.model, recipe), run.tick) if recipe.sized else Plan()
        settings = Reducing(recipe.settings.experts, recipe.calibration.seed, recipe.settings.stream)
        return Planned(plan, settings)

    def carry_out(self, model: Any, texts: Texts, planned: Planned, run: Run) -> dict[str, Any]:
        from billhook.cuts.experts import reduce_experts

        return {"cuts": reduce_experts(model, texts.calibration, planned.plan, planned.settings, run)}


METHOD = Experts()
