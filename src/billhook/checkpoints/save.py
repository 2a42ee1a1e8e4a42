"""Save checkpoints: a plain folder whose config says what its tensors are."""

import json
from collections.abc import Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.core_model_loading import revert_weight_conversion

from billhook.checkpoints import around, belongings, generation, older
from billhook.checkpoints.shards import INDEX, SINGLE, weight_files
from billhook.checkpoints.tensor_names import stored_as
from billhook.models import flags, layout
from billhook.models.experts import fuse
from billhook.models.families import OLDER_ROTARY, OLDER_TYPE, stock_type
from billhook.models.multimodal import within
from billhook.runtime import tensor_files
from billhook.runtime.memory import return_freed
from billhook.runtime.offload import is_offloaded, parameters
from billhook.runtime.quiet import quiet_transformers

SHARD = 2**27  # bytes of a file where weights are offloaded; a model in memory becomes a single file


def save(model: Any, tokenizer: Any, to: Path, source: Path | None) -> None:
    """Write weights, config and tokenizer into the existing folder `to`; with `source`, its tokenizer files are copied.

    The config says what the tensors are, in the plainest layout that can express it.  Around the text decoder of a
    multimodal model stands what `source` has there.
    """
    fuse(model)
    shards = _parts(model) if is_offloaded(model) else iter([_whole(model)])
    if whole := source if within(model) else None:
        shards = around.put_back(shards, whole, SHARD)
    with quiet_transformers():
        _save_weights(shards, to)
        model.config.architectures = [type(model).__name__]
        model.config.dtype = model.dtype
        model.config.save_pretrained(to)
        if model.can_generate():
            generation.write(model, to, source)
    config = to / "config.json"
    content = _for_older(layout.config_json(model, json.loads(config.read_text(encoding="utf-8"))))
    content = around.whole_config(content, whole) if whole else content
    content |= flags.remembered(model)
    config.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    if "auto_map" in content:
        layout.write_code(to)
    _save_tokenizer(tokenizer, to, source)
    older.name_tokenizer(to)


def _for_older(config: dict[str, Any]) -> dict[str, Any]:
    """A config that transformers 4 reads, too, unless the family's class is newer and refuses the older keys."""
    family = stock_type(config["model_type"])
    kind = "type" if family in OLDER_TYPE else "rope_type"
    extended = older.with_older_keys(config, OLDER_ROTARY.get(family, older.ROTARY), kind)
    return extended if layout.takes(family, extended) or not layout.takes(family, config) else config


def _save_tokenizer(tokenizer: Any, to: Path, source: Path | None) -> None:
    """The files of a tokenizer: those of `source` as they are, if given."""
    if source is None:
        tokenizer.save_pretrained(to)
        return
    belongings.carry(source, to, getattr(tokenizer, "vocab_files_names", {}).values())


def _save_weights(shards: Iterator[Mapping[str, Tensor]], to: Path) -> None:
    """A file for every shard; an index where there are several."""
    files: list[Path] = []
    placed: dict[str, int] = {}
    size = 0
    for tensors in shards:
        files.append(to / f"{len(files)}.safetensors")
        tensor_files.write(tensors, files[-1])
        placed |= dict.fromkeys(tensors, len(files) - 1)
        size += sum(map(_bytes, tensors.values()))
        return_freed()
    if len(files) == 1:
        files[0].rename(to / SINGLE)
        return
    names = [f"model-{n:05}-of-{len(files):05}.safetensors" for n in range(1, len(files) + 1)]
    for file, name in zip(files, names, strict=True):
        file.rename(to / name)
    index = {"metadata": {"total_size": size}, "weight_map": {key: names[n] for key, n in sorted(placed.items())}}
    (to / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _whole(model: Any) -> dict[str, Tensor]:
    """Every tensor of a model in memory, a tied one once, under the names that its class has on disk."""
    first_names: dict[int, str] = {}  # a tied tensor has the name of the embedding table
    state = model.state_dict(keep_vars=True)
    tensors = {name: tensor.data for name, tensor in state.items() if first_names.setdefault(id(tensor), name) == name}
    # transformers renames by class (GPT-NeoX's head is embed_out on disk), and billhook's own classes only load their
    # names
    return revert_weight_conversion(model, tensors) if layout.layout_of(model) == "uniform" else tensors


def _parts(model: Any) -> Iterator[dict[str, Tensor]]:
    """The same for a model with offloaded weights, in parts of at least `SHARD` bytes."""
    names, part = stored_as(model), dict[str, Tensor]()
    buffers = ((name, buffer) for name, buffer in model.named_buffers() if name in names)
    for name, tensor in chain(parameters(model), buffers):
        part[names[name]] = tensor
        if sum(map(_bytes, part.values())) >= SHARD:
            yield part
            part = {}
    if part:
        yield part


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def stored_bytes(path: Path) -> int:
    """The size of those safetensors files of a folder that are its model's."""
    return sum(file.stat().st_size for file in weight_files(path, str(path))[0])


def stored_parameters(path: Path) -> int:
    """Elements of all tensors in those safetensors files of a folder that are its model's, or its text decoder's."""
    return sum(tensor.elements for tensor in around.decoder_tensors(path, str(path)).values())


def elements(model: torch.nn.Module) -> int:
    """Elements that a checkpoint of the model stores: parameters, tied ones once, and buffers that are not computed."""
    return sum({id(t): t.numel() for t in model.state_dict(keep_vars=True).values()}.values())
