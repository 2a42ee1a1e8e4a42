"""LoRC: a smaller KV cache by narrower values, whose widths fall with depth (`billhook.cuts.values`)."""

from functools import partial
from math import prod
from typing import Any

from billhook.choices import RULES
from billhook.errors import SettingsError
from billhook.methods.fasp import Fasp, FaspSettings
from billhook.planning.method import Method, Opened, Planned, Run, Texts
from billhook.planning.recipe import Recipe
from billhook.runtime.options import option

LEAST = 0.25  # channels of the last layer, as a share of the first one's: d_min / d_max


class LorcSettings(FaspSettings):
    """What may be chosen of the cut, and of which layers keep how much."""

    kv: float | None = option(
        None, "share of the KV cache that stays, keys included, between 0.5 and 1", gt=0, lt=1, budget=True
    )
    rule: str = option("progressive", f"which layers keep how much: {', '.join(RULES)}", names=RULES)


def _falls(recipe: Recipe) -> bool:
    """Whether widths fall with depth, by the paper's rule."""
    return recipe.shape.allocation == "equal" and recipe.settings.rule == "progressive"


class Lorc(Fasp):
    name = "lorc"
    title = "LoRC: Low-Rank Compression for LLMs KV Cache with a Progressive Compression Strategy"
    paper = "arXiv:2410.03111"
    does = (
        "Makes the KV cache smaller: turns the values of every KV head to the principal axes of what the output projection reads, "
        "which costs nothing when the model runs, keeps the first, and refits what reads them. The first layers keep most, by "
        "condition numbers; --rule uniform and --allocation sensitivity are other ways. Keys stay as they are."
    )
    costs = "a pass over 8,192 tokens, one forward pass, and a factorisation of each reader's Gram"
    loads = "transformers with trust_remote_code, billhook.load; vLLM and llama.cpp want values as long as keys"
    example = "billhook prune demo --method lorc --kv 0.75 --layout per_layer -o smaller"
    Settings = LorcSettings
    budgets = ("ratio", "params", "memory")
    kinds = ("value",)
    default_kinds = ("value",)
    layouts = ("per_layer",)
    trims = False
    plan_each = Method.plan_each

    def fits(self, recipe: Recipe) -> None:
        super().fits(recipe)
        if recipe.shape.allocation != "equal" and recipe.settings.rule != "progressive":
            raise SettingsError("--rule and --allocation both say which layers keep how much: give one")

    def why_whole(self, recipe: Recipe) -> str:
        return super().why_whole(recipe) or (
            "rule progressive reads the weights of all layers" if _falls(recipe) else ""
        )

    def why_unforeseen(self, recipe: Recipe) -> str:
        return super().why_unforeseen(recipe) or ("rule progressive reads weights" if _falls(recipe) else "")

    def plan(self, opened: Opened, recipe: Recipe, texts: Texts, run: Run) -> Planned:
        from billhook.models.plan import Plan
        from billhook.models.sizes import kv_cache_entries
        from billhook.planning.axis_plan import gradient_scores, weighing_planner
        from billhook.planning.budget import reach, solved

        chosen, model, read = recipe.settings, opened.model, recipe.budget
        self.turn(model, recipe, texts, run)
        scores = gradient_scores(model, recipe, chosen.score, texts.calibration, run)
        if _falls(recipe):
            planner = progressive(model)
        else:
            planner = weighing_planner(opened, recipe, chosen.cut, texts, scores, run)

        def held(plan: Plan) -> int:
            return kv_cache_entries(model, plan, read.context, read.batch)

        whole = held(Plan())
        if chosen.kv is None:
            plan = solved(opened, recipe, planner, run.tick)
        else:
            plan = reach(planner, held, chosen.kv * whole, lambda kept: f"{kept / whole:.1%} of the KV cache")
        self.turn(model, recipe, texts, run, plan)
        return Planned(plan, chosen.cut, scores)


def progressive(model: Any) -> Any:
    """From parameters to save to value channels that fall with depth by condition numbers."""
    from billhook.math.condition import condition, depths
    from billhook.models.axes import axes
    from billhook.models.families import layers, module_path, row_of, weight_of
    from billhook.models.plan import Plan
    from billhook.models.sizes import saved_by
    from billhook.planning.budget import Planner
    from billhook.planning.rank_plan import fitting

    row, found = row_of(model), axes(model, ("value",))

    def of_layer(n: int) -> float:
        return prod(
            condition(weight_of(model, module_path(model, n, f"{row.attention}.{name}"))) for name in (row.k, row.v)
        )

    at = depths([of_layer(n) for n in range(len(layers(model)))])

    def plan_of(scale: float) -> Plan:
        drops = {}
        for axis in found:
            each = axis.units // axis.blocks
            kept = round(each * min(1.0, scale / LEAST * (1 - at[axis.layer] * (1 - LEAST))))
            drops[axis.layer, "value"] = (each - max(1, kept)) * axis.blocks
        return Plan(drops)

    least = found[0].blocks * found[0].price(model)
    return Planner(partial(fitting, model, plan_of), saved_by(model, plan_of(0.0)), least)


METHOD = Lorc()
