"""MoPE: what the metric loses without a module says what the module is worth (`billhook.planning.ablation`)."""

from collections.abc import Sequence
from typing import Any

from pydantic import field_validator

from billhook.choices import MODULE_METRICS, MODULE_ORDERS, MODULE_STAGES
from billhook.errors import BillhookError, SettingsError, one_of
from billhook.methods.fasp import Fasp
from billhook.methods.narrowed import NarrowingSettings
from billhook.planning.method import LAYOUT, Method, Opened, Planned, Run, Texts
from billhook.planning.recipe import Recipe
from billhook.runtime.options import option

TASK = "task:"
BATCH = 16  # prompts of a task in one forward pass


class MopeSettings(NarrowingSettings):
    """By what modules are missed, and how they go; the rest is the cut's."""

    metric: str = option("kl", "kl, loss, or task:NAME of lm-eval", completes=MODULE_METRICS)
    stage: str = option(
        "width-first", "when whole layers go: width-first, or joint with the others", names=MODULE_STAGES
    )
    order: str = option("knapsack", "by what modules go: knapsack, global", names=MODULE_ORDERS)
    depth: float = option(0.5, "share of the budget that whole layers give, where they go last", gt=0, le=1)
    parts: int = option(8, "parts of a layer's FFN that are missed one at a time", ge=1)
    missed_on: int = option(2, "windows, of --probes, that each module is missed on", ge=1)
    documents: int = option(100, "documents of a task that each module is missed on", ge=1)

    @field_validator("metric", mode="after")
    @classmethod
    def _counted_in(cls, value: str) -> str:
        if value.startswith(TASK) and value != TASK:
            return value
        return one_of("metric", value, MODULE_METRICS)

    @property
    def tasks(self) -> list[str]:
        """Names of the tasks whose accuracy is the metric."""
        return self.metric.removeprefix(TASK).split(",") if self.metric.startswith(TASK) else []


class Mope(Fasp):
    name = "mope"
    title = "MoPE-CLIP: module-wise pruning error, on language models"
    paper = "arXiv:2403.07839"
    does = (
        "Takes each module away alone, a head or KV group, an eighth of a layer's FFN, a whole layer, and measures what the model "
        "loses: its divergence from itself, its loss, or the accuracy of a task. Widths go first by that table, then whole layers, "
        "measured anew on the cut model; what stays is restored as fasp does. The paper prunes CLIP, and trains afterwards."
    )
    needs = "calibration text, and a few windows to miss modules on; no gradients"
    costs = (
        "a pass of a few windows from its layer on for each module, some hundreds; kept in --statistics for other budgets; "
        "then as fasp"
    )
    loads = LAYOUT
    example = "billhook prune demo --method mope --ratio 0.2 --layout per_layer -o smaller"
    Settings = MopeSettings
    kinds = ("ffn", "heads", "groups", "layers")
    default_kinds = ("ffn", "layers")
    allocates = False
    why_apart = Method.why_apart

    def fits(self, recipe: Recipe) -> None:
        chosen: MopeSettings = recipe.settings
        if recipe.shape.layout == "uniform":
            for name in ("stage", "order"):
                if (value := getattr(chosen, name)) != getattr(MopeSettings(), name):
                    raise SettingsError(
                        f"--{name} {value} makes layers differ, which the uniform layout cannot hold: use --layout per_layer"
                    )
        if chosen.missed_on > recipe.calibration.probes:
            raise SettingsError(
                f"--missed-on {chosen.missed_on}: there are {recipe.calibration.probes} windows to judge by: raise --probes"
            )

    def judges(self, recipe: Recipe) -> bool:
        return True

    def why_whole(self, recipe: Recipe) -> str:
        return "mope misses modules of the whole model"

    def why_unforeseen(self, recipe: Recipe) -> str:
        return "mope decides by what it measures on the whole model"

    def check(self, opened: Opened, recipe: Recipe) -> None:
        super().check(opened, recipe)
        if recipe.settings.tasks:
            from billhook.evaluation.zeroshot import load_tasks

            load_tasks(recipe.settings.tasks)

    def plan_each(
        self, opened: Opened, recipes: Sequence[Recipe], texts: Texts, run: Run
    ) -> list[Planned | BillhookError]:
        from billhook.models.plan import Plan
        from billhook.planning import ablation_plan

        sized = [recipe for recipe in recipes if recipe.sized]
        if not sized:
            return [Planned(Plan(), recipe.settings.cut) for recipe in recipes]  # the vocabulary alone
        chosen: MopeSettings = sized[0].settings
        judge, key = _judge(opened, sized[0], texts, run)
        table = _table(opened, sized[0], texts, run, judge, key)
        order = ablation_plan.Order(chosen.order, chosen.stage == "joint", chosen.depth)
        plans: list[Planned | BillhookError] = []
        for recipe in recipes:
            try:
                found, record = ablation_plan.plan(opened, recipe, table, judge, order, run, key)
            except BillhookError as error:
                plans.append(error)
                continue
            told = {"metric": chosen.metric, "whole": judge.whole, "windows": chosen.missed_on, "table": table.rows()}
            plans.append(Planned(found, recipe.settings.cut, table.worths, {"mope": {**told, **record}}))
        return plans


def _judge(opened: Opened, recipe: Recipe, texts: Texts, run: Run) -> tuple[Any, dict[str, Any]]:
    """What says how much a model has lost, and all that decides it."""
    from billhook.evaluation import zeroshot
    from billhook.planning.ablation import Accuracy, Judge
    from billhook.runtime import cache

    chosen: MopeSettings = recipe.settings
    key = {
        **cache.model_key(opened.model),
        **texts.hashes,
        **{name: getattr(chosen, name) for name in ("metric", "missed_on", "parts", "score", "damping")},
        **{"kinds": list(recipe.kinds), "dtype": recipe.compute.dtype},
    }
    tasks = zeroshot.load_tasks(chosen.tasks, run.tick) if chosen.tasks else {}
    if tasks:
        key["tasks"] = [zeroshot.key_of("", task, chosen.documents) for task in tasks.values()]

    def score() -> Accuracy:
        model, tokenizer = opened.model, opened.tokenizer
        return Accuracy(zeroshot.evaluate(model, tokenizer, tasks, limit=chosen.documents, batch_size=BATCH))

    windows = texts.probe[: chosen.missed_on]
    return Judge(opened.model, windows, chosen.metric, score if tasks else None), key


def _table(opened: Opened, recipe: Recipe, texts: Texts, run: Run, judge: Any, key: dict[str, Any]) -> Any:
    """What is missed without each module, or what was before."""
    from billhook.planning.ablation import Table, measured
    from billhook.planning.axis_plan import gradient_scores
    from billhook.runtime import cache

    chosen: MopeSettings = recipe.settings

    def measure() -> list[list[Any]]:
        scores = gradient_scores(opened.model, recipe, chosen.score, texts.calibration, run)
        return measured(judge, texts.calibration, recipe.kinds, chosen.parts, chosen.cut, run, scores).plain()

    table = Table.read(cache.cached(run.statistics, "mope", key, measure))
    table.check(judge)
    return table


METHOD: Method = Mope()
