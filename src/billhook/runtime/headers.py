"""Headers of safetensors files, checked against the file before tensors are read.

A file has three parts: the length of the header in eight bytes; the header, a JSON object; the numbers, tensor after
tensor without a gap.
"""

import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Annotated, Any, BinaryIO

from pydantic import BaseModel, ConfigDict, Field, RootModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from billhook.errors import ModelError, first_line
from billhook.runtime.documents import parsed_object, typed

LONGEST = 100_000_000  # bytes of a header, as the format limits it
PREFIX = 8  # bytes before the header: its length
DIMENSIONS = 64  # the most that a tensor of torch can have
META = "__metadata__"
BITS = {  # size of one number, by the format's name of its type
    **dict.fromkeys(("F4",), 4),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
    **dict.fromkeys(("I32", "U32", "F32"), 32),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 64),
}
Number = Annotated[int, Field(ge=0, lt=2**63)]


class Entry(BaseModel):
    """A header's entry of one tensor."""

    model_config = ConfigDict(strict=True)

    dtype: str
    shape: Annotated[list[Number], Field(max_length=DIMENSIONS)]
    data_offsets: Annotated[list[Number], Field(min_length=2, max_length=2)]


class Metadata(RootModel[dict[str, str]]):
    """A header's entry beside those of tensors."""

    model_config = ConfigDict(strict=True)


@dataclass(frozen=True)
class Stored:
    """One tensor of a folder."""

    file: Path
    key: str  # name of the tensor in the file
    shape: tuple[int, ...]
    dtype: str  # safetensors' name of the type

    @property
    def elements(self) -> int:
        return prod(self.shape)


def read_header(file: Path, what: str, remedy: str) -> dict[str, Stored]:
    """Every tensor of a safetensors file by its name.  Only the header is read, and at most as many bytes as there are.

    Args:
        what: the file, as messages call it.
        remedy: what to do if it cannot be read.

    Raises:
        BillhookError: it is not a plain file, ends before its header or its last tensor does, or the header is wrong;
            names the tensor.
        FileNotFoundError: there is no such file.
    """
    damaged = f"{what} is damaged or truncated"
    try:
        status = file.stat()  # before the file is opened: a pipe would block
        if not stat.S_ISREG(status.st_mode):
            raise ModelError(f"{what} is not a plain file: {remedy}")
        with file.open("rb") as content:
            header = _header(content, status.st_size, damaged, remedy)
            start = content.tell()
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ModelError(f"{what} cannot be read ({error.strerror or error}): {remedy}") from error
    typed(Metadata, header.pop(META, {}), f"{damaged}: its {META}", remedy)
    entries = {key: typed(Entry, entry, f"{damaged}: its tensor {shown(key)}", remedy) for key, entry in header.items()}
    if wrong := _misplaced(entries, status.st_size - start):
        raise ModelError(f"{damaged} ({wrong}): {remedy}")
    try:
        with safe_open(file, framework="pt"):  # safetensors' own checks, which may be stricter
            pass
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{damaged} ({first_line(error)}): {remedy}") from error
    return {key: Stored(file, key, tuple(entry.shape), entry.dtype) for key, entry in entries.items()}


def load(file: Path, remedy: str, names: Iterable[str] = ()) -> dict[str, Tensor]:
    """Every tensor of a safetensors file that billhook wrote for itself.

    Args:
        names: tensors that the file must have.

    Raises:
        BillhookError: as `read_header`, there is no such file, or it lacks one of `names`.
    """
    check_tensors(file, remedy, dict.fromkeys(names))
    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{file} cannot be read ({first_line(error)}): {remedy}") from error


def check_tensors(file: Path, remedy: str, shapes: Mapping[str, tuple[int, ...] | None]) -> None:
    """Raise BillhookError unless a safetensors file has these tensors in these shapes; None stands for any shape."""
    try:
        stored = read_header(file, str(file), remedy)
    except FileNotFoundError:
        raise ModelError(f"{file} is missing: {remedy}") from None
    for name, shape in shapes.items():
        if name not in stored:
            raise ModelError(f"{file} has no tensor {shown(name)}: {remedy}")
        if shape is not None and stored[name].shape != shape:
            raise ModelError(
                f"{file}: tensor {shown(name)} is {_shape(stored[name].shape)}, not {_shape(shape)}: {remedy}"
            )


def shown(name: str) -> str:
    """A name from a file, printable and short enough for a message."""
    plain = name if name.isprintable() else ascii(name)[1:-1]
    return plain if len(plain) <= 120 else f"{plain[:120]}…"


def _header(content: BinaryIO, size: int, damaged: str, remedy: str) -> dict[str, Any]:
    """The header of a file of `size` bytes."""
    if size < PREFIX:
        raise ModelError(f"{damaged} (it has {size} bytes): {remedy}")
    length = int.from_bytes(content.read(PREFIX), "little")
    if length > min(size - PREFIX, LONGEST):
        raise ModelError(f"{damaged} (its header would have {length:,} bytes, the file has {size:,}): {remedy}")
    return parsed_object(content.read(length), f"{damaged}: its header", remedy)


def _misplaced(entries: dict[str, Entry], size: int) -> str:
    """What is wrong with the positions of tensors in the `size` bytes of numbers, or ''."""
    ordered = sorted(entries.items(), key=lambda item: item[1].data_offsets)
    if beyond := [key for key, entry in ordered if entry.data_offsets[1] > size]:
        return f"{shown(beyond[0])} and all after it are cut off"
    position = 0
    for key, entry in ordered:
        begin, end = entry.data_offsets
        if entry.dtype not in BITS:
            return f"tensor {shown(key)} has the unknown dtype {shown(entry.dtype)}"
        if begin != position:
            return f"tensor {shown(key)} begins at byte {begin:,}, where the one before it ends at {position:,}"
        if 8 * (end - begin) != BITS[entry.dtype] * prod(entry.shape):
            return f"tensor {shown(key)} of {entry.dtype} {_shape(entry.shape)} has {end - begin:,} bytes"
        position = end
    return "" if position == size else f"its tensors end at byte {position:,} of {size:,}"


def _shape(shape: Iterable[int]) -> str:
    return shown(f"({', '.join(map(str, shape))})")
