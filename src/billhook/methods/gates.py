"""Gates with frozen weights: a number for each unit learns by gradient which stay (`training.frozen_gates`)."""

from dataclasses import replace

from billhook.choices import GATE_WAYS
from billhook.errors import SettingsError
from billhook.methods.gated import GatedMethod, GatedSettings, Learned
from billhook.methods.narrowed import NarrowingSettings
from billhook.planning.method import Opened, Planned, Run, Texts
from billhook.planning.recipe import Recipe
from billhook.runtime.options import option


class GatesSettings(GatedSettings, NarrowingSettings):
    """How gates learn, and the cut that they end with; why these defaults: docs/LOG.md."""

    way: str = option("annealed", f"what a gate is while it learns: {', '.join(GATE_WAYS)}", names=GATE_WAYS)
    scaling: int = option(64, "with --no-restoration: further steps that learn a scale for each that does", ge=0)


class Gates(GatedMethod):
    name = "gates"
    title = "Gates with frozen weights, after DDP and GRASPrune"
    paper = "arXiv:2603.08065, arXiv:2604.19398"
    does = (
        "Multiplies what every unit puts out, an FFN channel or a KV group, by a gate, and learns the gates by gradient with the "
        "weights as they are, so that the model says what it said: within the budget at every step, soft at first and ever nearer to "
        "0 and 1. The units of lowest gates go, of whatever layer; what stays is restored as fasp does, or with --no-restoration "
        "scaled by what further steps learn."
    )
    needs = "calibration text; gradients of gates alone"
    costs = "a forward pass of the windows, then a forward and a backward pass of each step's; then as fasp"
    example = "billhook prune demo --method gates --ratio 0.2 --layout per_layer -o smaller"
    Settings = GatesSettings

    def fits(self, recipe: Recipe) -> None:
        super().fits(recipe)
        chosen: GatesSettings = recipe.settings
        if chosen.restoration and chosen.scaling != GatesSettings().scaling:
            raise SettingsError("--scaling learns what restoration solves for: give --no-restoration with it")

    def judges(self, recipe: Recipe) -> bool:
        return True

    def plan(self, opened: Opened, recipe: Recipe, texts: Texts, run: Run) -> Planned:
        from billhook.planning import gated_plan
        from billhook.training.frozen_gates import Chosen, Scales
        from billhook.training.gating import Units

        chosen: GatesSettings = recipe.settings
        units = Units.of(opened.model, recipe.unit_kinds)
        z = gated_plan.scored(opened, recipe, units, texts.calibration, run)
        begun = gated_plan.start(opened, recipe, units, z, run)
        with gated_plan.lessons(opened, recipe, texts, run) as read:
            learner = Chosen(begun.z, begun.goal, chosen.way, chosen.rate, chosen.steps)
            losses = read.learn("units", units, learner)
            plan, z, told = gated_plan.better(opened, texts, begun, learner.z.detach(), run)
            told, scales = {**chosen.learned, "units": len(z), **told, "losses": losses}, {}
            if not chosen.restoration and chosen.scaling:
                scaled = Scales(begun.mask(plan, z))
                further = replace(read.course, steps=chosen.scaling, seed=read.course.seed + 1)
                told["losses of scales"] = read.learn("scales", units, scaled, further)
                scales = units.split(scaled.scale.detach())
            told["tokens"] = read.read_in(len(losses) + len(told.get("losses of scales", ())))
        return Planned(plan, Learned(chosen.cut, scales=scales), units.split(z), {"gates": told})


METHOD = Gates()
