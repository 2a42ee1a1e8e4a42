"""Config keys that say what each layer is keep their meaning once layers are gone."""

from typing import Any

import pytest
from transformers import PreTrainedConfig

from billhook.models import patterns


def config(**keys: Any) -> PreTrainedConfig:
    made = PreTrainedConfig()
    for key, value in {"num_hidden_layers": 4, **keys}.items():
        setattr(made, key, value)
    return made


@pytest.mark.parametrize(
    ("given", "left"),
    [
        ({"layer_types": ["a", "b", "a", "b"]}, {"layer_types": ["a", "b", "b"]}),
        ({"window_by_layer": [8, 16, 8, 16]}, {"window_by_layer": [8, 16, 16]}),
        ({"attn_layer_indices": [1, 3]}, {"attn_layer_indices": [1, 2]}),
        ({"full_attn_idxs": [0, 1, 2, 3]}, {"full_attn_idxs": [0, 1, 2]}),
        ({"block_types": ["a", "b"]}, {"block_types": ["a", "b", "b"]}),
        ({"eos_token_id": [0, 1, 2, 3]}, {}),
        ({"rope_sections": [1, 2]}, {}),
        ({"layer_sizes": [5, 7]}, {}),
    ],
    ids=lambda given: next(iter(given), "none"),
)
def test_what_is_left_is_said_of_those_that_stay(given: dict[str, Any], left: dict[str, Any]) -> None:
    before = config(**given)
    assert patterns.kept(before, [0, 1, 3]) == left


def test_keeping_all_changes_nothing() -> None:
    every = config(layer_types=["a", "b", "a", "b"], attn_layer_indices=[1, 3])
    assert patterns.kept(every, range(4)) == {"layer_types": ["a", "b", "a", "b"], "attn_layer_indices": [1, 3]}


def test_layers_are_of_one_kind_where_all_keys_say_the_same_of_them() -> None:
    kinds = patterns.kinds(config(layer_types=["a", "b", "a", "b"], moe_layers=[3]))
    assert kinds[0] == kinds[2] and kinds[1] != kinds[3]
