"""Gates with frozen weights: a number for each unit learns by gradient which stay (`training.frozen_gates`)."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from billhook.choices import GATE_WAYS, SEARCH_OBJECTIVES
from billhook.cuts.settings import Narrowing
from billhook.errors import SettingsError
from billhook.methods.narrowed import NarrowingSettings
from billhook.planning.method import LAYOUT, Method, Opened, Planned, Run, Texts
from billhook.planning.recipe import Recipe
from billhook.runtime.options import option


class GatesSettings(NarrowingSettings):
    """How gates learn, and the cut that they end with; why these defaults: docs/LOG.md."""

    way: str = option("annealed", f"what a gate is while it learns: {', '.join(GATE_WAYS)}", names=GATE_WAYS)
    steps: int = option(128, "steps of learning", ge=1)
    scaling: int = option(64, "with --no-restoration: further steps that learn a scale for each that does", ge=0)
    windows: int = option(1, "windows of a step", ge=1)
    rate: float = option(0.05, "highest rate of learning; falls to 0 as a cosine", gt=0)
    objective: str = option(
        "kl", "nll: loss of the cut model; kl: divergence from the unpruned", names=SEARCH_OBJECTIVES
    )

    @property
    def learned(self) -> dict[str, Any]:
        """What decides how gates learn, for the record."""
        return {name: getattr(self, name) for name in ("way", "steps", "windows", "rate", "objective")}


@dataclass(frozen=True)
class Gated:
    """What a cut takes besides its plan."""

    cut: Narrowing
    scales: Mapping[tuple[int, str], Any] | None = None  # of all units, by (layer, kind), where they were learned


class Gates(Method):
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
    loads = LAYOUT
    example = "billhook prune demo --method gates --ratio 0.2 --layout per_layer -o smaller"
    Settings = GatesSettings
    kinds = ("ffn", "groups")
    default_kinds = ("ffn",)
    trims = False

    def fits(self, recipe: Recipe) -> None:
        chosen: GatesSettings = recipe.settings
        if chosen.windows > recipe.samples:
            raise SettingsError(f"--windows {chosen.windows}: the calibration has {recipe.samples}: raise --samples")
        if chosen.restoration and chosen.scaling != GatesSettings().scaling:
            raise SettingsError("--scaling learns what restoration solves for: give --no-restoration with it")

    def judges(self, recipe: Recipe) -> bool:
        return True

    def searches(self, recipe: Recipe) -> bool:
        return True

    def why_whole(self, recipe: Recipe) -> str:
        return "gates learn on the whole model"

    def why_unforeseen(self, recipe: Recipe) -> str:
        return "gates decides by what it learns"

    def plan(self, opened: Opened, recipe: Recipe, texts: Texts, run: Run) -> Planned:
        from billhook.planning import gated_plan
        from billhook.training.frozen_gates import Chosen, Scales
        from billhook.training.gating import Course, Units

        chosen, seed = recipe.settings, recipe.calibration.seed
        units = Units.of(opened.model, recipe.unit_kinds)
        z = gated_plan.scored(opened, recipe, units, texts.calibration, run)
        begun = gated_plan.start(opened, recipe, units, z, run)
        with gated_plan.lessons(opened, recipe, texts, run) as read:
            learner = Chosen(begun.z, begun.goal, chosen.way, chosen.rate, chosen.steps)
            course = Course(chosen.steps, chosen.windows, seed, chosen.objective)
            losses = read.learn("units", units, learner, course)
            plan, z, told = gated_plan.better(opened, texts, begun, learner.z.detach(), run)
            told |= {"losses": losses}
            scales = None
            if not chosen.restoration and chosen.scaling:
                scaled = Scales(begun.mask(plan, z))
                losses = read.learn("scales", units, scaled, replace(course, steps=chosen.scaling, seed=seed + 1))
                scales, told = units.split(scaled.scale.detach()), told | {"losses of scales": losses}
        record = {"gates": {**chosen.learned, "units": len(z), **told}}
        return Planned(plan, Gated(chosen.cut, scales), units.split(z), record)

    def carry_out(self, model: Any, texts: Texts, planned: Planned, run: Run) -> dict[str, Any]:
        from billhook.cuts.narrowing import narrow
        from billhook.training.gating import fold

        chosen: Gated = planned.settings
        if chosen.scales is not None:
            fold(model, chosen.scales)
        return {"cuts": narrow(model, texts.calibration, planned.plan, chosen.cut, run, planned.scores)}


METHOD = Gates()
