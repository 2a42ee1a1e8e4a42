"""Config keys that say what each decoder layer is: a value for each, the numbers of some, or a cycle of kinds.

Which they are is told from their shape.  Where a row is derived, its proof sees whether the class goes by them once
layers are gone (billhook.models.proof).
"""

import re
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedConfig

# keys that say how many layers come before the first with experts
DENSE_FIRST = ("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index")
SHARED = "num_kv_shared_layers"  # config key: so many last layers take keys and values from earlier ones
SIZES = "per_layer_config"  # config key: by a layer's number, its sizes that differ from the others'
NUMBERS = re.compile(r"layer|idx|indic")  # of the name of a key that holds numbers of layers


def listed(config: PreTrainedConfig) -> tuple[str, ...]:
    """Keys that hold one value for each layer."""
    count, others = config.num_hidden_layers, numbered(config)
    return tuple(key for key, value in _lists(config) if len(value) == count > 1 and key not in others)


def numbered(config: PreTrainedConfig) -> tuple[str, ...]:
    """Keys that hold numbers of layers, ascending."""
    count = config.num_hidden_layers
    return tuple(
        key
        for key, value in _lists(config)
        if NUMBERS.search(key) and all(type(n) is int for n in value)
        if sorted({n for n in value if 0 <= n < count}) == list(value)
    )


def cyclic(config: PreTrainedConfig) -> tuple[str, ...]:
    """Keys that hold names of kinds, fewer than there are layers: the layers take them in turn."""
    count = config.num_hidden_layers
    return tuple(
        key
        for key, value in _lists(config)
        if 1 < len(value) < count and all(isinstance(kind, str) for kind in value) and "type" in key
    )


def kinds(config: PreTrainedConfig) -> list[tuple[Any, ...]]:
    """What the keys say of each layer."""
    values = config.to_dict()
    return [
        (
            *(values[key][n] for key in listed(config)),
            *(n in values[key] for key in numbered(config)),
            *(values[key][n % len(values[key])] for key in cyclic(config)),
        )
        for n in range(config.num_hidden_layers)
    ]


def kept(config: PreTrainedConfig, layers: Sequence[int]) -> dict[str, list[Any]]:
    """The values of the keys once only these layers are left, ascending: of cycles, a kind for each of them."""
    values = config.to_dict()
    new = {n: place for place, n in enumerate(layers)}
    return {
        **{key: [values[key][n] for n in layers] for key in listed(config)},
        **{key: [new[n] for n in values[key] if n in new] for key in numbered(config)},
        **{key: [values[key][n % len(values[key])] for n in layers] for key in cyclic(config)},
    }


def counted(config: PreTrainedConfig, layers: Sequence[int]) -> dict[str, Any]:
    """The values of `SHARED` and `SIZES`, where the config has them, once only these layers are left, ascending."""
    values: dict[str, Any] = {}
    if shares(config):
        values[SHARED] = sum(n >= config.num_hidden_layers - getattr(config, SHARED) for n in layers)
    if getattr(config, "is_heterogeneous", False):
        sizes = {int(n): own for n, own in config.to_dict()[SIZES].items()}
        values[SIZES] = {new: sizes[n] for new, n in enumerate(layers) if n in sizes}
    return values


def shares(config: PreTrainedConfig) -> bool:
    """Whether some layers take keys and values from earlier ones."""
    return bool(getattr(config, SHARED, 0))


def shared_from(config: Any) -> list[int]:
    """The layers whose keys and values later ones take: the last of each type that is not one of these."""
    return [n for n, mode in enumerate(config.kv_sharing_modes) if mode == "store"] if shares(config) else []


def _lists(config: PreTrainedConfig) -> list[tuple[str, Sequence[Any]]]:
    return [
        (key, value)
        for key, value in config.to_dict().items()
        if isinstance(value, list | tuple) and value and not key.endswith(("token_id", "architectures"))
    ]
