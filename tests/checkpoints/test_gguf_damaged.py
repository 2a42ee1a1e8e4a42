"""A damaged GGUF ends in one line: never a traceback, a hang, or memory that the file does not hold."""

import os
import struct
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest
import tiny
from ggufs import written
from test_export import built

from billhook.checkpoints import load
from billhook.checkpoints.gguf.write import write_gguf
from billhook.errors import BillhookError

HUGE = (2**31 - 1, 2**32, 2**63, 2**64 - 1)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("whole") / "model.gguf"
    write_gguf(built("llama"), tiny.tokenizer(), path, "F32")
    return path.read_bytes()


def outcome(path: Path) -> str:
    """Whether a file opened, or was refused as it should be; anything else ends the test."""
    try:
        load.open_model(str(path), device="cpu")
    except BillhookError as error:
        assert str(error).isprintable() and str(path) in str(error)
        return "refused"
    return "opened"


def mutations(content: bytes, seed: int, count: int) -> Iterator[bytes]:
    """Cut, bytes changed, and numbers of eight bytes made huge; most of it in the header."""
    draw, header = Random(seed), content.index(b"output_norm.weight")
    for n in range(count):
        at = draw.randrange(header if n % 4 else len(content))
        if n % 3 == 0:
            yield content[:at]
        elif n % 3 == 1:
            yield content[:at] + bytes(draw.randrange(256) for _ in range(draw.choice((1, 4)))) + content[at + 4 :]
        else:
            yield content[:at] + struct.pack("<Q", draw.choice(HUGE)) + content[at + 8 :]


@pytest.mark.parametrize("length", [0, 3, 4, 7, 8, 15, 23, 24, 31, 40, 200, 5000, -4, -100_000])
def test_a_file_that_was_cut_is_refused(length: int, whole: bytes, tmp_path: Path) -> None:
    (tmp_path / "cut.gguf").write_bytes(whole[:length])
    assert outcome(tmp_path / "cut.gguf") == "refused"


@pytest.mark.parametrize(
    ("at", "put", "message"),
    [
        (0, b"GGML", "is no GGUF file"),
        (4, struct.pack("<I", 1), "is of version 1"),
        (4, struct.pack(">I", 3), "is big-endian"),
        *((8, struct.pack("<Q", count), "it is said to hold .* tensors") for count in HUGE),
        *((16, struct.pack("<Q", count), "it is said to hold .* fields") for count in HUGE),
        *((24, struct.pack("<Q", count), "it ends in the name of field 0") for count in HUGE),
    ],
)
def test_a_wrong_word_or_count_is_named(at: int, put: bytes, message: str, whole: bytes, tmp_path: Path) -> None:
    path = tmp_path / "wrong.gguf"
    path.write_bytes(whole[:at] + put + whole[at + len(put) :])
    with pytest.raises(BillhookError, match=message):
        load.open_model(str(path), device="cpu")


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.gguf")
    with pytest.raises(BillhookError, match=r"pipe\.gguf is not a plain file"):
        load.open_model(str(tmp_path / "pipe.gguf"), device="cpu")


def test_a_name_that_no_line_can_hold_is_quoted(tmp_path: Path) -> None:
    path = written(tmp_path / "name.gguf", {"general.architecture": "llama", "a\nb": 1}, {})
    assert outcome(path) == "refused"


def test_some_mutations_are_refused_or_open(whole: bytes, tmp_path: Path) -> None:
    for content in mutations(whole, 1, 24):
        (tmp_path / "some.gguf").write_bytes(content)
        outcome(tmp_path / "some.gguf")


@pytest.mark.slow
def test_many_mutations_are_refused_or_open(whole: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    counts: Counter[str] = Counter()
    for content in mutations(whole, 2, 600):
        (tmp_path / "many.gguf").write_bytes(content)
        counts[outcome(tmp_path / "many.gguf")] += 1
    with capsys.disabled():
        sys.stdout.write(f"\n{sum(counts.values())} damaged GGUF files: {dict(counts)}\n")
    assert counts["refused"] > 300
