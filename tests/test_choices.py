"""Every choice that has a name is one that code goes by, and the other way round."""

import pytest
import tiny

from billhook import choices
from billhook.checkpoints import load
from billhook.checkpoints.clients import check
from billhook.checkpoints.gguf import write
from billhook.math import layer_presets, scores, solvers, taylor
from billhook.models import modeling_per_layer
from billhook.training import trainables


@pytest.mark.parametrize(
    ("named", "used"),
    [
        (choices.SCORES, scores.COLUMN_SCORES),
        (choices.GRADIENT_SCORES, taylor.FROM_GRADIENTS),
        (choices.DATA_FREE_PRESETS, (*layer_presets.POSITIONS, "random")),
        (choices.PRESETS, {**choices.DATA_FREE_PRESETS, **choices.MEASURED_PRESETS}),
        (choices.TRAINABLE, trainables.TRAINERS),
        (choices.CLIENTS, check.CHECKS),
        (choices.DTYPES, load.DTYPES),
        (choices.BY_BILLHOOK, write.FILE_TYPES),
        (choices.MIXED, modeling_per_layer.MIXED),
        (choices.AXES, (*choices.KINDS, "layers", "residual")),
        (solvers.SOLVERS, tiny.ZEROS),
    ],
)
def test_named_and_used_are_the_same(named: object, used: object) -> None:
    assert list(named) == list(used)


def test_every_meaning_is_said() -> None:
    tables = [table for name, table in vars(choices).items() if name.isupper() and isinstance(table, dict)]
    assert len(tables) > 15
    assert all(isinstance(name, str) and meaning for table in tables for name, meaning in table.items())
