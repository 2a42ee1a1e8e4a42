"""Greedy Output Approximation: every module is refitted to its unpruned output, then its units go
(`billhook.cuts.approximating`)."""

from typing import Any

from billhook.choices import OUTPUT_SCORES
from billhook.cuts.settings import Approximating, Narrowing
from billhook.errors import SettingsError
from billhook.methods.narrowed import damping
from billhook.planning.method import LAYOUT, Method, MethodSettings, Opened, Planned, Run, Texts
from billhook.planning.recipe import Recipe
from billhook.runtime.options import option

MEASURED = ("sensitivity", "standardised")  # allocations that weigh the method's own score


class GoaSettings(MethodSettings):
    """What may be chosen; the paper's: --share 1, the analytic score, no ridge."""

    score: str = option(Approximating.score, f"{', '.join(OUTPUT_SCORES)}", names=OUTPUT_SCORES)
    recovery: bool = option(Approximating.recovery, "refit every module to its unpruned output, before its own cut")
    share: float = option(Approximating.share, "share of the way to that output", ge=0, le=1)
    after: bool = option(Approximating.after, "refit what reads a cut axis once more, as FASP does")
    damping: float = damping(Approximating.damping)

    @property
    def cut(self) -> Approximating:
        """As the cut takes them."""
        return Approximating(self.score, self.recovery, self.share, self.after, self.damping)


class Goa(Method):
    name = "goa"
    title = "Greedy Output Approximation: Towards Efficient Structured Pruning for LLMs Without Retraining"
    paper = "arXiv:2407.19126"
    does = (
        "Goes module by module: refits it to what it put out in the unpruned model, first q, k, v or gate, up, then o or down; "
        "then takes away the heads whose attention maps are like another's, or the FFN channels that put out least. Nothing makes "
        "up for a cut but the modules after it; --after adds FASP's restoration."
    )
    needs = "calibration text; no gradients, no training"
    costs = "about eight forward passes, and a factorisation for each weight; an allocation that measures costs passes of its own"
    loads = LAYOUT
    example = "billhook prune demo --method goa --ratio 0.2 -o smaller"
    Settings = GoaSettings
    kinds = ("ffn", "heads", "groups")
    default_kinds = ("ffn",)
    allocates = True

    def fits(self, recipe: Recipe) -> None:
        chosen: GoaSettings = recipe.settings
        if not chosen.recovery and chosen.share != Approximating.share:
            raise SettingsError("--share is a share of the recovery: leave out --no-recovery, or --share")

    def judges(self, recipe: Recipe) -> bool:
        return recipe.shape.allocation == "sensitivity"

    def why_whole(self, recipe: Recipe) -> str:
        name = recipe.shape.allocation
        return f"allocation {name} tries cuts on the whole model" if name in ("sensitivity", "global") else ""

    def why_alone(self, recipe: Recipe) -> str:
        return "in goa a module sees what became of those before: leave it out"

    def why_unforeseen(self, recipe: Recipe) -> str:
        by_scores = recipe.shape.allocation == "standardised"
        return "allocation standardised compares scores of the whole model" if by_scores else ""

    def why_not(self, model: Any, kind: str) -> str:
        from billhook.calibration.attention_maps import why_unseen

        return why_unseen(model) if kind in ("heads", "groups") else ""

    def plan(self, opened: Opened, recipe: Recipe, texts: Texts, run: Run) -> Planned:
        from billhook.cuts.approximating import unit_scores
        from billhook.planning.axis_plan import axis_plan

        chosen: GoaSettings = recipe.settings
        scores = {}
        if recipe.shape.allocation in MEASURED and recipe.sized:
            scores = unit_scores(opened.model, texts.calibration, recipe.kinds, chosen.cut, run)
        alone = Narrowing(damping=chosen.damping, restoration=chosen.after)  # as one axis is cut to see what it costs
        return Planned(axis_plan(opened, recipe, alone, texts, scores, run), chosen.cut)

    def announcement(self, opened: Opened, recipe: Recipe, planned: Planned, texts: Texts) -> str:
        from billhook.models.families import linear, shape

        said = super().announcement(opened, recipe, planned, texts)
        refitted = [name for _, name in self.solved(opened.model, planned)] if planned.settings.recovery else []
        widest = max((shape(linear(opened.model, name))[1] for name in refitted), default=0)
        if (tokens := texts.calibration.numel()) < widest:
            said += f"; {tokens:,} tokens of calibration text are fewer than the {widest:,} inputs of a weight: statistics lack rank"
        return said

    def carry_out(self, model: Any, texts: Texts, planned: Planned, run: Run) -> dict[str, Any]:
        from dataclasses import asdict

        from billhook.cuts.approximating import approximate

        found = approximate(model, texts.calibration, planned.plan, planned.settings, run)
        told = asdict(found)
        return {"cuts": found.cuts, "approximated": {name: told[name] for name in ("rebuilt", "thresholds")}}

    def solved(self, model: Any, planned: Planned) -> list[tuple[int, str]]:
        from billhook.models.families import layers, linears

        if not planned.settings.recovery:
            return super().solved(model, planned)
        return [(n, name) for n in range(len(layers(model))) for one in linears(model, n) for name in one.values()]


METHOD = Goa()
