"""The safetensors files of a model folder: which are its model's, and which tensors they hold."""

import hashlib
import os
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict

from billhook.errors import ModelError
from billhook.runtime.documents import read_object, typed
from billhook.runtime.headers import Stored, read_header, shown

STORED = {  # dtypes that weights may be stored in, by safetensors' names, and the dtypes that they are read in
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F64": torch.float32,
}
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
NAMED = "transformers_weights"  # the key of config.json that names another file or index
AGAIN = "fetch or copy the model again"


def weight_files(path: Path, name: str) -> tuple[list[Path], dict[str, str]]:
    """The safetensors files of a folder that transformers reads, and each tensor's file, if there is an index.

    A folder may hold other sets of weights: transformers takes the file or index that config.json names, else
    model.safetensors, else its index.

    Raises:
        BillhookError: there is none, or the index cannot be read.
    """
    named = read_json(path / "config.json", name).get(NAMED)
    if named is not None and (not isinstance(named, str) or Path(named).name != named or not (path / named).is_file()):
        raise ModelError(
            f"{name}: config.json names {shown(str(named))!r} as {NAMED}, which is no file of the folder: {AGAIN}"
        )
    first = next((file for file in (named, SINGLE, INDEX) if file and os.path.lexists(path / file)), None)
    if first is not None and not first.endswith(".json"):
        return [path / first], {}
    if first is not None:
        mapped = _weight_map(path / first, name)
        return sorted({path / file for file in mapped.values()}), mapped
    if others := sorted(path.glob("*.safetensors")):
        raise ModelError(
            f"{name} holds {others[0].name}, and neither {SINGLE} nor {INDEX}, which transformers reads: fetch the "
            "index, or "
            "give a single file that name"
        )
    if pickles := [*path.glob("*.bin"), *path.glob("*.pt"), *path.glob("*.pth")]:
        raise ModelError(
            f"{name} holds pickled weights ({pickles[0].name}), which can run code when opened: convert them where you "
            "trust "
            "them, AutoModelForCausalLM.from_pretrained(…).save_pretrained(…) writes safetensors"
        )
    raise ModelError(f"{name} holds no *.safetensors: {AGAIN}")


def stored(path: Path, name: str) -> dict[str, Stored]:
    """Every tensor by its name, from the headers of the files that `weight_files` names.

    Args:
        name: the model's name, for messages.

    Raises:
        BillhookError: a file is missing, truncated or pickled, or the index says otherwise; names the file and the
            tensor.
    """
    files, mapped = weight_files(path, name)
    tensors: dict[str, Stored] = {}
    for file in files:
        try:
            tensors |= read_header(file, f"{name}: shard {file.name}", AGAIN)
        except FileNotFoundError as error:
            first = next((key for key, holder in mapped.items() if holder == file.name), "")
            why = f", though {INDEX} names it (for {shown(first)}, say)" if first else ": it is a link to nothing"
            raise ModelError(f"{name}: shard {file.name} is missing{why}: {AGAIN}") from error
    for key, file in mapped.items():
        if key not in tensors or tensors[key].file.name != file:
            where = f"it is in {tensors[key].file.name}" if key in tensors else "no shard holds it"
            raise ModelError(f"{name}: {INDEX} says that {file} holds {shown(key)}, but {where}: {AGAIN}")
    return tensors


def digest(path: Path) -> str:
    """What changes when a folder's weights do: a digest of its files' names, sizes, times and headers."""
    sha256 = hashlib.sha256()
    for file in sorted([*weight_files(path, str(path))[0], path / "config.json"]):
        status = file.stat()
        sha256.update(f"{file.name} {status.st_size} {status.st_mtime_ns}".encode())
        with file.open("rb") as content:
            length = int.from_bytes(content.read(8), "little") if file.suffix == ".safetensors" else status.st_size
            sha256.update(content.read(min(length, status.st_size)))
    return sha256.hexdigest()[:16]


def main_dtype(tensors: Iterable[Stored]) -> torch.dtype:
    """The dtype that most of the numbers are read in."""
    counts: Counter[torch.dtype] = Counter()
    for tensor in tensors:
        counts[STORED[tensor.dtype]] += tensor.elements
    return counts.most_common(1)[0][0]


def read_json(path: Path, name: str) -> dict[str, Any]:
    """A JSON object from a file of the model `name`.

    Raises:
        BillhookError: there is no such file, or it holds none.
    """
    try:
        return read_object(path, f"{name}: {path.name}", AGAIN)
    except FileNotFoundError as error:
        raise ModelError(f"{name} has no {path.name}: give a folder that holds a whole model") from error


class Index(BaseModel):
    """The index: which file holds each tensor."""

    model_config = ConfigDict(strict=True)

    weight_map: dict[str, str]


def _weight_map(index: Path, name: str) -> dict[str, str]:
    """The name of each tensor's file, which lies in the same folder."""
    what = f"{name}: {index.name}"
    mapped = typed(Index, read_json(index, name), what, AGAIN).weight_map
    for key, file in mapped.items():
        if not re.fullmatch(r"[^/\\\x00]+\.safetensors", file):
            raise ModelError(
                f"{what}: {shown(key)} is said to be in {shown(file)}, no .safetensors file of this folder: {AGAIN}"
            )
    return mapped
