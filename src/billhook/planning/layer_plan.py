"""How many whole layers a budget takes, and which go by a preset."""

from transformers import PreTrainedModel

from billhook.calibration import layer_importance
from billhook.checkpoints.load import Opened
from billhook.errors import BillhookError
from billhook.math import layer_presets
from billhook.models import sizes
from billhook.models.families import layers
from billhook.models.plan import Plan
from billhook.planning.budget import Planner, solved
from billhook.planning.recipe import Recipe
from billhook.planning.texts import Texts
from billhook.runtime.run import Run


def named_plan(total: int, drop: str, keep: str) -> Plan:
    """The layers that are named: those that go, or else those that stay, of `total`."""
    named = layer_presets.parse_layers(drop or keep, total)
    gone = named if drop else [n for n in range(total) if n not in named]
    if not gone:
        raise BillhookError(f"--keep {keep} names all {total} layers: none would go")
    return Plan(layers=tuple(gone))


def preset_plan(opened: Opened, recipe: Recipe, preset: str, texts: Texts, run: Run, stay: int | None = None) -> Plan:
    """As many layers as the recipe's budget asks for, or all but `stay`, by a preset."""
    model, total = opened.model, len(layers(opened.model))
    if stay is None and not recipe.sized:
        return Plan()  # the vocabulary alone
    count = total - stay if stay is not None else len(solved(opened, recipe, by_depth(model), run.tick).layers)
    if not 0 < count <= total - 2:
        raise BillhookError(
            f"{count} of {total} layers would go: at least one goes, and the first and the last stay; name others with --drop"
        )
    seen, seed = (texts.calibration, texts.probe), recipe.calibration.seed
    gone = layer_importance.chosen(model, preset, count, *seen, run, seed)
    return Plan(layers=tuple(gone))


def by_depth(model: PreTrainedModel) -> Planner:
    """Parameters to save -> that many layers from the middle, which stand for whichever will go.

    Raises:
        BillhookError: the model has no layer between its first and its last.
    """
    total = len(layers(model))
    if total < 3:
        raise BillhookError(
            f"the first and the last layer stay, and this model has {total}: none can go for a budget; name one with --drop, or "
            "use a method that cuts inside the layers: fasp"
        )
    inner = sum(sizes.layer_parameters(model, n) for n in range(1, total - 1))

    def make(saving: float | int) -> Plan:
        count = round(saving * (total - 2) / inner)
        if not 0 < count <= total - 2:
            raise BillhookError(
                f"the budget asks for {saving:,.0f} parameters, {count} of {total} layers: at least one goes, and the first and "
                "the last stay"
            )
        return Plan(layers=tuple(layer_presets.middle(total, count)))

    return Planner(make, inner, inner / (total - 2))
