"""A GGUF file, or the parts of a split one, on disk: its fields, and where its tensors are.

Every length and count is compared with the size of the file before anything is read or allocated by it, so that a
damaged file ends in one line.  The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import math
import mmap
import re
import stat
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import gguf
import numpy as np
import torch
from gguf.constants import GGML_QUANT_SIZES, GGUF_DEFAULT_ALIGNMENT

from billhook.checkpoints.names import is_gguf
from billhook.errors import ModelError

AGAIN = "fetch or copy the file again"
VERSIONS = (2, 3)
SCALARS = dict(zip((*range(8), 10, 11, 12), "BbHhIif?Qqd", strict=True))  # types of numbers, as letters of struct
STRING, ARRAY = 8, 9
ENTRIES = 2**22  # the most entries of an array, fields or tensors; the largest vocabularies have an eighth of that
HEADER = 2**27  # the most bytes before the weights
DIMENSIONS = 4  # the most dimensions of a tensor
NAME = 200  # the most characters of a name; llama.cpp's have at most 63
PART = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf", re.IGNORECASE)
SPLIT = ("split.no", "split.count", "split.tensors.count")  # fields that only parts of a split file have
Fields = dict[str, Any]  # values: int, float, bool, str, or a list of one of these


@dataclass(frozen=True)
class Placed:
    """Where a tensor lies in a file."""

    file: Path
    kind: gguf.GGMLQuantizationType
    shape: tuple[int, ...]  # sizes in torch's order
    offset: int  # bytes from the beginning of the file
    size: int  # size in bytes

    def values(self) -> torch.Tensor:
        """The dequantised tensor, float32."""
        packed = np.memmap(self.file, np.uint8, "r", self.offset, (self.size,))
        rows = packed.reshape(*self.shape[:-1], -1)
        return torch.from_numpy(np.array(gguf.quants.dequantize(rows, self.kind), np.float32)).reshape(self.shape)


@dataclass(frozen=True)
class Gguf:
    """The fields of a file, and where its tensors lie."""

    fields: Fields
    tensors: dict[str, Placed]


def alone(folder: Path) -> Path:
    """The only GGUF file of a folder; the folder itself where it holds none, or a model in safetensors.

    Raises:
        BillhookError: there are several.
    """
    files = sorted(file for file in folder.iterdir() if is_gguf(file))
    if not files or (folder / "config.json").exists() or any(folder.glob("*.safetensors")):
        return folder
    firsts = [file for file in files if (part := PART.fullmatch(file.name)) is None or int(part[2]) == 1]
    if len(firsts) > 1 or not firsts:
        names = ", ".join(file.name for file in files[:4]) + (", …" if len(files) > 4 else "")
        raise ModelError(f"{folder} holds {len(files)} GGUF files: name the one that is meant, of {names}")
    return firsts[0]


def read(path: Path) -> Gguf:
    """The fields and tensors of a file, with all its parts where it is split.

    Raises:
        BillhookError: it is not a plain file, not a GGUF, damaged, or a part is missing.
    """
    first, *rest = parts(path)
    whole = _Reader(first).read()
    tensors = dict(whole.tensors)
    for file in rest:
        for name, placed in _Reader(file).read().tensors.items():
            if name in tensors:
                raise ModelError(f"{file}: tensor {name} is in another part, too: {AGAIN}")
            tensors[name] = placed
    count = whole.fields.get("split.count", len(rest) + 1) or 1  # tools that do not split write 0
    if count != len(rest) + 1:
        raise ModelError(
            f"{path} is one of {count} parts, and its name is not NAME-00001-of-{count:05}.gguf: rename them so"
        )
    if len(tensors) != whole.fields.get("split.tensors.count", len(tensors)):
        raise ModelError(
            f"{path}: its parts hold {len(tensors)} tensors, not the {whole.fields['split.tensors.count']} they "
            "should: "
            f"{AGAIN}"
        )
    return Gguf({key: value for key, value in whole.fields.items() if key not in SPLIT}, tensors)


def parts(path: Path) -> list[Path]:
    """The files of a split GGUF in order, the first of which has the fields; for any other GGUF the file alone."""
    if (part := PART.fullmatch(path.name)) is None:
        return [path]
    files = [path.with_name(f"{part[1]}-{n:05}-of-{part[3]}{path.suffix}") for n in range(1, int(part[3]) + 1)]
    for file in files:
        if not file.exists():
            raise ModelError(f"{path} is one of {len(files)} parts, and {file.name} is not beside it: {AGAIN}")
    return files or [path]


class _Reader:
    """Reads one file's header from its beginning to its end."""

    def __init__(self, path: Path) -> None:
        self.path, self.at, self.content = path, 0, b""

    def read(self) -> Gguf:
        try:
            if not stat.S_ISREG(self.path.stat().st_mode):
                self.refuse("is not a plain file", "give a GGUF file")
            with self.path.open("rb") as file:
                self.size = self.path.stat().st_size
                if file.read(4) != b"GGUF":
                    self.refuse("is no GGUF file: it does not begin with GGUF", "give a GGUF file, or a model's folder")
                with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as self.content:
                    return self.header()
        except OSError as error:
            raise ModelError(f"{self.path} cannot be read ({error.strerror or error}): {AGAIN}") from error

    def header(self) -> Gguf:
        self.at = 4
        version = self.number("I", "its version")
        if version not in VERSIONS:
            other = "is big-endian" if version & 0xFFFF == 0 else f"is of version {version} of the format"
            self.refuse(
                f"{other}, and billhook reads versions 2 and 3, little-endian", "convert it again with llama.cpp"
            )
        tensors, entries = self.number("Q", "its counts"), self.number("Q", "its counts")
        # the shortest field has an empty name, a type and one byte
        self.check(entries, 13, f"it is said to hold {entries:,} fields")
        self.check(tensors, 32, f"it is said to hold {tensors:,} tensors")
        fields: Fields = {}
        for n in range(entries):
            key = self.name(f"the name of field {n}")
            if key in fields:
                self.damaged(f"field {key} is there twice")
            fields[key] = self.value(self.number("I", key), key)
        infos = dict(self.info(n) for n in range(tensors))
        if len(infos) != tensors:
            self.damaged("two tensors have one name")
        return Gguf(fields, self.placed(infos, fields))

    def info(self, n: int) -> tuple[str, tuple[gguf.GGMLQuantizationType, tuple[int, ...], int]]:
        """One entry of the table of tensors: its name, and type, shape and offset."""
        name = self.name(f"the name of tensor {n}")
        sides = self.number("I", name)
        if not 1 <= sides <= DIMENSIONS:
            self.damaged(f"tensor {name} has {sides} dimensions")
        shape = tuple(self.number("Q", name) for _ in range(sides))[::-1]
        kind, offset = self.number("I", name), self.number("Q", name)
        try:
            known = gguf.GGMLQuantizationType(kind)
            block, packed = GGML_QUANT_SIZES[known]
            gguf.quants.dequantize(np.zeros((1, packed), np.uint8), known)
        except (ValueError, KeyError, NotImplementedError):
            self.refuse(
                f"stores tensor {name} in a type that cannot be dequantised here ({_type(kind)})",
                "quantise it otherwise",
            )
        if (
            min(shape) < 1 or math.prod(shape) > self.size * 64 or shape[-1] % block
        ):  # every type takes half a bit or more
            self.damaged(f"tensor {name} of shape {list(shape)} does not fit the file")
        return name, (known, shape, offset)

    def placed(self, infos: dict[str, Any], fields: Fields) -> dict[str, Placed]:
        """Where each tensor lies: one after another, as llama.cpp needs them."""
        align = fields.get("general.alignment", GGUF_DEFAULT_ALIGNMENT)
        if isinstance(align, bool) or not isinstance(align, int) or align < 1 or align & (align - 1) or align > HEADER:
            self.damaged(f"general.alignment is {shown(align)}")
        start, expected = -(-self.at // align) * align, 0
        tensors: dict[str, Placed] = {}
        for name, (kind, shape, offset) in infos.items():
            block, packed = GGML_QUANT_SIZES[kind]
            size = math.prod(shape) // block * packed
            if offset != expected:
                self.damaged(f"tensor {name} is said to begin at {offset}, and the one before ends at {expected}")
            if start + offset + size > self.size:
                self.damaged(f"tensor {name} and all after it are cut off")
            tensors[name] = Placed(self.path, kind, shape, start + offset, size)
            expected = -(-(offset + size) // align) * align
        return tensors

    def value(self, kind: int, key: str) -> Any:
        if kind in SCALARS:
            return self.number(SCALARS[kind], key)
        if kind == STRING:
            return self.string(key)
        if kind != ARRAY:
            self.damaged(f"field {key} is of type {kind}, which no version has")
        inner, count = self.number("I", key), self.number("Q", key)
        many = f"field {key} is said to have {count:,} entries"
        if inner == STRING:
            self.check(count, 8, many)
            return [self.string(key) for _ in range(count)]
        if inner not in SCALARS:
            self.damaged(f"field {key} is a list of type {inner}")
        self.check(count, width := struct.calcsize(f"<{SCALARS[inner]}"), many)
        return list(struct.unpack(f"<{count}{SCALARS[inner]}", self.take(count * width, key)))

    def string(self, what: str) -> str:
        try:
            return self.take(self.number("Q", what), what).decode("utf-8")
        except UnicodeDecodeError:
            self.damaged(f"{what} is not UTF-8")

    def name(self, what: str) -> str:
        """A text that messages can show."""
        name = self.string(what)
        return name if name.isprintable() and len(name) <= NAME else self.damaged(f"{what} is {shown(name)}")

    def number(self, letter: str, what: str) -> Any:
        (value,) = struct.unpack(f"<{letter}", self.take(struct.calcsize(f"<{letter}"), what))
        return value

    def take(self, count: int, what: str) -> bytes:
        """The next bytes."""
        end = self.at + count
        if end > self.size:
            self.damaged(f"it ends in {what}")
        if end > HEADER:
            self.damaged(f"what comes before the weights has more than {HEADER:,} bytes, at {what}")
        taken, self.at = self.content[self.at : end], end
        return taken

    def check(self, count: int, least: int, many: str) -> None:
        """Refuse a count of entries of at least `least` bytes that the file cannot hold; `many` says what they are."""
        if count > ENTRIES or self.at + count * least > self.size:
            self.damaged(many)

    def damaged(self, why: str) -> NoReturn:
        self.refuse(f"is damaged: {why}", AGAIN)

    def refuse(self, why: str, remedy: str) -> NoReturn:
        raise ModelError(f"{self.path} {why}: {remedy}")


def _type(kind: int) -> str:
    names: Iterator[str] = (known.name for known in gguf.GGMLQuantizationType if known == kind)
    return next(names, f"number {kind}")


def shown(value: Any) -> str:
    """A value of a field, cut to fit a line."""
    text = repr(value)
    return text if len(text) <= 60 else text[:60] + "…"
