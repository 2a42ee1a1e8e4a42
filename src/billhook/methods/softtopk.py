"""SoftTopK: one mask of a task, learned by gradient with the weights frozen (`billhook.training.frozen_gates`)."""

from functools import partial

from billhook.methods.gated import GatedMethod, GatedSettings, Learned, rate, steps
from billhook.methods.narrowed import NarrowingSettings
from billhook.planning.method import Opened, Planned, Run, Texts
from billhook.planning.recipe import Recipe
from billhook.runtime.options import option


class SoftTopKSettings(GatedSettings, NarrowingSettings):
    """How the mask learns, and the cut that it ends with."""

    steps: int = steps(64)
    rate: float = rate(0.1)
    heat: float = option(0.3, "T of the gates: the nearer to 0, the nearer they are to 0 and 1 from the start", gt=0)
    reopen: bool = option(True, "closed gates learn, too, and may open again; the paper's do not")


class SoftTopK(GatedMethod):
    name = "softtopk"
    title = "Instruction-Following Pruning (IFPruning), with one mask for a task"
    paper = "arXiv:2501.02086"
    does = (
        "Learns which FFN channels, or KV groups, a task needs: SoftTopK gives as many of each layer as stay a gate between 0 and 1, "
        "and the others 0; the gates learn by gradient, with the weights as they are, that the model says of the calibration text "
        "what it said. The text is the task: other texts, other masks of one model. What stays is restored as fasp does, unless "
        "--no-restoration."
    )
    needs = "calibration text, which is the task; gradients of gates alone"
    costs = "a forward pass of the windows, then a forward and a backward pass of each step's; then as fasp"
    example = "billhook prune demo --method softtopk --ratio 0.2 --no-restoration -o smaller"
    Settings = SoftTopKSettings

    def judges(self, recipe: Recipe) -> bool:
        return True

    def plan(self, opened: Opened, recipe: Recipe, texts: Texts, run: Run) -> Planned:
        from billhook.math import gates
        from billhook.planning import gated_plan
        from billhook.training import frozen_gates
        from billhook.training.gating import Units

        chosen: SoftTopKSettings = recipe.settings
        units = Units.of(opened.model, recipe.unit_kinds)
        z = gated_plan.scored(opened, recipe, units, texts.calibration, run)
        begun = gated_plan.start(opened, recipe, units, z, run)
        with gated_plan.lessons(opened, recipe, texts, run) as read:
            mask = partial(gates.top, heat=chosen.heat, reopen=chosen.reopen)
            learner = frozen_gates.SoftTopK(begun.z, begun.goal, mask, chosen.rate, chosen.steps)
            losses = read.learn("mask", units, learner)
        plan, z, told = gated_plan.better(opened, texts, begun, learner.z.detach(), run)
        record = {**chosen.learned, "units": len(z), **told, "losses": losses, "tokens": read.read_in(len(losses))}
        return Planned(plan, Learned(chosen.cut), units.split(z), {"softtopk": record})


METHOD = SoftTopK()
