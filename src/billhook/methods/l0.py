"""L0: random gates learn beside adapters of the weights, held to the budget (`billhook.training.l0_gates`)."""

from contextlib import nullcontext

from billhook.methods.gated import GatedMethod, GatedSettings, Learned, adapter_rate, rate, steps
from billhook.planning.method import Opened, Planned, Run, Texts
from billhook.planning.recipe import Recipe
from billhook.runtime.options import option


class L0Settings(GatedSettings):
    """How gates and adapters train."""

    steps: int = steps(512, 10)
    rate: float = rate(1.0)
    rank: int = option(8, "of the adapters; 0: none", ge=0)
    adapter_rate: float = adapter_rate()


class L0(GatedMethod):
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
    example = "billhook prune demo --method l0 --ratio 0.2 --layout per_layer --samples 512 -o smaller"
    Settings = L0Settings

    def plan(self, opened: Opened, recipe: Recipe, texts: Texts, run: Run) -> Planned:
        import torch

        from billhook.math import hard_concrete
        from billhook.planning import gated_plan
        from billhook.training.adapting import adapted, updates
        from billhook.training.gating import Units
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
            losses = read.learn("gates", units, learner)
            found = updates(adapters)
        log_alpha = learner.log_alpha.detach()
        away = hard_concrete.excess(log_alpha, begun.goal, 1.0)
        record = {**chosen.learned, "units": len(log_alpha), "losses": losses, "tokens": read.read_in(len(losses))}
        record["away"] = float(away.abs().max())
        cut = Learned(updates=found, scales=units.split(hard_concrete.settled(log_alpha)))
        return Planned(begun.planned(log_alpha), cut, units.split(log_alpha), {"l0": record})


METHOD = L0()
