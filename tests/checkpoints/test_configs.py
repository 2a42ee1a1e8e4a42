"""config.json: each value that no model could have is named with its key, before anything is built."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
import tiny
from folders import run, written

from billhook.checkpoints import load
from billhook.errors import BillhookError

WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "architectures is a number": ({"architectures": 3}, "is a 3, not a causal LM"),
    "architectures of numbers": ({"architectures": [1, "LlamaForCausalLM"]}, "config.json: architectures"),
    "a billion layers": ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1,000,000,000, and the weights are of 3"),
    "more layers than digits": ({"num_hidden_layers": 10**400}, "config.json: num_hidden_layers is 1000"),
    "a layer more": ({"num_hidden_layers": 4}, "num_hidden_layers is 4, and the weights are of 3 layers"),
    "layers below none": ({"num_hidden_layers": -1}, "config.json: num_hidden_layers is -1"),
    "layers in words": ({"num_hidden_layers": "3"}, "config.json: num_hidden_layers is '3'"),
    "no width": ({"hidden_size": 0}, "config.json: hidden_size is 0"),
    "a list of widths": ({"intermediate_size": [48]}, r"config.json: intermediate_size is \[48\]"),
    "a truth value": ({"num_attention_heads": True}, "config.json: num_attention_heads is True"),
    "half a head": ({"num_key_value_heads": 0.5}, "config.json: num_key_value_heads is 0.5"),
    "a huge width": ({"head_dim": 2**40}, "config.json: head_dim is 1099511627776"),
    "no vocabulary": ({"vocab_size": -258}, "config.json: vocab_size is -258"),
    "a window in words": ({"sliding_window": "8"}, "config.json: sliding_window is '8'"),
    "dividing by nothing": ({"rms_norm_eps": -1.0}, "config.json: rms_norm_eps is -1.0"),
    "a turn of less": ({"rope_theta": 0}, "config.json: rope_theta is 0"),
    "turned more than whole": (
        {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 10.0**9}},
        "config.json: rope_parameters: partial_rotary_factor is 1000000000.0",
    ),
    "the same in the old words": (
        {"rope_scaling": {"full_attention": {"partial_rotary_factor": "all"}}},
        "config.json: rope_scaling.full_attention: partial_rotary_factor is 'all'",
    ),
    "dtype is a number": ({"dtype": 32}, "config.json: dtype is 32"),
    "code is a list": ({"auto_map": [1]}, r"config.json: auto_map is \[1\]"),
    "quantised by nothing": ({"quantization_config": {}}, "is quantised .unknown method"),
    "quantised by a page": ({"quantization_config": "x" * 5000}, "is quantised .xxx"),
    "a long family": ({"model_type": "x" * 5000}, "model family 'xxx.*is not supported"),
}


@pytest.mark.parametrize(("values", "words"), WRONG.values(), ids=list(WRONG))
def test_a_value_that_no_model_has(values: dict[str, Any], words: str, folder: Path) -> None:
    say(folder, **values)
    with pytest.raises(BillhookError, match=words) as error:
        load.check_folder(folder, str(folder))
    assert len(str(error.value)) < 600


@pytest.mark.parametrize("family", ["gpt2", "bloom", "opt", "qwen2_moe"])
def test_layers_of_every_family_are_counted(family: str, tmp_path: Path) -> None:
    folder = written(family, tmp_path / "model")
    key = next(
        key for key in ("n_layer", "num_hidden_layers") if key in json.loads((folder / "config.json").read_text())
    )
    load.check_folder(folder, "it")
    say(folder, **{key: 10**8})
    began = time.monotonic()
    for command in ("inspect", "check"):
        assert f"{key} is 100,000,000, and the weights are of 3 layers" in run(command, folder)
    assert time.monotonic() - began < 30


@pytest.mark.parametrize("family", tiny.CONFIGS)
def test_a_config_as_it_is_written_is_taken(family: str) -> None:
    load.check_config(tiny.model(family).config.to_dict() | {"dtype": "float32"}, family)


def say(folder: Path, **values: Any) -> None:
    """Put other values into a folder's config."""
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))
