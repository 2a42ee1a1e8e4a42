"""A row that the user gives for a model type without one: a YAML or JSON file, which is proved as a derived row is.

    model_type: newtype
    layers: model.layers
    up: [mlp.gate_proj, mlp.up_proj]
    down: mlp.down_proj

Names are those of billhook.models.modeling_per_layer.Family; config keys that are left out are looked for.
"""

import os
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict
from torch import nn
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig
from transformers.pytorch_utils import Conv1D

from billhook.errors import BillhookError, ModelError
from billhook.models.derive import built, completed, mixture_keys, of_attention
from billhook.models.families import KNOWN
from billhook.models.modeling_per_layer import Family
from billhook.models.places import has
from billhook.runtime.validation import checked

ROWS: dict[str, "FamilyRow"] = {}  # by model type; of this process
Size = Literal["width", "experts", "expert_width", "shared_width", "top_k", "groups", "top_groups"]


class FamilyRow(BaseModel):
    """What a file says: paths within a decoder layer, but `layers`, which is one of the model."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    model_type: str
    layers: str
    up: list[str] = []  # what writes the FFN channels: the gate first, where there is one
    down: str = ""  # what reads them
    stacked: bool = False  # whether the one matrix of `up` holds the gate's rows and then the up's
    experts: str = ""
    router: str = ""
    shared: str = ""
    bias: str = ""
    expert_counters: list[str] = []
    keys: dict[Size, str] = {}  # size -> config key


def use(file: str | os.PathLike[str]) -> str:
    """Take a row from a file, for every model of its type that this process opens from now on; return the type.

    Raises:
        BillhookError: no such file, not a row, or of a type that has a row by hand or that transformers does not know.
    """
    from billhook.runtime.yaml_files import read_yaml

    what = f"family row {os.fspath(file)}"
    content = read_yaml(Path(file), what)
    if not isinstance(content, dict):
        raise ModelError(f"{what} is not a mapping: write model_type: …, layers: …, up: […], down: …")
    try:
        row = checked(FamilyRow, {str(key): value for key, value in content.items()})
        _check(row)
    except BillhookError as error:
        raise ModelError(f"{what}: {error}") from None
    ROWS[row.model_type] = row
    return row.model_type


def _check(row: FamilyRow) -> None:
    kind = row.model_type
    if kind in KNOWN:
        raise ModelError(f"{kind} has a row by hand, which wins: leave out --family-row")
    if kind not in CONFIG_MAPPING or CONFIG_MAPPING[kind] not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ModelError(f"model_type {kind!r}: the installed transformers has no causal LM of that type")
    if bool(row.up) != bool(row.down):
        raise ModelError("up and down belong together: give both, or neither")
    if bool(row.experts) != bool(row.router):
        raise ModelError("experts and router belong together: give both, or neither")
    if row.experts and not row.up:
        raise ModelError("a mixture needs up and down, too: the names of its matrices, like mlp.gate_proj")
    if not row.experts and (row.shared or row.bias or row.expert_counters):
        raise ModelError("shared, bias and expert_counters are of a mixture: give experts and router, too")


def family(row: FamilyRow, config: PreTrainedConfig) -> Family:
    """The row for a small config of its type, not yet proved.

    Raises:
        BillhookError: it names what the model or the config does not have.
    """
    model = built(config)
    layers: Any = _submodule(model, row.layers, "layers")
    _check_names(row, layers)
    for size, key in row.keys.items():
        if type(getattr(config, key, None)) is not int:
            raise ModelError(f"keys: {size}: {key!r} is no whole number of the config")
    keys = (mixture_keys(config) if row.experts else {}) | {str(size): key for size, key in row.keys.items()}
    if row.experts and "top_k" not in keys:
        raise ModelError("keys: give top_k, the key that says how many experts each token goes to")
    named = row.model_dump(include={"layers", "down", "stacked", "experts", "router", "shared", "bias"})
    names = (type(config).__name__, type(model.base_model).__name__, type(model).__name__)
    many: dict[str, Any] = {"up": tuple(row.up), "expert_counters": tuple(row.expert_counters), "keys": keys}
    return completed(Family(names, **named, **many, **of_attention(layers)), config)


def _check_names(row: FamilyRow, layers: Any) -> None:
    if not isinstance(layers, nn.ModuleList):
        raise ModelError(f"layers: {row.layers!r} is no list of decoder layers of the model")
    plain = [layer for layer in layers if not (row.experts and has(layer, row.experts))]
    if row.experts and len(plain) == len(layers):
        raise ModelError(f"experts: {row.experts!r} is in no decoder layer")
    for n, layer in enumerate(plain):
        for name in (*row.up, *([row.down] if row.down else ())):
            if not isinstance(_submodule(layer, name, "up" if name in row.up else "down"), nn.Linear | Conv1D):
                raise ModelError(f"{name!r} is no linear module of decoder layer {n}")


def _submodule(module: nn.Module, path: str, what: str) -> nn.Module:
    try:
        return module.get_submodule(path)
    except AttributeError:
        raise ModelError(f"{what}: there is no {path!r}") from None
