"""A multimodal folder: which of its tensors are the text decoder's, and all that goes along as it is."""

from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from billhook.checkpoints.shards import read_json, stored
from billhook.models.families import PER_LAYER_KEYS, family_of
from billhook.models.multimodal import TEXT, around, decoder_config
from billhook.models.patterns import DENSE_FIRST, SHARED, SIZES
from billhook.models.surgery import PLAIN_LAYERS, PLAIN_STEP
from billhook.runtime.headers import Stored

# what names of a decoder's body and of its head begin with: in the causal LM, and on disk
BODY, BODIES = "model.", ("model.language_model.", "language_model.model.", "model.")
HEAD, HEADS = "lm_head.", ("language_model.lm_head.", "lm_head.")
FIRST = "layers.0."  # what follows there in every body


def decoder_tensors(path: Path, name: str) -> dict[str, Stored]:
    """The stored tensors of a folder's text decoder, by the causal LM's names; all tensors of a model of text alone.

    Args:
        name: the model's name, for messages.

    Raises:
        BillhookError: as billhook.checkpoints.shards.stored.
    """
    tensors = stored(path, name)
    if around(read_json(path / "config.json", name)) is None:
        return tensors
    prefixes = _prefixes(tensors)
    return {own: tensors[key] for key in tensors if (own := _in_decoder(key, prefixes))}


def rest(path: Path, name: str) -> dict[str, Stored]:
    """The stored tensors of a multimodal folder that are no part of its text decoder, by their names on disk."""
    own = {(tensor.file, tensor.key) for tensor in decoder_tensors(path, name).values()}
    return {key: tensor for key, tensor in stored(path, name).items() if (tensor.file, tensor.key) not in own}


def put_back(shards: Iterator[Mapping[str, Tensor]], source: Path, most: int) -> Iterator[Mapping[str, Tensor]]:
    """A decoder's tensors under the names that they have in the folder `source`, then the rest of that folder.

    Args:
        most: bytes of the rest that are in memory at a time, or one tensor.
    """
    keys = stored(source, str(source))
    prefixes = _prefixes(keys)
    for tensors in shards:
        yield {_on_disk(name, prefixes): tensor for name, tensor in tensors.items()}
    with ExitStack() as opened:
        files = {
            file: opened.enter_context(safe_open(file, framework="pt")) for file in {t.file for t in keys.values()}
        }
        part: dict[str, Tensor] = {}
        for key, tensor in rest(source, str(source)).items():
            part[key] = files[tensor.file].get_tensor(tensor.key)
            if sum(one.numel() * one.element_size() for one in part.values()) >= most:
                yield part
                part = {}
        if part:
            yield part


def whole_config(written: Mapping[str, Any], source: Path) -> dict[str, Any]:
    """The config of the folder `source` with what a cut has changed in that of its decoder.

    Args:
        written: the decoder's config as a causal LM.
    """
    content = read_json(source / "config.json", str(source))
    before, keys = decoder_config(content), family_of(written["model_type"]).keys.values()
    cut = {*keys, *PER_LAYER_KEYS, *DENSE_FIRST, PLAIN_LAYERS, PLAIN_STEP, SHARED, SIZES, "num_hidden_layers"}
    changed = {key: written[key] for key in sorted(cut & written.keys()) if written[key] != before.get(key)}
    return content | ({TEXT: content[TEXT] | changed} if TEXT in content else changed)


def _prefixes(keys: Collection[str]) -> dict[str, str]:
    """What the names of a decoder's tensors begin with on disk, by what they begin with in the causal LM."""
    body = next((disk for disk in BODIES if any(key.startswith(disk + FIRST) for key in keys)), BODIES[0])
    head = next((disk for disk in HEADS if any(key.startswith(disk) for key in keys)), HEADS[0])
    return {BODY: body, HEAD: head}


def _in_decoder(key: str, prefixes: Mapping[str, str]) -> str:
    """The causal LM's name of a tensor on disk; '' where it is none of the decoder's."""
    return next((own + key.removeprefix(disk) for own, disk in prefixes.items() if key.startswith(disk)), "")


def _on_disk(name: str, prefixes: Mapping[str, str]) -> str:
    return next(disk + name.removeprefix(own) for own, disk in prefixes.items() if name.startswith(own))
