"""A method of one's own, in a package of its own: channels go by the size of their weights, and no text is read.

It is a class with plain facts, its settings, and two of a prune's phases; budgets, layouts, --dry-run, `billhook
compare` and reports come with it.  Nothing here loads torch until a prune is at work.
"""

from typing import Any

from billhook.planning.method import Method, MethodSettings, Opened, Planned, Run, Texts
from billhook.planning.recipe import Recipe
from billhook.runtime.options import option


class Settings(MethodSettings):
    power: float = option(2.0, "the exponent of a weight's size", gt=0)


class OwnMethod(Method):
    name = "own"
    title = "Channels by the size of their weights"
    paper = "none"
    does = "Takes away the channels whose down-projection columns are smallest. Nothing is repaired."
    needs = "nothing: it looks at weights alone"
    costs = "a pass over the weights"
    example = "billhook prune demo --method own --ratio 0.2 -o smaller"
    Settings = Settings
    kinds = ("ffn",)
    default_kinds = ("ffn",)

    def reads(self, recipe: Recipe) -> bool:
        return False

    def plan(self, opened: Opened, recipe: Recipe, texts: Texts, run: Run) -> Planned:
        from billhook.planning.budget import solved
        from billhook.planning.planners import planner

        return Planned(solved(opened, recipe, planner(opened.model, recipe), run.tick), recipe.settings)

    def carry_out(self, model: Any, texts: Texts, planned: Planned, run: Run) -> dict[str, Any]:
        from billhook.math.selection import lowest
        from billhook.models.axes import axes, reader_weight
        from billhook.models.plan import Cut
        from billhook.models.surgery import remove

        cuts = []
        for axis in axes(model, planned.plan.kinds):
            count = planned.plan.drops[axis.layer, axis.kind]
            scores = axis.pool(reader_weight(model, axis).double().abs().pow(planned.settings.power).sum(0))
            drop, _ = lowest(scores, count, axis.blocks)
            share = float(scores[drop].sum() / scores.sum())
            remove(model, axis, drop)
            cuts.append(Cut(axis.layer, axis.kind, axis.units, count, 0.0, share, share, None, share))
        return {"cuts": cuts}


METHOD = OwnMethod()
