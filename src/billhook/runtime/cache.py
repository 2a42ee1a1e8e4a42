"""Results kept on disk under a digest of everything that decides them: plain data, tensors, Grams of readers' inputs.

A file that cannot be read is an error that names it.  A Gram file is of one reader: 8 bytes for every pair of its
inputs, twice that if windows are held out.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from billhook.errors import BillhookError
from billhook.runtime import atomic, tensor_files
from billhook.runtime.documents import read_sealed, sealed
from billhook.runtime.headers import load
from billhook.runtime.offload import parameters
from billhook.tensors import Gram, float64_device

IRRELEVANT = {  # config keys that change no result: names, the writer, what tensors say, outputs besides logits
    *("_name_or_path", "transformers_version", "dtype", "torch_dtype", "architectures", "auto_map"),
    *("use_cache", "output_attentions", "output_hidden_states", "output_router_logits", "return_dict"),
}
AGAIN = "delete it, it will be made again"  # what to do about a file that cannot be read
FILE_NAME = re.compile(r"[\w.-]+-[0-9a-f]{16}\.(json|safetensors)|lessons")  # names in a folder of cached results


def check_folder(folder: Path | None, what: str) -> None:
    """Raise BillhookError if a folder holds anything but cached results: it is a model's, or somebody else's."""
    if folder is None:
        return
    atomic.check_name(folder)
    if not os.path.lexists(folder):
        return
    if not folder.is_dir():
        raise BillhookError(f"{what} {folder} is not a folder: name an empty or a new one")
    for file in folder.iterdir():
        if not FILE_NAME.fullmatch(file.name) and not atomic.is_hidden(file):
            raise BillhookError(
                f"{what} {folder} holds {file.name!a}, which is no result of billhook: name an empty or a new folder"
            )


def cached(
    folder: Path | None,
    name: str,
    key: dict[str, Any],
    measure: Callable[[], Any],
    worth: Callable[[Any], bool] = lambda _: True,
) -> Any:
    """The result of `measure()`, or its earlier result if `folder` has one under the same key; plain data either way.

    Args:
        worth: whether a result is kept.

    Raises:
        BillhookError: the cached result cannot be read; names the file.
    """
    if folder is not None and (file := path(folder, name, key)).exists():
        return read_sealed(file, str(file), AGAIN)["found"]
    found = json.loads(json.dumps(measure()))
    if folder is not None and worth(found):
        folder.mkdir(parents=True, exist_ok=True)
        atomic.write_text(path(folder, name, key), sealed({"key": key, "found": found}))
    return found


def cached_tensors(
    folder: Path | None, name: str, key: dict[str, Any], measure: Callable[[], dict[str, Tensor]]
) -> dict[str, Tensor]:
    """`cached` for tensors by name.

    Raises:
        BillhookError: the cached result cannot be read; names the file.
    """
    if folder is None:
        return measure()
    file = path(folder, name, key, "safetensors")
    if not file.exists():
        write_tensors(file, measure())
    return load(file, AGAIN)


def write_tensors(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a file of tensors, whole or not at all.  Raises BillhookError if the disk does not take them."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with atomic.file(file) as work:
        tensor_files.write(tensors, work)


def has(folder: Path | None, name: str, key: dict[str, Any]) -> bool:
    """Whether `cached` has the result and would measure nothing."""
    return folder is not None and path(folder, name, key).exists()


def model_key(model: nn.Module) -> dict[str, str]:
    """The part that every key has: the model, and the code that measures it."""
    return {"model": model_sha256(model), "version of billhook": code_sha256()}


def model_sha256(model: nn.Module) -> str:
    """SHA-256 of what a model computes: name, shape and values of all parameters and buffers, and the config."""
    total = hashlib.sha256()
    buffers = ((name, buffer) for name, buffer in model.named_buffers() if not buffer.is_meta)
    for name, tensor in chain(parameters(model), buffers):
        values = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
        total.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        total.update(values.numpy().data)
    config: Any = getattr(model, "config", None)
    settings = config.to_dict() if config is not None else {}
    relevant = {key: value for key, value in settings.items() if key not in IRRELEVANT}
    relevant["attention by"] = getattr(config, "_attn_implementation", None)
    total.update(json.dumps(relevant, sort_keys=True, default=str).encode())
    return total.hexdigest()


@cache
def code_sha256() -> str:
    """SHA-256 of billhook's own source: another version's result is not the same result."""
    total = hashlib.sha256()
    for file in sorted(Path(__file__).parents[1].rglob("*.py")):
        total.update(file.read_bytes())
    return total.hexdigest()[:16]


def path(folder: Path, name: str, key: dict[str, Any], ending: str = "json") -> Path:
    """The file in `folder` that holds the result of `key`."""
    return folder / f"{name}-{digest(key)}.{ending}"


def digest(key: dict[str, Any]) -> str:
    """The first sixteen hexadecimal digits of a key's SHA-256."""
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]


class Grams:
    """The Grams in `folder` under `key`, which has all that decides them: model, code, text, and type of products."""

    def __init__(self, folder: Path, key: dict[str, Any]) -> None:
        self.folder, self.key = folder, key

    def has(self, readers: Iterable[str]) -> bool:
        """Whether the Grams of all these readers are there."""
        return all(self._file(reader).exists() for reader in readers)

    def read(self, reader: str, device: torch.device) -> tuple[Gram, Gram | None]:
        """One reader's Gram over the windows to fit, and over those held out.

        Raises:
            BillhookError: the file cannot be read.
        """
        tensors, target = load(self._file(reader), AGAIN, ["fit"]), float64_device(device)
        return tensors["fit"].to(target), tensors["held_out"].to(target) if "held_out" in tensors else None

    def keep(self, reader: str, fit: Gram, held_out: Gram | None) -> None:
        """Write one reader's Grams.  Raises BillhookError if the disk does not take them."""
        write_tensors(self._file(reader), {"fit": fit} | ({} if held_out is None else {"held_out": held_out}))

    def _file(self, reader: str) -> Path:
        return path(self.folder, "gram", {**self.key, "reader": reader}, "safetensors")
