"""A model that stays in its files: the skeleton on the meta device, and where each of its parameters lies."""

import re
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
from transformers.initialization import no_init_weights

from billhook.errors import BillhookError, first_line
from billhook.families import family_of, layers, row_of
from billhook.known import check_known
from billhook.memory import return_large
from billhook.paging import paged
from billhook.saving import quiet_transformers
from billhook.shards import AGAIN, read_json, stored

WHOLE = "load it whole (--no-stream-weights)"


def open_paged(path: Path, name: str, dtype: torch.dtype, device: torch.device) -> Any:
    """The model of a folder that was checked, its weights left where they are; computes in `dtype` on `device`.

    Raises:
        BillhookError: it is of a family that cannot stay in its files, or what is stored does not fit its config.
    """
    if why := why_whole(path, name):
        raise BillhookError(f"{name} {why}: {WHOLE}")
    config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    return_large()  # before every weight is allocated for a moment, which would leave the heap as large as the model
    try:
        model = bare(config, dtype)
        if (path / "generation_config.json").exists():
            model.generation_config = GenerationConfig.from_pretrained(path)
    except Exception as error:  # a config that the class refuses: transformers raises many kinds
        raise BillhookError(f"{name}: transformers could not build it ({first_line(error)})") from error
    model.config._name_or_path = str(path)
    files, keys = _places(path, name, model)
    paged(model, files, keys, device, [f"{row_of(model).layers}.{n}" for n in range(len(layers(model)))])
    check_known(model)
    return model.eval().requires_grad_(False)


def bare(config: Any, dtype: torch.dtype) -> Any:
    """The model of a config, its parameters on the meta device; buffers are computed."""
    with quiet_transformers(), no_init_weights(), init_empty_weights(include_buffers=False):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.tie_weights()  # which a parameter that goes to the meta device forgets
    return model


def why_whole(path: Path, name: str) -> str:
    """Why a model must be loaded whole, or ''."""
    row = family_of(read_json(path / "config.json", name).get("model_type"))
    return "is a mixture of experts, whose experts are stored as one tensor and pruned apart" if row.experts else ""


def _places(path: Path, name: str, model: Any) -> tuple[dict[str, Path], dict[str, str]]:
    """The file of every parameter, and its name there; a tied one has its first."""
    held, first = stored(path, name), dict[int, str]()
    files, keys = {}, {}
    for param, meta in model.named_parameters(remove_duplicate=False):
        own = first.setdefault(id(meta), param)
        places = (own, param, own.removeprefix(f"{model.base_model_prefix}."))  # as some older folders are written
        key = next((one for one in places if one in held), None)
        if key is None or held[key].shape != tuple(meta.shape):
            raise BillhookError(
                f"{name}: tensor {param} is missing, stored under another name, or of another shape than config.json says: {AGAIN}, or "
                f"{WHOLE}"
            )
        files[param], keys[param] = held[key].file, key
    ignored = "|".join(model._keys_to_ignore_on_load_unexpected or ()) or "(?!)"
    known = {*keys.values(), *files}
    if extra := [key for key in held if key not in known and not re.search(ignored, key)]:
        raise BillhookError(
            f"{name}: {len(extra)} tensors have no place in the model that config.json describes, first {extra[0]}: {AGAIN}"
        )
    return files, keys
