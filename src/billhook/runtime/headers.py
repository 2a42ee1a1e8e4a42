"""What the header of a safetensors file says, checked against the file before anything is read by it.

A file is eight bytes, the length of the header; the header, a JSON object; and the numbers, tensor after tensor without a gap.
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

from billhook.errors import BillhookError, first_line
from billhook.runtime.documents import parsed_object, typed

LONGEST = 100_000_000  # bytes of a header, by the format
PREFIX = 8
DIMENSIONS = 64  # that a tensor of torch can have
META = "__metadata__"
BITS = {  # of one number, by the format's names
    **dict.fromkeys(("F4",), 4),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
    **dict.fromkeys(("I32", "U32", "F32"), 32),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 64),
}
Number = Annotated[int, Field(ge=0, lt=2**63)]


class Entry(BaseModel):
    """What a header says of one tensor."""

    model_config = ConfigDict(strict=True)

    dtype: str
    shape: Annotated[list[Number], Field(max_length=DIMENSIONS)]
    data_offsets: Annotated[list[Number], Field(min_length=2, max_length=2)]


class Metadata(RootModel[dict[str, str]]):
    """What a header says beside its tensors."""

    model_config = ConfigDict(strict=True)


@dataclass(frozen=True)
class Stored:
    """One tensor of a folder."""

    file: Path
    key: str  # its name there
    shape: tuple[int, ...]
    dtype: str  # safetensors' name

    @property
    def elements(self) -> int:
        return prod(self.shape)


def read_header(file: Path, what: str, remedy: str) -> dict[str, Stored]:
    """Every tensor of a safetensors file by its name.  No more is read than the header, nor more taken than it has in bytes.

    Args:
        what: the file, as messages call it.
        remedy: what to do where it cannot be read.

    Raises:
        BillhookError: it is no plain file, ends before its header or its last tensor does, or its header is none: names the tensor.
        FileNotFoundError: there is none.
    """
    damaged = f"{what} is damaged or truncated"
    try:
        seen = file.stat()  # before it is opened: a pipe would keep us waiting
        if not stat.S_ISREG(seen.st_mode):
            raise BillhookError(f"{what} is not a plain file: {remedy}")
        with file.open("rb") as content:
            header = _header(content, seen.st_size, damaged, remedy)
            start = content.tell()
    except FileNotFoundError:
        raise
    except OSError as error:
        raise BillhookError(f"{what} cannot be read ({error.strerror or error}): {remedy}") from error
    typed(Metadata, header.pop(META, {}), f"{damaged}: its {META}", remedy)
    entries = {key: typed(Entry, one, f"{damaged}: its tensor {shown(key)}", remedy) for key, one in header.items()}
    if wrong := _misplaced(entries, seen.st_size - start):
        raise BillhookError(f"{damaged} ({wrong}): {remedy}")
    try:
        with safe_open(file, framework="pt"):  # whose own rules have the last word
            pass
    except (SafetensorError, OSError) as error:
        raise BillhookError(f"{damaged} ({first_line(error)}): {remedy}") from error
    return {key: Stored(file, key, tuple(one.shape), one.dtype) for key, one in entries.items()}


def load(file: Path, remedy: str, names: Iterable[str] = ()) -> dict[str, Tensor]:
    """Every tensor of a safetensors file that billhook wrote for itself.

    Args:
        names: of tensors that it must have.

    Raises:
        BillhookError: as `read_header`, there is no such file, or a tensor of these is missing.
    """
    check_tensors(file, remedy, dict.fromkeys(names))
    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise BillhookError(f"{file} cannot be read ({first_line(error)}): {remedy}") from error


def check_tensors(file: Path, remedy: str, shapes: Mapping[str, tuple[int, ...] | None]) -> None:
    """Raise BillhookError unless a safetensors file has these tensors, of these shapes where one is said."""
    try:
        found = read_header(file, str(file), remedy)
    except FileNotFoundError:
        raise BillhookError(f"{file} is missing: {remedy}") from None
    for name, shape in shapes.items():
        if name not in found:
            raise BillhookError(f"{file} has no tensor {shown(name)}: {remedy}")
        if shape is not None and found[name].shape != shape:
            raise BillhookError(
                f"{file}: tensor {shown(name)} is {_shape(found[name].shape)}, not {_shape(shape)}: {remedy}"
            )


def shown(name: str) -> str:
    """A name out of a file, as a line can hold it."""
    plain = name if name.isprintable() else ascii(name)[1:-1]
    return plain if len(plain) <= 120 else f"{plain[:120]}…"


def _header(content: BinaryIO, size: int, damaged: str, remedy: str) -> dict[str, Any]:
    """The header, of a file that has `size` bytes."""
    if size < PREFIX:
        raise BillhookError(f"{damaged} (it has {size} bytes): {remedy}")
    length = int.from_bytes(content.read(PREFIX), "little")
    if length > min(size - PREFIX, LONGEST):
        raise BillhookError(f"{damaged} (its header would have {length:,} bytes, the file has {size:,}): {remedy}")
    return parsed_object(content.read(length), f"{damaged}: its header", remedy)


def _misplaced(entries: dict[str, Entry], size: int) -> str:
    """What is wrong with the places of tensors in the `size` bytes of numbers, or ''."""
    ordered = sorted(entries.items(), key=lambda item: item[1].data_offsets)
    if beyond := [key for key, one in ordered if one.data_offsets[1] > size]:
        return f"{shown(beyond[0])} and all after it are cut off"
    at = 0
    for key, one in ordered:
        begin, end = one.data_offsets
        if one.dtype not in BITS:
            return f"tensor {shown(key)} has the unknown dtype {shown(one.dtype)}"
        if begin != at:
            return f"tensor {shown(key)} begins at byte {begin:,}, where the one before it ends at {at:,}"
        if 8 * (end - begin) != BITS[one.dtype] * prod(one.shape):
            return f"tensor {shown(key)} of {one.dtype} {_shape(one.shape)} has {end - begin:,} bytes"
        at = end
    return "" if at == size else f"its tensors end at byte {at:,} of {size:,}"


def _shape(shape: Iterable[int]) -> str:
    return shown(f"({', '.join(map(str, shape))})")
