"""What transformers refuses, in one line: its whole reason, and the key of config.json that it is about, which few of its errors name."""

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from billhook.errors import BillhookError, reason
from billhook.runtime.quiet import quiet_transformers

NAMES = ("model_type", "architectures", "transformers_version", "_name_or_path")  # what a config is of, and no setting
MOST = 3  # keys that are named
SHOWN = 40  # characters of a value


def error_of(
    what: str, error: Exception, name: str, said: Mapping[str, Any], again: Callable[[dict[str, Any]], object]
) -> BillhookError:
    """An error of transformers in one line.

    Args:
        what: it could not do.
        name: of the model.
        said: what its config says.
        again: fails as `error` did, given that, and may succeed once the key that it is about is left out.
    """
    blamed = [f"{key} is {_shown(said[key])}" for key in to_blame(error, said, again)]
    of = f"config.json: {' and '.join(blamed)}: " if blamed else ""
    return BillhookError(f"{name}: {of}transformers {what} ({reason(error)})")


def to_blame(error: Exception, said: Mapping[str, Any], again: Callable[[dict[str, Any]], object]) -> list[str]:
    """The keys of which each, left out, mends it, or else has another error; none where that cannot be found out, or is true of many."""

    def fails(keys: Mapping[str, Any]) -> str:
        try:
            with quiet_transformers():
                again(copy.deepcopy(dict(keys)))
        except Exception as error:  # any kind, as above
            return reason(error)
        return ""

    if fails(said) != reason(error):
        return []
    others = {key: fails({one: said[one] for one in said if one != key}) for key in said if key not in NAMES}
    mending = [key for key, other in others.items() if not other]
    found = mending or [key for key, other in others.items() if other != reason(error)]
    return found if len(found) <= MOST else []


def read(said: dict[str, Any]) -> Any:
    """A config of what config.json says; raises whatever transformers does."""
    return CONFIG_MAPPING[said["model_type"]].from_dict(said)


def build(config: Any) -> Any:
    """The model of a config on the meta device, buffers too; raises whatever transformers does."""
    with torch.device("meta"), quiet_transformers():
        return AutoModelForCausalLM.from_config(config)


def build_first(said: dict[str, Any]) -> Any:
    """A model of one layer: what is wrong with a layer is wrong with the first one, and a hundred would take a minute for all keys."""
    config = read(said)
    config.num_hidden_layers = 1
    return build(config)


def _shown(value: object) -> str:
    text = ascii(value)
    return text if len(text) <= SHOWN else text[:SHOWN] + "…"
