"""What the safetensors files of a model folder hold: whole, in a known dtype, and where their index says."""

import hashlib
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from billhook.errors import BillhookError, first_line

STORED = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}  # safetensors' names
INDEX = "model.safetensors.index.json"
AGAIN = "fetch or copy the model again"


@dataclass(frozen=True)
class Stored:
    """One tensor of a folder."""

    file: Path
    shape: tuple[int, ...]
    dtype: str  # safetensors' name

    @property
    def elements(self) -> int:
        return torch.Size(self.shape).numel()


def stored(path: Path, name: str) -> dict[str, Stored]:
    """Every tensor by its name, from the headers of the files alone.

    Args:
        name: of the model, for messages.

    Raises:
        BillhookError: a file is missing, truncated or pickled, a dtype is unknown, or the index says otherwise; names the file and the tensor.
    """
    index = path / INDEX
    mapped = _weight_map(index, name) if index.exists() else {}
    files = sorted({path / file for file in mapped.values()} or path.glob("*.safetensors"))
    if not files:
        if pickles := [*path.glob("*.bin"), *path.glob("*.pt"), *path.glob("*.pth")]:
            raise BillhookError(
                f"{name} holds pickled weights ({pickles[0].name}), which can run code when opened: convert them where you trust them, "
                "AutoModelForCausalLM.from_pretrained(…).save_pretrained(…) writes safetensors"
            )
        raise BillhookError(f"{name} holds no *.safetensors: {AGAIN}")
    found: dict[str, Stored] = {}
    for file in files:
        if not file.exists():
            first = next(key for key, of in mapped.items() if of == file.name)
            raise BillhookError(
                f"{name}: shard {file.name} is missing, though {INDEX} names it (for {first}, say): {AGAIN}"
            )
        try:
            with safe_open(file, framework="pt") as shard:
                for key in shard.keys():  # noqa: SIM118
                    piece = shard.get_slice(key)
                    found[key] = Stored(file, tuple(piece.get_shape()), piece.get_dtype())
        except (SafetensorError, OSError) as error:
            raise BillhookError(
                f"{name}: shard {file.name} is damaged or truncated ({_lost(file) or first_line(error)}): {AGAIN}"
            ) from error
    for key, file in mapped.items():
        if key not in found or found[key].file.name != file:
            where = f"it is in {found[key].file.name}" if key in found else "no shard holds it"
            raise BillhookError(f"{name}: {INDEX} says that {file} holds {key}, but {where}: {AGAIN}")
    if strange := {one.dtype for one in found.values()} - set(STORED):
        raise BillhookError(
            f"{name} stores weights as {', '.join(sorted(strange))}: dequantise to float32, bfloat16 or float16 first"
        )
    return found


def digest(path: Path) -> str:
    """What changes when a folder's weights do: names, sizes, times and headers of its files, not the weights, which may be many."""
    found = hashlib.sha256()
    for file in sorted([*path.glob("*.safetensors"), path / "config.json"]):
        seen = file.stat()
        found.update(f"{file.name} {seen.st_size} {seen.st_mtime_ns}".encode())
        with file.open("rb") as content:
            length = int.from_bytes(content.read(8), "little") if file.suffix == ".safetensors" else seen.st_size
            found.update(content.read(length))
    return found.hexdigest()[:16]


def main_dtype(path: Path, name: str) -> torch.dtype:
    """The dtype that most of a folder's numbers have.

    Raises:
        BillhookError: as `stored`.
    """
    counts: Counter[str] = Counter()
    for one in stored(path, name).values():
        counts[one.dtype] += one.elements
    return STORED[counts.most_common(1)[0][0]]


def read_json(path: Path, name: str) -> dict[str, Any]:
    """A JSON object from a file of the model `name`.

    Raises:
        BillhookError: there is no such file, or it holds none.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise BillhookError(f"{name} has no {path.name}: give a folder that holds a whole model") from error
    except (ValueError, OSError) as error:
        raise BillhookError(f"{name}: {path.name} cannot be read ({first_line(error)}): {AGAIN}") from error
    if not isinstance(content, dict):
        raise BillhookError(f"{name}: {path.name} is not a JSON object")
    return content


def _weight_map(index: Path, name: str) -> dict[str, str]:
    mapped = read_json(index, name).get("weight_map")
    if not isinstance(mapped, dict):
        raise BillhookError(f"{name}: {index.name} holds no weight_map: {AGAIN}")
    return mapped


def _lost(file: Path) -> str:
    """The first tensor that ends beyond the end of a file, or '' where the header cannot be read either."""
    try:
        with file.open("rb") as content:
            length = int.from_bytes(content.read(8), "little")
            header = json.loads(content.read(length))
            ends = {key: one["data_offsets"][1] for key, one in header.items() if key != "__metadata__"}
        size = file.stat().st_size - 8 - length
    except (OSError, ValueError, KeyError, TypeError, AttributeError, MemoryError, OverflowError):
        return ""
    beyond = sorted((end, key) for key, end in ends.items() if end > size)
    return f"{beyond[0][1]} and all after it are cut off" if beyond else ""
