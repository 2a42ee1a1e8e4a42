"""Models before their weights: what config.json says is built, and what is stored for it found; a model that stays in its files."""

from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.initialization import no_init_weights

from billhook.checkpoints import generation, refused
from billhook.checkpoints.contents import Contents, contents
from billhook.checkpoints.shards import AGAIN, read_json
from billhook.errors import BillhookError
from billhook.models import flags
from billhook.models.experts import unfuse
from billhook.models.families import check_known, layers, row_of
from billhook.runtime.memory import return_large
from billhook.runtime.offload import offload_weights
from billhook.runtime.quiet import quiet_transformers

WHOLE = "load it whole (--no-stream-weights)"


def read_contents(path: Path, name: str) -> Contents:
    """What a folder, whose config.json was checked, holds of its model.

    Raises:
        BillhookError: transformers refuses its config, what is stored does not fit it, or a file is damaged.
    """

    def said() -> dict[str, Any]:
        return read_json(path / "config.json", name)

    try:
        with quiet_transformers():
            config = flags.with_plain_flags(AutoConfig.from_pretrained(path, trust_remote_code=False))
    except Exception as error:  # transformers raises many kinds for a value that it refuses
        raise refused.error_of("could not read it", error, name, said(), refused.read) from error

    def shapes(config: Any) -> Any:
        try:
            return refused.build(config)
        except Exception as error:  # transformers raises many kinds
            raise refused.error_of("could not build it", error, name, said(), refused.build_first) from error

    return contents(path, name, config, shapes)


def open_paged(found: Contents, dtype: torch.dtype, device: torch.device) -> Any:
    """The model of a folder, its weights left where they are; computes in `dtype` on `device`.

    Raises:
        BillhookError: it is stored in a way in which it cannot be read by parts.
    """
    if found.joined:
        raise BillhookError(
            f"{found.name}: tensor {found.joined} is stored under another name or in one with others: {AGAIN}, or {WHOLE}"
        )
    model = bare(found.config, dtype)
    give_settings(model, found)
    model._weight_conversions = found.rules  # as one that transformers loads remembers them: what is saved goes by them
    unfuse(model)
    keys = {one: found.tensors[key] for one, key in found.keys.items()}
    pager = offload_weights(
        model,
        {one: there.file for one, there in keys.items()},
        {one: there.key for one, there in keys.items()},
        device,
        [f"{row_of(model).layers}.{n}" for n in range(len(layers(model)))],
    )
    buffers = dict(model.named_buffers())
    for one, tensor in pager.read([one for one in buffers if one in keys]):  # small, and in memory from here on
        buffers[one].data = tensor.to(device, buffers[one].dtype, copy=True)
    check_known(model)
    return model.eval().requires_grad_(False)


def give_settings(model: Any, found: Contents) -> None:
    """What a model remembers of its folder besides its weights."""
    with quiet_transformers():
        model.generation_config = generation.read(found.path)
    model.config._name_or_path = str(found.path)
    flags.remember(model, found.path)


def bare(config: Any, dtype: torch.dtype) -> Any:
    """The model of a config, its parameters on the meta device; buffers are computed."""
    return_large()  # before every weight is allocated for a moment, which would leave the heap as large as the model
    with quiet_transformers(), no_init_weights(), init_empty_weights(include_buffers=False):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.tie_weights()  # which a parameter that goes to the meta device forgets
    return model
