"""L0: random gates learn beside adapters of the weights, held to the budget (`billhook.training.l0_gates`)."""

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from billhook.choices import SEARCH_OBJECTIVES
from billhook.cuts.settings import Narrowing
from billhook.errors import SettingsError
from billhook.planning.method import LAYOUT, Method, MethodSettings, Opened, Planned, Run, Texts
from billhook.planning.recipe import Recipe
from billhook.runtime.options import option

CUT = Narrowing(restoration=False, stream="dense")  # training has made up for what goes


class L0Settings(MethodSettings):
    """How gates and adapters train."""

    steps: int = option(512, "steps of learning", ge=10)
    windows: int = option(1, "windows of a step", ge=1)
    rate: float = option(1.0, "highest rate of learning; falls to 0 as a cosine", gt=0)
    rank: int = option(8, "of the adapters; 0: none", ge=0)
    adapter_rate: float = option(1e-3, "highest rate of adapters", gt=0)
    objective: str = option(
        "kl", "nll: loss of the cut model; kl: divergence from the unpruned", names=SEARCH_OBJECTIVES
    )


@dataclass(frozen=True)
class Trained:
    """What a cut takes besides its plan."""

    updates: Mapping[str, Any]  # what adapters add to weights, by the path of their module
    scales: Mapping[tuple[int, str], Any]  # what is left of each unit's gate, by (layer, kind)


class L0(Method):
    name = "l0"
    title = "L0 masks (hard concrete), as DRPruning has them"
    paper = "arXiv:2310.06694, arXiv:2411.14055"
    does = (
        "Gives every unit, an FFN channel or a KV group, a random gate that is 0 with a chance which is learned, while low-rank "
        "adapters of the weights learn to do with what is open; two multipliers hold what is expected to go to the budget. The units "
        "likeliest to be closed go, what is left of the others' gates is folded in, and adapters are merged: nothing is restored."
    )
    needs = "calibration text; gradients of gates and adapters"
    costs = "a forward pass of the windows, then a forward and a backward pass of each step's, through all weights"
    loads = LAYOUT
    example = "billhook prune demo --method l0 --ratio 0.2 --layout per_layer --samples 512 -o smaller"
    Settings = L0Settings
    kinds = ("ffn", "groups")
    default_kinds = ("ffn",)
    trims = False

    def fits(self, recipe: Recipe) -> None:
        if (windows := recipe.settings.windows) > recipe.samples:
            raise SettingsError(f"--windows {windows}: the calibration has {recipe.samples}: raise --samples")

    def searches(self, recipe: Recipe) -> bool:
        return True

    def why_whole(self, recipe: Recipe) -> str:
        return "l0 trains gates of the whole model"

    def why_unforeseen(self, recipe: Recipe) -> str:
        return "l0 decides as it trains"

    def plan(self, opened: Opened, recipe: Recipe, texts: Texts, run: Run) -> Planned:
        import torch

        from billhook.math import hard_concrete
        from billhook.planning import gated_plan
        from billhook.training.adapting import adapted, updates
        from billhook.training.gating import Course, Units
        from billhook.training.l0_gates import HardConcrete

        chosen: L0Settings = recipe.settings
        seed, model = recipe.calibration.seed, opened.model
        units = Units.of(model, recipe.unit_kinds)
        begun = gated_plan.start(opened, recipe, units, torch.zeros_like(units.prices), run)
        with (
            gated_plan.lessons(opened, recipe, texts, run) as read,
            adapted(model, chosen.rank, seed) if chosen.rank else nullcontext({}) as adapters,
        ):
            forms = [adapter.module for adapter in adapters.values()]
            learner = HardConcrete(begun.goal, forms, chosen.steps, (chosen.rate, chosen.adapter_rate), seed)
            course = Course(chosen.steps, chosen.windows, seed, chosen.objective)
            losses = read.learn("gates", units, learner, course)
            found = updates(adapters)
        log_alpha = learner.log_alpha.detach()
        away = hard_concrete.excess(log_alpha, begun.goal, 1.0)
        record = {**chosen.model_dump(), "units": len(log_alpha), "losses": losses, "away": float(away.abs().max())}
        scales = units.split(hard_concrete.settled(log_alpha))
        return Planned(begun.planned(log_alpha), Trained(found, scales), units.split(log_alpha), {"l0": record})

    def carry_out(self, model: Any, texts: Texts, planned: Planned, run: Run) -> dict[str, Any]:
        from billhook.cuts.narrowing import narrow
        from billhook.training.adapting import merge
        from billhook.training.gating import fold

        merge(model, planned.settings.updates)
        fold(model, planned.settings.scales)
        return {"cuts": narrow(model, texts.calibration, planned.plan, CUT, run, planned.scores)}


METHOD = L0()
