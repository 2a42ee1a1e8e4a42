"""Results kept on disk under a digest of what decides them: JSON, and the Grams of what enters a model's readers.

A file holds one reader's, 8 bytes for every pair of its inputs, twice where windows are held out.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import nn

from billhook.errors import BillhookError
from billhook.runtime import atomic, tensor_files
from billhook.runtime.documents import read_sealed, sealed
from billhook.runtime.headers import load
from billhook.runtime.offload import parameters
from billhook.tensors import Gram, float64_device

UNCOUNTED = {  # of a config: names, its writer, what the tensors say, and what is handed out besides logits
    *("_name_or_path", "transformers_version", "dtype", "torch_dtype", "architectures", "auto_map"),
    *("use_cache", "output_attentions", "output_hidden_states", "output_router_logits", "return_dict"),
}
KEPT = re.compile(r"[\w.-]+-[0-9a-f]{16}\.(json|safetensors)|lessons")  # names of what lies in such a folder


def check_folder(folder: Path | None, what: str) -> None:
    """Raise BillhookError if a folder holds anything but such results: it is a model's, or somebody's, and not to be written in."""
    if folder is None:
        return
    atomic.check_name(folder)
    if not os.path.lexists(folder):
        return
    if not folder.is_dir():
        raise BillhookError(f"{what} {folder} is not a folder: name an empty or a new one")
    for one in folder.iterdir():
        if not KEPT.fullmatch(one.name) and not atomic.is_hidden(one):
            raise BillhookError(
                f"{what} {folder} holds {one.name!a}, which is no result that billhook keeps: name an empty or a new folder"
            )


def cached(folder: Path | None, name: str, key: dict[str, Any], measure: Callable[[], Any]) -> Any:
    """`measure()`, or what it gave before where `folder` has it under the same key; plain data either way.

    Raises:
        BillhookError: what was kept cannot be read; names the file.
    """
    if folder is None:
        return json.loads(json.dumps(measure()))
    file = path(folder, name, key)
    if file.exists():
        return read_sealed(file, str(file), "delete it, it will be made again")["found"]
    text = sealed({"key": key, "found": measure()})
    folder.mkdir(parents=True, exist_ok=True)
    atomic.write_text(file, text)
    return json.loads(text)["found"]


def has(folder: Path | None, name: str, key: dict[str, Any]) -> bool:
    """Whether `kept` would measure nothing."""
    return folder is not None and path(folder, name, key).exists()


def model_key(model: nn.Module) -> dict[str, str]:
    """What of a model, and of how it is looked at, decides a result: the start of every key that a result is kept under."""
    return {"model": model_sha256(model), "version of billhook": code_sha256()}


def model_sha256(model: nn.Module) -> str:
    """Of what a model computes: every parameter's and buffer's name, shape and values, and its config."""
    found = hashlib.sha256()
    buffers = ((name, one) for name, one in model.named_buffers() if not one.is_meta)
    for name, tensor in chain(parameters(model), buffers):
        values = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
        found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        found.update(values.numpy().data)
    config: Any = getattr(model, "config", None)
    said = config.to_dict() if config is not None else {}
    decides = {key: value for key, value in said.items() if key not in UNCOUNTED}
    decides["attention by"] = getattr(config, "_attn_implementation", None)
    found.update(json.dumps(decides, sort_keys=True, default=str).encode())
    return found.hexdigest()


@cache
def code_sha256() -> str:
    """Of billhook's own source: a result of other code is not the same result."""
    found = hashlib.sha256()
    for file in sorted(Path(__file__).parents[1].rglob("*.py")):
        found.update(file.read_bytes())
    return found.hexdigest()[:16]


def path(folder: Path, name: str, key: dict[str, Any], ending: str = "json") -> Path:
    """The file in `folder` that belongs to `key`."""
    return folder / f"{name}-{digest(key)}.{ending}"


def digest(key: dict[str, Any]) -> str:
    """Sixteen hexadecimal digits of a SHA-256."""
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]


class Grams:
    """Those in `folder` that belong to `key`, all that decides them: model, code, text, and what it is computed in."""

    def __init__(self, folder: Path, key: dict[str, Any]) -> None:
        self.folder, self.key = folder, key

    def has(self, readers: Iterable[str]) -> bool:
        """Whether all of these are there."""
        return all(self._file(reader).exists() for reader in readers)

    def read(self, reader: str, device: torch.device) -> tuple[Gram, Gram | None]:
        """From the windows to fit, and from those held out.

        Raises:
            BillhookError: the file cannot be read.
        """
        found, where = load(self._file(reader), "delete it, it will be made again", ["fit"]), float64_device(device)
        return found["fit"].to(where), found["held_out"].to(where) if "held_out" in found else None

    def keep(self, reader: str, fit: Gram, held_out: Gram | None) -> None:
        """Raises BillhookError where the disk does not take them."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with atomic.file(self._file(reader)) as work:
            tensor_files.write({"fit": fit} | ({} if held_out is None else {"held_out": held_out}), work)

    def _file(self, reader: str) -> Path:
        return path(self.folder, "gram", {**self.key, "reader": reader}, "safetensors")
