"""Damaged files of a model: one line that names the file and what is wrong in it, whichever way the model is opened."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from folders import run

from billhook.checkpoints import load
from billhook.errors import BillhookError
from billhook.runtime.headers import META

Header = dict[str, Any]
UP = "model.layers.1.mlp.up_proj.weight"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARD = "weights.safetensors"
DEEP = "[" * 100_000 + "]" * 100_000


def read(file: Path) -> tuple[Header, bytes]:
    """The header of a safetensors file, and the numbers."""
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def joined(header: bytes, numbers: bytes, length: int | None = None) -> bytes:
    return (len(header) if length is None else length).to_bytes(8, "little") + header + numbers


def entry(**values: object) -> Callable[[Header], object]:
    """Change what the header says of one tensor."""
    return lambda header: header[UP].update(values)


def renamed(header: Header) -> None:
    header[UP + "\x1b[31m\n"] = header.pop(UP) | {"dtype": "F9"}


def on_another(header: Header) -> None:
    header[UP]["data_offsets"] = header["model.layers.0.mlp.up_proj.weight"]["data_offsets"]


HEADERS: dict[str, tuple[Callable[[Header], object], str]] = {
    "an entry is null": (lambda header: header.update({UP: None}), UP),
    "no shape": (lambda header: header[UP].pop("shape"), f"{UP}.*shape is missing"),
    "no dtype": (lambda header: header[UP].pop("dtype"), f"{UP}.*dtype is missing"),
    "no offsets": (lambda header: header[UP].pop("data_offsets"), f"{UP}.*data_offsets is missing"),
    "shape is a number": (entry(shape=48), f"{UP}.*shape is 48"),
    "shape of strings": (entry(shape=["48", "32"]), f"{UP}.*shape.0 is '48'"),
    "shape of truth values": (entry(shape=[True, 1536]), f"{UP}.*shape.0 is True"),
    "negative shape": (entry(shape=[-48, -32]), f"{UP}.*shape.0 is -48"),
    "huge shape": (entry(shape=[2**40, 2**22]), f"{UP} of F32 .1099511627776, 4194304. has"),
    "shape beyond 64 bits": (entry(shape=[0, 2**64]), f"{UP}.*shape.1 is 18446744073709551616"),
    "shape of other bytes": (entry(shape=[48, 31]), f"{UP} of F32 .48, 31. has 6,144 bytes"),
    "endless shape": (entry(shape=[1] * 10_000), f"{UP}.*shape is "),
    "unknown dtype": (entry(dtype="F31"), f"{UP} has the unknown dtype F31"),
    "dtype is a number": (entry(dtype=32), f"{UP}.*dtype is 32"),
    "dtype of another size": (entry(dtype="F64"), f"{UP} of F64 .48, 32. has 6,144 bytes"),
    "one offset": (entry(data_offsets=[0]), f"{UP}.*data_offsets is "),
    "negative offsets": (entry(data_offsets=[-6144, 0]), f"{UP}.*data_offsets.0 is -6144"),
    "offsets turned": (entry(data_offsets=[6144, 0]), "begins at byte 6,144, where"),
    "offsets beyond the file": (entry(data_offsets=[2**40, 2**40 + 6144]), f"{UP} and all after it are cut off"),
    "on another tensor": (on_another, r"up_proj.weight begins at byte [\d,]+, where the one before it ends at [\d,]+"),
    "a hole": (lambda header: header.pop(UP), r"begins at byte [\d,]+, where the one before it ends"),
    "metadata of numbers": (lambda header: header.update({META: {"format": 1}}), f"{META}: format is 1"),
    "metadata is a list": (lambda header: header.update({META: []}), f"{META}: "),
    "a name that moves the cursor": (renamed, r"up_proj.weight\\x1b\[31m\\n has the unknown dtype F9"),
}


@pytest.mark.parametrize(("damage", "words"), HEADERS.values(), ids=list(HEADERS))
def test_a_header_that_does_not_fit_its_file(damage: Callable[[Header], object], words: str, folder: Path) -> None:
    header, numbers = read(folder / WEIGHTS)
    damage(header)
    (folder / WEIGHTS).write_bytes(joined(json.dumps(header).encode(), numbers))
    refused(folder, f"shard {WEIGHTS} is damaged or truncated", words)


CONTENTS: dict[str, tuple[Callable[[bytes, bytes], bytes], str]] = {
    "nothing": (lambda header, numbers: b"", "it has 0 bytes"),
    "seven bytes": (lambda header, numbers: b"1234567", "it has 7 bytes"),
    "nothing but a length": (lambda header, numbers: joined(b"", b"", 99), "header would have 99 bytes"),
    "a length of 16 exabytes": (lambda header, numbers: joined(header, numbers, 2**64 - 1), "header would have 18,4"),
    "a header that ends early": (lambda header, numbers: joined(header, numbers, 99), "its header cannot be read"),
    "a header of no bytes": (lambda header, numbers: joined(b"", numbers), "its header cannot be read"),
    "not UTF-8": (lambda header, numbers: joined(b'{"\xff": 1}', numbers), "its header cannot be read .*utf-8"),
    "deep": (lambda header, numbers: joined(DEEP.encode(), numbers), "its header .*nested too deeply"),
    "a list": (lambda header, numbers: joined(b"[]", numbers), "its header holds a list"),
    "no tensor": (lambda header, numbers: joined(b"{}", numbers), "its tensors end at byte 0 of"),
    "more numbers": (lambda header, numbers: joined(header, numbers + b"1234"), "its tensors end at byte"),
    "text": (lambda header, numbers: b"<html>no such file</html>", "header would have"),
}


@pytest.mark.parametrize(("content", "words"), CONTENTS.values(), ids=list(CONTENTS))
def test_a_file_that_is_no_safetensors(content: Callable[[bytes, bytes], bytes], words: str, folder: Path) -> None:
    header, numbers = read(folder / WEIGHTS)
    (folder / WEIGHTS).write_bytes(content(json.dumps(header).encode(), numbers))
    refused(folder, f"shard {WEIGHTS} is damaged or truncated", words)


def made(kind: str, file: Path) -> None:
    file.unlink()
    if kind == "folder":
        file.mkdir()
    elif kind == "pipe":
        os.mkfifo(file)
    else:
        file.symlink_to({"nothing": file.parent / "gone", "itself": file, "device": Path("/dev/zero")}[kind])


@pytest.mark.parametrize("kind", ["folder", "pipe", "nothing", "itself", "device"])
@pytest.mark.parametrize("file", [WEIGHTS, "config.json", INDEX])
def test_what_is_no_plain_file(file: str, kind: str, folder: Path) -> None:
    if file == INDEX:
        apart(folder)
    (folder / file).touch()
    made(kind, folder / file)
    refused(folder, file, "not a plain file|link to nothing|has no|cannot be read")


def apart(folder: Path) -> None:
    """Weights that an index alone makes a model's: beside a single file it is not read."""
    (folder / WEIGHTS).rename(folder / SHARD)


INDICES: dict[str, tuple[object, str]] = {
    "empty": ({}, "weight_map is missing"),
    "map of numbers": ({"weight_map": {UP: 3}}, f"weight_map.{UP} is 3"),
    "map is null": ({"weight_map": None}, "weight_map is None"),
    "above": (
        {"weight_map": {UP: "../other.safetensors"}},
        f"{UP} is said to be in ../other.safetensors, no .*file of",
    ),
    "absolute": ({"weight_map": {UP: "/etc/passwd"}}, f"{UP} is said to be in /etc/passwd, no .*file of this folder"),
    "the folder": ({"weight_map": {UP: "."}}, f"{UP} is said to be in ., no .*file of this folder"),
    "a pickle": ({"weight_map": {UP: "a.bin"}}, f"{UP} is said to be in a.bin, no .safetensors file of this folder"),
    "a zero byte": ({"weight_map": {UP: "a\0.safetensors"}}, f"{UP} is said to be in a.x00.safetensors, no"),
    "no such file": ({"weight_map": {UP: "a.safetensors"}}, f"shard a.safetensors is missing, though .*{UP}"),
    "a long name": ({"weight_map": {UP: "a" * 300 + ".safetensors"}}, "cannot be read .File name too long"),
    "no such tensor": ({"weight_map": {"a": SHARD}}, f"says that {SHARD} holds a, but no shard holds it"),
}


@pytest.mark.parametrize(("content", "words"), INDICES.values(), ids=list(INDICES))
def test_an_index_that_names_what_is_not_there(content: object, words: str, folder: Path) -> None:
    apart(folder)
    (folder / INDEX).write_text(json.dumps(content))
    refused(folder, words)


@pytest.mark.parametrize("content", [b"\xff", b"{", DEEP.encode(), b'{"weight_map": NaN}', b""])
def test_an_index_that_cannot_be_read(content: bytes, folder: Path) -> None:
    apart(folder)
    (folder / INDEX).write_bytes(content)
    refused(folder, INDEX, "cannot be read")


@pytest.mark.parametrize(
    "command", ["inspect", "check", "prune", "prune --dry-run", "prune --stream-weights", "evaluate"]
)
def test_every_command_reads_headers_alike(command: str, folder: Path, text_file: Path, tmp_path: Path) -> None:
    header, numbers = read(folder / WEIGHTS)
    (folder / WEIGHTS).write_bytes(joined(json.dumps(header).encode(), numbers, 2**64 - 1))
    name, *options = command.split()
    given = (
        ["-o", tmp_path / "out", "--method=fasp", "--ratio", 0.2, "--calibration", text_file] if name == "prune" else []
    )
    given = ["--text", text_file] if name == "evaluate" else given
    assert "its header would have 18,446,744,073,709,551,615 bytes" in run(name, folder, *given, *options)
    assert not (tmp_path / "out").exists()


def refused(model: Path, *words: str) -> None:
    """Both ways of opening refuse a folder in the same single line."""
    said = []
    for stream in (False, True):
        with pytest.raises(BillhookError, match=".*".join(words)) as error:
            load.open_model(str(model), stream=stream)
        said.append(str(error.value))
    assert said[0] == said[1] and len(said[0]) < 700 and "\n" not in said[0]
