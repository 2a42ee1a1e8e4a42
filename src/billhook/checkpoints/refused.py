"""Errors of transformers in one line: the reason, and the key of config.json behind it, which few errors name."""

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.initialization import no_init_weights

from billhook.errors import BillhookError, reason
from billhook.runtime.quiet import quiet_transformers

NAMES = ("model_type", "architectures", "transformers_version", "_name_or_path")  # keys that are not settings
# how transformers loads packed weights as plain ones, by quant_method, where that is not by `dequantize`
DEQUANTISED = {
    "compressed-tensors": "quantization_config=CompressedTensorsConfig(dequantize=True),",
    "mxfp4": "quantization_config=Mxfp4Config(dequantize=True),",
    "fp8": "quantization_config=FineGrainedFP8Config(dequantize=True),",
}
MOST = 3  # the most keys that are named
SHOWN = 40  # the most characters of a value that are shown


def error_of(
    what: str, error: Exception, name: str, config: Mapping[str, Any], retry: Callable[[dict[str, Any]], object]
) -> BillhookError:
    """An error of transformers in one line.

    Args:
        what: what transformers could not do.
        name: the model's name.
        config: the content of its config.json.
        retry: does it again with a config: it fails alike with all keys, and may succeed without the one at fault.
    """
    faults = [f"{key} is {_shown(config[key])}" for key in to_blame(error, config, retry)]
    where = f"config.json: {' and '.join(faults)}: " if faults else ""
    return BillhookError(f"{name}: {where}transformers {what} ({reason(error)})")


def to_blame(error: Exception, config: Mapping[str, Any], retry: Callable[[dict[str, Any]], object]) -> list[str]:
    """The keys whose absence mends the error, or else changes it; none if that cannot be told, or they are many."""

    def fails(keys: Mapping[str, Any]) -> str:
        try:
            with quiet_transformers():
                retry(copy.deepcopy(dict(keys)))
        except Exception as error:  # transformers raises many kinds
            return reason(error)
        return ""

    if fails(config) != reason(error):
        return []
    without = {
        key: fails({other: value for other, value in config.items() if other != key})
        for key in config
        if key not in NAMES
    }
    mending = [key for key, failure in without.items() if not failure]
    blamed = mending or [key for key, failure in without.items() if failure != reason(error)]
    return blamed if len(blamed) <= MOST else []


def read(content: dict[str, Any]) -> Any:
    """transformers' config of what config.json holds; raises whatever transformers does."""
    return CONFIG_MAPPING[content["model_type"]].from_dict(content)


def build(config: Any) -> Any:
    """The model of a config with parameters and buffers on the meta device; raises whatever transformers does."""
    with torch.device("meta"), quiet_transformers(), no_init_weights():
        model: Any = AutoModelForCausalLM.from_config(config)
    model.tie_weights()
    return model


def build_first(content: dict[str, Any]) -> Any:
    """A model of one layer, where a fault of any layer shows; a hundred layers would take a minute over all keys."""
    config = read(content)
    config.num_hidden_layers = 1
    return build(config)


def _shown(value: object) -> str:
    text = ascii(value)
    return text if len(text) <= SHOWN else text[:SHOWN] + "…"
