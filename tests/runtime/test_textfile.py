"""Files of text: the same text under every form of records, whatever packs it; and what no text is, is neither read nor
waited for."""

import csv
import gzip
import io
import json
import os
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import tiny
from fuzzing import Tally, attempt, file_damages, fuzz, sample

from billhook import data
from billhook.errors import BillhookError
from billhook.evaluation import side_by_side
from billhook.runtime import text_files

TEXTS = [f"Record {n}: „quick“ foxes,\n{n} of them." for n in range(40)]
WHOLE = "\n\n".join(TEXTS)


def lines(field: str = "text") -> bytes:
    return "\n".join(json.dumps({field: text, "id": n}) for n, text in enumerate(TEXTS)).encode()


def rows(column: str = "text") -> bytes:
    out = io.StringIO(newline="")
    table = csv.writer(out)
    table.writerows([("id", column), *enumerate(TEXTS)])
    return out.getvalue().encode()


def table(column: str = "text", values: Any = TEXTS) -> bytes:
    out = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"id": list(range(len(values))), column: values}), out)
    return out.getvalue()


def document(made: object) -> bytes:
    return json.dumps(made, indent=1).encode()


RECORDS = [{"text": text} for text in TEXTS]
FILES: dict[str, bytes] = {
    "a.txt": WHOLE.encode(),
    "a.md": WHOLE.encode(),
    "a": b"\xef\xbb\xbf" + WHOLE.encode(),
    "a.jsonl": lines(),
    "a.JSONL": b"\n \n" + lines() + b"\n\n",
    "a.ndjson": lines(),
    "lines.json": lines(),
    "list.json": document(RECORDS),
    "one line.json": json.dumps(RECORDS).encode(),
    "under a key.json": document({"version": 1, "records": RECORDS}),
    "one record.json": document({"text": WHOLE}),
    "a.csv": rows(),
    "a.parquet": table(),
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("packed", [False, True], ids=["", "gz"])
def test_every_form_holds_the_same_text(name: str, packed: bool, tmp_path: Path) -> None:
    path = tmp_path / (name + ".gz" * packed)
    path.write_bytes(gzip.compress(FILES[name]) if packed else FILES[name])
    (found,) = data.texts(str(path))
    assert found == data.Text(name.rpartition(".")[0] or name, WHOLE)


def test_a_folder_is_read_whole_and_says_what_is_none(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name, form in {"a.txt": "a.txt", "b.jsonl": "a.jsonl", "c.csv": "a.csv", "d.parquet": "a.parquet"}.items():
        (tmp_path / name).write_bytes(FILES[form])
    (tmp_path / "e.JSON").write_bytes(FILES["list.json"])
    for name in ("b.jsonl", "c.csv"):
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress((tmp_path / name).read_bytes()))
    assert data.texts(str(tmp_path))[0].text == "\n\n".join([WHOLE] * 7) and not caplog.messages
    (tmp_path / "notes.md").write_text("none")
    os.mkfifo(tmp_path / "pipe.txt")
    assert data.texts(str(tmp_path))[0].text == "\n\n".join([WHOLE] * 7)
    assert caplog.messages == [f"text folder {tmp_path}: left out, no texts: 'notes.md', 'pipe.txt'"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", document({"a": [{"text": "x"}], "b": []}), "record 1: no field 'text'"),
        ("a.json", document([{"text": "x"}, 3]), "record 2: no field 'text'"),
        ("a.json", document([{"text": "x"}])[:-3], "line 1: not JSON"),
        ("a.json", b"[" * 100_000, "nested too deeply"),
        ("a.jsonl", b"[" * 100_000, "line 1: not JSON .nested too deeply"),
        ("a.jsonl", b'{"text": "x", "n": ' + b"9" * 5000 + b"}", "line 1: not JSON .*digits"),
        ("a.jsonl", b'{"text": "x"}\n{"text": "\xff"}', "line 2 is not UTF-8"),
        ("a.csv", rows("body"), "has no column 'text' .it has 'id', 'body'"),
        ("a.csv", bytes(5000), r"has no column 'text' .it has '\\x00.{1,70}$"),
        ("a.csv", b"id,text\n1", "row 1: no field 'text'"),
        ("a.csv", b"id,text\n1,\xff", "line 2 is not UTF-8"),
        ("a.parquet", table("body"), "has no column 'text' .it has 'id', 'body'"),
        ("a.parquet", table("text", [1, 2]), "row 1: no field 'text'"),
        ("a.parquet", table("text", ["x", None]), "row 2: no field 'text'"),
        ("a.parquet", table()[:-9], "is no parquet that can be read"),
        ("a.txt.gz", b"plain", "cannot be read: Not a gzipped file"),
        ("a.txt.gz", gzip.compress(WHOLE.encode())[:-20], "cannot be read: "),
    ],
)
def test_what_holds_no_text_is_refused(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(BillhookError, match=f"text .*{name}.*{message}"):
        data.texts(str(tmp_path / name))


def test_parquet_names_what_it_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.parquet").write_bytes(table())
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(
        BillhookError, match=r"is parquet; to read it, install the extra: pip install 'billhook\[data\]'"
    ):
        data.texts(str(tmp_path / "a.parquet"))


def test_damaged_files_are_refused_or_read(tmp_path: Path) -> None:
    tally = Tally(seconds=5, memory=2**28)
    for name, content in FILES.items():
        for packed in (False, True):
            path = tmp_path / (name + ".gz" * packed)
            path.write_bytes(gzip.compress(content) if packed else content)
            damages = sample(file_damages(path.read_bytes()), 6)
            fuzz(path, damages, [lambda path=path: data.texts(str(path))], tally)
    assert not tally.faults and tally.counts["refused"] and tally.counts["accepted"], tally


def through_descriptor(path: Path) -> str:
    """As a shell's <(…) gives it."""
    read, write = os.pipe()
    os.write(write, b"words")
    os.close(write)
    return f"/dev/fd/{read}"


def pipe(path: Path) -> str:
    os.mkfifo(path)
    return str(path)


ENDLESS: dict[str, Callable[[Path], str]] = {
    "a device": lambda _: "/dev/zero",
    "random": lambda _: "/dev/urandom",
    "nothing": lambda _: "/dev/null",
    "a pipe": pipe,
    "a shell's pipe": through_descriptor,
    "a link to a device": lambda path: path.symlink_to("/dev/zero") or str(path),
}


@pytest.mark.parametrize("make", ENDLESS.values(), ids=list(ENDLESS))
def test_what_has_no_end_is_not_opened(make: Callable[[Path], str], tmp_path: Path) -> None:
    given = make(tmp_path / "a.txt")
    reads: list[Callable[[], object]] = [
        lambda: data.texts(given),
        lambda: data.evaluation_texts([given]),
        lambda: side_by_side.read_prompts(Path(given)),
    ]
    for read in reads:
        with pytest.raises(BillhookError, match=f"text {given} is not a plain file: give a plain file"):
            read()


def test_what_is_too_large_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "a.txt").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(
        BillhookError, match=r"a\.txt has 1,099,511,627,776 bytes, more than the 1,073,741,824 it can hold"
    ):
        data.texts(str(tmp_path / "a.txt"))


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.jsonl", "a.csv", "a.json"])
def test_a_line_is_read_as_far_as_windows_need(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A line of 16 MB, as one of a gigabyte, costs what is kept of it; as a record it is refused."""
    path = tmp_path / name
    with gzip.open(path, "wb", compresslevel=1) if name.endswith("gz") else path.open("wb") as file:
        for _ in range(16):
            file.write(b"\xe2\x82\xac " * 2**18)
        file.write(b"\nthe next line")
    monkeypatch.setattr(text_files, "LARGEST_RECORD", 2**23)
    tracemalloc.start()
    try:
        if ".txt" in name:
            text = data.texts(str(path))[0].text
            assert text == ("€ " * 2**19)[:-1] + "\nthe next line" or text == "€ " * (2**19 - 1) + "€\nthe next line"
            assert caplog.messages == [f"text {path}: of a line the first 2,097,152 bytes are read"]
        else:
            with pytest.raises(
                BillhookError, match=r"a record of more than 8,388,608 bytes|JSON beyond 8,388,608 bytes"
            ):
                data.texts(str(path))
        assert tracemalloc.get_traced_memory()[1] < 2**26
    finally:
        tracemalloc.stop()


def test_a_pack_is_not_unpacked_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"words\n" * 2**18))
    monkeypatch.setattr(text_files, "LARGEST", 2**20)
    with pytest.raises(BillhookError, match=r"a\.txt\.gz has more than 1,048,576 bytes, unpacked"):
        data.texts(str(tmp_path / "a.txt.gz"))


def test_a_record_is_cut_as_a_line_is(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "x" * 2**22 + "\nshort"}))
    assert data.texts(str(tmp_path / "a.jsonl"))[0].text == "x" * 2**21 + "\nshort"
    assert caplog.messages == [f"text {tmp_path / 'a.jsonl'}: of a line the first 2,097,152 bytes are read"]


@pytest.mark.slow
def test_a_gigabyte_in_one_line_is_cut_into_windows(tmp_path: Path) -> None:
    """In less than a minute and a gigabyte, by a tokenizer of bytes, which makes most tokens of it."""
    path = tmp_path / "a.txt"
    with path.open("wb") as file:
        file.truncate(10**9)
    made = tiny.tokenizer()

    def cut() -> None:
        assert data.windows(data.texts(str(path))[0], made, 128, spans=True).available == 2**21 // 128

    assert attempt(cut).kind == "accepted"
