"""Models built from config.json and matched with the stored tensors, which may stay in their files."""

from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.initialization import no_init_weights

from billhook.checkpoints import generation, refused
from billhook.checkpoints.contents import Contents, contents
from billhook.checkpoints.shards import read_json
from billhook.errors import ModelError
from billhook.models import flags
from billhook.models.experts import unfuse
from billhook.models.families import check_known, layers, row_of
from billhook.models.multimodal import around, decoder_config
from billhook.runtime.memory import return_large
from billhook.runtime.offload import offload_weights
from billhook.runtime.quiet import quiet_transformers

LOAD_WHOLE = "load it whole (--no-stream-weights)"


def read_contents(path: Path, name: str) -> Contents:
    """The tensors of the model in a folder whose config.json was checked.

    Raises:
        BillhookError: transformers refuses its config, what is stored does not fit it, or a file is damaged.
    """

    def content() -> dict[str, Any]:
        return read_json(path / "config.json", name)

    try:
        with quiet_transformers():
            config = flags.with_plain_flags(_config(path, content()))
    except Exception as error:  # transformers raises many kinds
        raise refused.error_of("could not read it", error, name, content(), refused.read) from error

    def shapes(config: Any) -> Any:
        try:
            return refused.build(config)
        except Exception as error:  # transformers raises many kinds
            raise refused.error_of("could not build it", error, name, content(), refused.build_first) from error

    return contents(path, name, config, shapes)


def _config(path: Path, content: dict[str, Any]) -> Any:
    """transformers' config of a folder's model, or of its text decoder."""
    if around(content) is None:
        return AutoConfig.from_pretrained(path, trust_remote_code=False)
    return refused.read(decoder_config(content))


def open_paged(contents: Contents, dtype: torch.dtype, device: torch.device) -> Any:
    """The model of a folder, with its weights left in their files; it computes in `dtype` on `device`.

    Raises:
        BillhookError: its tensors cannot be read one by one.
    """
    if contents.joined:
        raise ModelError(
            f"{contents.name}: tensor {contents.joined} is stored under another name or in one with others, and cannot "
            f"be read by itself: {LOAD_WHOLE}"
        )
    model = bare(contents.config, dtype)
    give_settings(model, contents)
    model._weight_conversions = contents.rules  # transformers saves by the rules that it loaded by
    unfuse(model)
    tensors = {name: contents.tensors[key] for name, key in contents.keys.items()}
    pager = offload_weights(
        model,
        {name: stored.file for name, stored in tensors.items()},
        {name: stored.key for name, stored in tensors.items()},
        device,
        [f"{row_of(model).layers}.{n}" for n in range(len(layers(model)))],
    )
    buffers = dict(model.named_buffers())
    for name, tensor in pager.read([name for name in buffers if name in tensors]):  # small, so that they stay in memory
        buffers[name].data = tensor.to(device, buffers[name].dtype, copy=True)
    check_known(model)
    return model.eval().requires_grad_(False)


def give_settings(model: Any, contents: Contents) -> None:
    """Give a model its folder's settings of generation, its name and its flags."""
    with quiet_transformers():
        model.generation_config = generation.read(contents.path)
    model.config._name_or_path = str(contents.path)
    model.stands_in = contents.around
    flags.remember(model, contents.path)


def bare(config: Any, dtype: torch.dtype) -> Any:
    """The model of a config, with parameters on the meta device and computed buffers."""
    return_large()  # every weight is allocated for a moment, which would leave the heap as large as the model
    with quiet_transformers(), no_init_weights(), init_empty_weights(include_buffers=False):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.tie_weights()  # parameters that move to the meta device are no longer tied
    return model
