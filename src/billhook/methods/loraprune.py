"""LoRAPrune: units go while adapters train, by the adapters' gradients (`billhook.training.lora_gates`)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from billhook.choices import SEARCH_OBJECTIVES
from billhook.cuts.settings import Narrowing
from billhook.errors import SettingsError
from billhook.planning.method import LAYOUT, Method, MethodSettings, Opened, Planned, Run, Texts
from billhook.planning.recipe import Recipe
from billhook.runtime.options import option

CUT = Narrowing(restoration=False, stream="dense")  # training has made up for what goes


class LoraPruneSettings(MethodSettings):
    """How adapters train, and by what units go; the paper's are batches of 128, 512 tokens each, and two epochs."""

    steps: int = option(128, "steps of learning", ge=10)
    windows: int = option(1, "windows of a step", ge=1)
    rate: float = option(1e-3, "highest rate of learning; falls to 0 as a cosine", gt=0)
    rank: int = option(8, "of the adapters", ge=1)
    objective: str = option(
        "nll", "nll: loss of the cut model; kl: divergence from the unpruned", names=SEARCH_OBJECTIVES
    )
    shuffled: bool = option(False, "the control: each is told what another is worth")


@dataclass(frozen=True)
class Adapted:
    """What a cut takes besides its plan: what adapters add to weights, by the path of their module."""

    updates: Mapping[str, Any]


class LoraPrune(Method):
    name = "loraprune"
    title = "LoRAPrune: Structured Pruning Meets Low-Rank Parameter-Efficient Fine-Tuning"
    paper = "arXiv:2305.18403"
    does = (
        "Trains low-rank adapters on the calibration text with the weights frozen, tells from the adapters' gradients which units of "
        "an axis matter least, and closes these one after another while training goes on, few at first. What is left has learned to do "
        "without them: adapters are merged, and nothing is restored. How many units each layer gives is --allocation; the paper spares "
        "the first tenth of the layers and the last (--allocation skip:3,1 of 30)."
    )
    needs = "calibration text; gradients of adapters"
    costs = "a forward and a backward pass of each step's windows, through all weights"
    loads = LAYOUT
    example = "billhook prune demo --method loraprune --ratio 0.2 --samples 256 --steps 256 -o smaller"
    Settings = LoraPruneSettings
    kinds = ("ffn", "heads", "groups")
    default_kinds = ("ffn",)
    allocates = True
    trims = False

    def fits(self, recipe: Recipe) -> None:
        if (windows := recipe.settings.windows) > recipe.samples:
            raise SettingsError(f"--windows {windows}: the calibration has {recipe.samples}: raise --samples")

    def judges(self, recipe: Recipe) -> bool:
        return recipe.shape.allocation == "sensitivity"

    def searches(self, recipe: Recipe) -> bool:
        return True

    def why_whole(self, recipe: Recipe) -> str:
        return "loraprune trains adapters of the whole model"

    def why_unforeseen(self, recipe: Recipe) -> str:
        return "loraprune decides as it trains"

    def plan(self, opened: Opened, recipe: Recipe, texts: Texts, run: Run) -> Planned:
        from billhook.planning import gated_plan
        from billhook.planning.axis_plan import axis_plan
        from billhook.training.adapting import adapted, updates
        from billhook.training.gating import Course, Units
        from billhook.training.lora_gates import Closing

        chosen: LoraPruneSettings = recipe.settings
        seed, model = recipe.calibration.seed, opened.model
        plan = axis_plan(opened, recipe, CUT, texts, {}, run)
        units = Units.of(model, recipe.unit_kinds)
        with gated_plan.lessons(opened, recipe, texts, run) as read, adapted(model, chosen.rank, seed) as adapters:
            told = seed if chosen.shuffled else None
            learner = Closing(units, adapters, plan.drops, chosen.steps, chosen.rate, told)
            course = Course(chosen.steps, chosen.windows, seed, chosen.objective)
            losses = read.learn("adapters", units, learner, course)
            found = updates(adapters)
        record = {"loraprune": {**chosen.model_dump(), "units": len(units.prices), "losses": losses}}
        return Planned(plan, Adapted(found), units.split(learner.worth * learner.mask), record)

    def carry_out(self, model: Any, texts: Texts, planned: Planned, run: Run) -> dict[str, Any]:
        from billhook.cuts.narrowing import narrow
        from billhook.training.adapting import merge

        merge(model, planned.settings.updates)
        return {"cuts": narrow(model, texts.calibration, planned.plan, CUT, run, planned.scores)}


METHOD = LoraPrune()
