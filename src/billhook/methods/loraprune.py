"""LoRAPrune: units go while adapters train, by the adapters' gradients (`billhook.training.lora_gates`)."""

from billhook.methods.gated import CUT, GatedMethod, GatedSettings, Learned, objective, rate, steps
from billhook.planning.method import Opened, Planned, Run, Texts
from billhook.planning.recipe import Recipe
from billhook.runtime.options import option


class LoraPruneSettings(GatedSettings):
    """How adapters train, and by what units go; the paper's are batches of 128, 512 tokens each, and two epochs."""

    steps: int = steps(128, 10)
    rate: float = rate(1e-3)
    rank: int = option(8, "of the adapters", ge=1)
    objective: str = objective("nll")
    shuffled: bool = option(False, "the control: each is told what another is worth")


class LoraPrune(GatedMethod):
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
    example = "billhook prune demo --method loraprune --ratio 0.2 --samples 256 --steps 256 -o smaller"
    Settings = LoraPruneSettings
    kinds = ("ffn", "heads", "groups")
    allocates = True

    def judges(self, recipe: Recipe) -> bool:
        return recipe.shape.allocation == "sensitivity"

    def plan(self, opened: Opened, recipe: Recipe, texts: Texts, run: Run) -> Planned:
        from billhook.planning import gated_plan
        from billhook.planning.axis_plan import axis_plan
        from billhook.training.adapting import adapted, updates
        from billhook.training.gating import Units
        from billhook.training.lora_gates import Closing

        chosen: LoraPruneSettings = recipe.settings
        seed, model = recipe.calibration.seed, opened.model
        plan = axis_plan(opened, recipe, CUT, texts, {}, run)
        units = Units.of(model, recipe.unit_kinds)
        with gated_plan.lessons(opened, recipe, texts, run) as read, adapted(model, chosen.rank, seed) as adapters:
            told = seed if chosen.shuffled else None
            learner = Closing(units, adapters, plan.drops, chosen.steps, chosen.rate, told)
            losses = read.learn("adapters", units, learner)
            found = updates(adapters)
        record = {**chosen.learned, "units": len(units.prices), "losses": losses, "tokens": read.read_in(len(losses))}
        order = units.split(learner.worth * learner.mask)
        return Planned(plan, Learned(updates=found), order, {"loraprune": record})


METHOD = LoraPrune()
