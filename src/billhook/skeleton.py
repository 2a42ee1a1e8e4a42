"""A model that stays in its files: the skeleton on the meta device, and where each of its parameters lies."""

import re
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.initialization import no_init_weights

from billhook import generation
from billhook.errors import BillhookError, first_line
from billhook.experts import unfuse
from billhook.families import layers, row_of
from billhook.known import check_known
from billhook.memory import return_large
from billhook.naming import loaded_as, stored_as
from billhook.paging import paged
from billhook.saving import quiet_transformers
from billhook.shards import AGAIN, stored

WHOLE = "load it whole (--no-stream-weights)"


def open_paged(path: Path, name: str, dtype: torch.dtype, device: torch.device) -> Any:
    """The model of a folder that was checked, its weights left where they are; computes in `dtype` on `device`.

    Raises:
        BillhookError: what is stored does not fit its config, or is stored in a way in which it cannot be read by parts.
    """
    config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    return_large()  # before every weight is allocated for a moment, which would leave the heap as large as the model
    try:
        model = bare(config, dtype)
        with quiet_transformers():
            model.generation_config = generation.read(path)
    except Exception as error:  # a config that the class refuses: transformers raises many kinds
        raise BillhookError(f"{name}: transformers could not build it ({first_line(error)})") from error
    model.config._name_or_path = str(path)
    files, keys = _places(path, name, model)
    pager = paged(model, files, keys, device, [f"{row_of(model).layers}.{n}" for n in range(len(layers(model)))])
    buffers = dict(model.named_buffers())
    for one, tensor in pager.read([one for one in buffers if one in keys]):  # small, and in memory from here on
        buffers[one].data = tensor.to(device, buffers[one].dtype, copy=True)
    check_known(model)
    return model.eval().requires_grad_(False)


def bare(config: Any, dtype: torch.dtype) -> Any:
    """The model of a config, its parameters on the meta device; buffers are computed."""
    with quiet_transformers(), no_init_weights(), init_empty_weights(include_buffers=False):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.tie_weights()  # which a parameter that goes to the meta device forgets
    return model


def _places(path: Path, name: str, model: Any) -> tuple[dict[str, Path], dict[str, str]]:
    """The file of every tensor that is stored, and its name there; a tied one has its first.  Takes experts apart."""
    held = stored(path, name)
    names, within = loaded_as(model, held), f"{model.base_model_prefix}."
    unfuse(model)
    for one, own in stored_as(model).items():
        for key in (own, own.removeprefix(within)):  # as some older folders are written
            names |= {one: key} if key in held and one not in names else {}
    files, keys, first = {}, {}, dict[int, str]()
    for one, meta in model.state_dict(keep_vars=True).items():
        key = next((names[n] for n in (first.setdefault(id(meta), one), one) if n in names), None)
        if key is None or held[key].shape != tuple(meta.shape):
            raise BillhookError(
                f"{name}: tensor {one} is missing, stored under another name or in one with others, or of another shape than config.json "
                f"says: {AGAIN}, or {WHOLE}"
            )
        files[one], keys[one] = held[key].file, key
    ignored = "|".join(model._keys_to_ignore_on_load_unexpected or ()) or "(?!)"
    known = {*keys.values(), *(names[one] for one in keys if one in names)}
    if extra := [key for key in held if key not in known and not re.search(ignored, key)]:
        raise BillhookError(
            f"{name}: {len(extra)} tensors have no place in the model that config.json describes, first {extra[0]}: {AGAIN}"
        )
    return files, keys
