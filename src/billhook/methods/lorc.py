"""LoRC: a smaller KV cache by narrower values, whose widths fall with depth (`billhook.cuts.values`)."""

from typing import Any

from billhook.choices import KEYS, RULES
from billhook.errors import ModelError, SettingsError
from billhook.methods.fasp import Fasp, FaspSettings
from billhook.planning.method import Method, Opened, Planned, Run, Texts
from billhook.planning.recipe import Recipe
from billhook.runtime.options import option

LEAST = 0.25  # channels of the last layer, as a share of the first one's: d_min / d_max


class LorcSettings(FaspSettings):
    """What may be chosen of the cut, and of which layers keep how much."""

    kv: float | None = option(
        None, "share of the KV cache that stays, keys included, between 0 and 1", gt=0, lt=1, budget=True
    )
    keys: str = option("whole", f"what becomes of keys: {', '.join(KEYS)}", names=KEYS)
    rule: str = option(
        "",
        f"which layers keep how much: {', '.join(RULES)}",
        names=RULES,
        shown="progressive; uniform in the uniform layout",
    )

    @property
    def pairs(self) -> bool:
        """Whether queries and keys lose rotary pairs."""
        return self.keys == "pairs"


def _falls(recipe: Recipe) -> bool:
    """Whether widths fall with depth, by the paper's rule."""
    rule = recipe.settings.rule or ("progressive" if recipe.shape.layout == "per_layer" else "uniform")
    return recipe.shape.allocation == "equal" and rule == "progressive"


class Lorc(Fasp):
    name = "lorc"
    title = "LoRC: Low-Rank Compression for LLMs KV Cache with a Progressive Compression Strategy"
    paper = "arXiv:2410.03111"
    does = (
        "Makes the KV cache smaller: turns the values of every KV head to the principal axes of what the output projection reads, "
        "which costs nothing when the model runs, keeps the first, and refits what reads them. The first layers keep most, by "
        "condition numbers; --rule uniform and --allocation sensitivity are other ways. Keys stay as they are; with --keys pairs "
        "they lose rotary pairs of channels, together with queries: in the uniform layout a stock checkpoint of shorter heads."
    )
    costs = "a pass over 8,192 tokens, one forward pass, and a factorisation of each reader's Gram"
    loads = (
        "the uniform layout, of --keys pairs: whatever loads the family; per_layer: transformers with trust_remote_code, "
        "billhook.load, others after `billhook export --merge`, which fills heads with zeros and saves nothing"
    )
    example = "billhook prune demo --method lorc --kv 0.75 --keys pairs --layout per_layer -o smaller"
    Settings = LorcSettings
    budgets = ("ratio", "params", "memory")
    kinds = ("value",)
    default_kinds = ("value",)
    own_shapes = True
    trims = False
    plan_each = Method.plan_each

    def fits(self, recipe: Recipe) -> None:
        super().fits(recipe)
        chosen, uniform = recipe.settings, recipe.shape.layout == "uniform"
        if uniform and not chosen.pairs:
            raise SettingsError(
                "lorc makes what no stock checkpoint holds: use --layout per_layer, or --keys pairs, which makes keys as "
                "narrow as values"
            )
        if chosen.pairs and recipe.shape.allocation != "equal":
            raise SettingsError(f"--keys pairs goes by --rule: leave out --allocation {recipe.shape.allocation}")
        if uniform and chosen.rule == "progressive":
            raise SettingsError("--rule progressive makes layers differ: use --layout per_layer, or leave it out")
        if recipe.shape.allocation != "equal" and chosen.rule:
            raise SettingsError("--rule and --allocation both say which layers keep how much: give one")

    def check(self, opened: Opened, recipe: Recipe) -> None:
        from billhook.models import limits, rotary
        from billhook.planning.axis_plan import check_uniform

        limits.check_kinds(opened.model, recipe.kinds, "per_layer")
        if recipe.settings.pairs:
            if recipe.shape.layout == "uniform":
                check_uniform(opened.model)
            if why := rotary.why_not(opened.model):
                raise ModelError(f"{opened.model.config.model_type} cannot lose rotary pairs: {why}; use --keys whole")

    def why_whole(self, recipe: Recipe) -> str:
        return super().why_whole(recipe) or (
            "rule progressive reads the weights of all layers" if _falls(recipe) else ""
        )

    def why_apart(self, recipe: Recipe, count: int) -> str:
        if recipe.settings.pairs:
            return "--keys pairs works in one: start it without accelerate launch"
        return super().why_apart(recipe, count)

    def why_unforeseen(self, recipe: Recipe) -> str:
        if recipe.settings.pairs:
            return "keys pairs weighs what all layers hold"
        return super().why_unforeseen(recipe) or ("rule progressive reads weights" if _falls(recipe) else "")

    def at_once(self, recipe: Recipe) -> bool:
        return super().at_once(recipe) and not recipe.settings.pairs

    def plan(self, opened: Opened, recipe: Recipe, texts: Texts, run: Run) -> Planned:
        from billhook.cuts.rotary_pairs import scores_of_pairs
        from billhook.models.plan import Plan
        from billhook.models.sizes import kv_cache_entries
        from billhook.planning.axis_plan import gradient_scores, weighing_planner
        from billhook.planning.budget import reach, solved
        from billhook.planning.kv_plan import kv_planner

        chosen, model, read = recipe.settings, opened.model, recipe.budget
        self.turn(model, recipe, texts, run)
        scores = gradient_scores(model, recipe, chosen.score, texts.calibration, run)
        alike = recipe.shape.layout == "uniform"
        pairs = scores_of_pairs(model, texts.calibration, alike, run) if chosen.pairs else {}
        if pairs or _falls(recipe):
            planner = kv_planner(model, LEAST if _falls(recipe) else 1.0, pairs)
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

    def carry_out(self, model: Any, texts: Texts, planned: Planned, run: Run) -> dict[str, Any]:
        from billhook.models import rotary

        pairs = planned.plan.pairs
        rotary.silence(model, pairs)  # values are refitted to what is left of keys
        found = super().carry_out(model, texts, planned, run)
        if not pairs:
            return found
        kept = {one for of_layer in pairs.values() for one in of_layer}
        if len(kept) == 1:
            rotary.shrink_heads(model, *kept)
        else:
            rotary.narrow_keys(model, pairs)
        return found | {"rotary_pairs": {str(n): of_layer for n, of_layer in pairs.items()}}


METHOD = Lorc()
