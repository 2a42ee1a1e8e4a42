"""MLPruning: heads and rows go by scores, as many as each level learns to (`billhook.training.ratio_gates`)."""

from dataclasses import replace

from billhook.methods.gated import GatedMethod, GatedSettings, Learned, adapter_rate, rate, steps
from billhook.methods.narrowed import ScoredSettings
from billhook.planning.method import Opened, Planned, Run, Texts
from billhook.planning.recipe import Recipe
from billhook.runtime.options import option


class MlPruningSettings(GatedSettings, ScoredSettings):
    """How scores, shares and adapters learn."""

    steps: int = steps(72, 10)
    rate: float = rate(0.1)
    settling: int = option(24, "further steps, in which adapters alone train with what goes closed", ge=0)
    rank: int = option(8, "of the adapters", ge=1)
    adapter_rate: float = adapter_rate()


class MlPruning(GatedMethod):
    name = "mlpruning"
    title = "MLPruning: A Multilevel Structured Pruning Framework for Transformer-based Models"
    paper = "arXiv:2105.14636"
    does = (
        "Gives every unit, an FFN channel, a query head or a KV group, a score, and every axis of every layer a share that it keeps: "
        "the units of largest score. Scores, shares and low-rank adapters of the weights learn together, within the budget; then gates "
        "stay as the plan says, and the adapters alone train on. They are merged, and nothing is restored. In the uniform layout all "
        "layers have one share."
    )
    needs = "calibration text; gradients of scores, shares and adapters"
    costs = "two forward passes of the windows, then a forward and a backward pass of each step's, through all weights"
    example = "billhook prune demo --method mlpruning --ratio 0.2 --layout per_layer --axes groups,ffn -o smaller"
    Settings = MlPruningSettings
    kinds = ("ffn", "heads", "groups")

    def plan(self, opened: Opened, recipe: Recipe, texts: Texts, run: Run) -> Planned:
        from billhook.planning import gated_plan
        from billhook.training.adapting import adapted, updates
        from billhook.training.gating import Units
        from billhook.training.ratio_gates import Pace, Ratios, Settled, levels_of

        chosen: MlPruningSettings = recipe.settings
        model = opened.model
        units = Units.of(model, recipe.unit_kinds)
        z = gated_plan.scored(opened, recipe, units, texts.calibration, run)
        begun = gated_plan.start(opened, recipe, units, z, run)
        levels = levels_of(units, begun.goal, alike=recipe.shape.layout == "uniform")
        with gated_plan.lessons(opened, recipe, texts, run) as read:
            with adapted(model, chosen.rank, read.course.seed) as adapters:
                forms = [adapter.module for adapter in adapters.values()]
                learner = Ratios(z, levels, forms, Pace(chosen.steps, chosen.rate, chosen.adapter_rate))
                losses, found = read.learn("shares", units, learner), updates(adapters)
            shares, order = learner.shares[levels.level], learner.order
            plan = begun.planned(order)
            if chosen.settling:
                further = replace(read.course, steps=chosen.settling, seed=read.course.seed + 1)
                with adapted(model, chosen.rank, further.seed, found) as adapters:
                    forms = [adapter.module for adapter in adapters.values()]
                    settled = Settled(begun.mask(plan, order), forms, chosen.adapter_rate)
                    losses += read.learn("settled", units, settled, further)
                    found = updates(adapters)
        told: dict[str, list[float]] = {}
        for (_, kind), own in units.split(shares).items():
            told.setdefault(kind, []).append(own[0].item())
        record = {**chosen.learned, "units": len(order), "losses": losses, "tokens": read.read_in(len(losses))}
        record["shares"] = told
        return Planned(plan, Learned(chosen.cut, updates=found), units.split(order), {"mlpruning": record})


METHOD = MlPruning()
