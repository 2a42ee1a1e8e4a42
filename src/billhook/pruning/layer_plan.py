"""Which whole layers go: those that the recipe names, or as many as its budget asks for, by its preset."""

from pathlib import Path

import torch
from transformers import PreTrainedModel

from billhook.calibration import layer_importance
from billhook.cuts.chopping import check_patch
from billhook.errors import BillhookError
from billhook.math import layer_presets
from billhook.models import sizes
from billhook.models.families import layers
from billhook.models.plan import Plan
from billhook.pruning.budget import Planner
from billhook.pruning.recipe import BUDGETS, Recipe
from billhook.pruning.solve import solved
from billhook.pruning.texts import Texts, hashes
from billhook.runtime import cache
from billhook.runtime.progress import Tick


def layer_plan(
    model: PreTrainedModel, chosen: Recipe, texts: Texts, dtype: torch.dtype, statistics: Path | None, tick: Tick
) -> Plan:
    """The layers that the recipe names, or as many as its budget asks for, by its preset."""
    total = len(layers(model))
    if chosen.patches:
        check_patch(model)
    if chosen.drop or chosen.keep:
        named = layer_presets.parse_layers(chosen.drop or chosen.keep, total)
        gone = named if chosen.drop else [n for n in range(total) if n not in named]
        if not gone:
            raise BillhookError(f"--keep {chosen.keep} names all {total} layers: none would go")
        return Plan(layers=tuple(gone))
    if chosen.layers is not None:
        count = total - chosen.layers
    elif all(getattr(chosen, name) is None for name in BUDGETS):
        return Plan()  # the vocabulary alone
    else:
        count = len(solved(model, chosen, _by_depth(model), dtype, tick).layers)
    if not 0 < count <= total - 2:
        raise BillhookError(
            f"{count} of {total} layers would go: at least one goes, and the first and the last stay; name others with --drop"
        )
    key = cache.model_key(model) | {"tokens": hashes(texts)} if statistics else {}
    return Plan(
        layers=tuple(
            layer_importance.chosen(
                model,
                chosen.preset,
                count,
                texts.calibration,
                texts.probe,
                seed=chosen.seed,
                folder=statistics,
                key=key,
                tick=tick,
            )
        )
    )


def _by_depth(model: PreTrainedModel) -> Planner:
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
