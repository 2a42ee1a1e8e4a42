"""SliceGPT: a narrower residual stream, through the whole model (`billhook.cuts.slicing`)."""

from typing import Any

from billhook.cuts.settings import Slicing
from billhook.methods.narrowed import correction, damping, restoration
from billhook.planning.method import Method, MethodSettings, Opened, Planned, Run, Texts
from billhook.planning.recipe import Recipe
from billhook.runtime.options import option


class SliceGPTSettings(MethodSettings):
    """What may be chosen; why these defaults: docs/LOG.md."""

    rotate: bool = option(True, "turn the stream first, which unties a tied head")
    restoration: bool = restoration(Slicing.restoration)
    damping: float = damping(Slicing.damping)
    correction: float = correction(Slicing.correction)


class SliceGPT(Method):
    name = "slicegpt"
    title = "SliceGPT: Compress Large Language Models by Deleting Rows and Columns"
    paper = "arXiv:2401.15024"
    does = (
        "Makes the residual stream itself narrower: embeddings, norms, all projections and the head with it. One rotation serves "
        "the whole model, where the paper has one a block and products between them, which no stock class holds; it unties tied "
        "embeddings (--no-rotate does not). Models with LayerNorm cannot, those with norms behind their writers not with --rotate."
    )
    needs = "calibration text"
    costs = (
        "one forward pass, one eigendecomposition of the residual dimension's size, and some passes that restore (the paper does "
        "not: --no-restoration)"
    )
    example = "billhook prune demo --method slicegpt --ratio 0.2 -o smaller"
    Settings = SliceGPTSettings
    budgets = ("ratio", "params", "memory")
    kinds = ("residual",)
    default_kinds = ("residual",)

    def why_unforeseen(self, recipe: Recipe) -> str:
        return "slicegpt cuts all layers at once"

    def check(self, opened: Opened, recipe: Recipe) -> None:
        from billhook.models.limits import check_kinds

        check_kinds(opened.model, recipe.kinds, recipe.shape.layout)

    def plan(self, opened: Opened, recipe: Recipe, texts: Texts, run: Run) -> Planned:
        from billhook.models.plan import Plan
        from billhook.planning import residual_budget
        from billhook.planning.budget import solved

        chosen: SliceGPTSettings = recipe.settings
        settings = Slicing(chosen.restoration, chosen.damping, chosen.correction)
        if not recipe.sized:
            return Planned(Plan(), settings)  # the vocabulary alone
        planner = residual_budget.planner(opened.model, recipe.shape.width_step, chosen.rotate)
        plan = solved(opened, recipe, planner, run.tick)
        return Planned(plan, settings, record={"residual": residual_budget.record(opened.model, plan)})

    def announcement(self, opened: Opened, recipe: Recipe, planned: Planned, texts: Texts) -> str:
        from billhook.planning.plan_lines import residual_line

        if not planned.plan.residual:
            return super().announcement(opened, recipe, planned, texts)
        return residual_line(opened.model, planned.plan, recipe.words)

    def carry_out(self, model: Any, texts: Texts, planned: Planned, run: Run) -> dict[str, Any]:
        from billhook.cuts.slicing import slice_residual

        return {"cuts": slice_residual(model, texts.calibration, planned.plan, planned.settings, run)}


METHOD = SliceGPT()
