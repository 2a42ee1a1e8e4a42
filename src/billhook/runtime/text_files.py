"""Text in files: plain, or records with a field `text` (JSON lines, a JSON list, CSV, parquet), gzipped or not.

Kind and size of a file are checked before it is read, and a line is read only as far as windows could need it.
"""

import csv
import gzip
import json
import logging
import re
from collections.abc import Callable, Iterable, Iterator
from io import BufferedIOBase
from pathlib import Path
from typing import Any
from zlib import error as ZlibError

from billhook.errors import BillhookError, DataError, first_line
from billhook.runtime.documents import check_plain

LOG = logging.getLogger("billhook")
FIELD = "text"
LARGEST = 2**30  # bytes of an unpacked file; its tokens take ten times as much memory
LONGEST = 2**21  # bytes of a line of text: half a million tokens, twice as many as a prune looks at
LARGEST_RECORD = 2**27  # bytes that are parsed at once; that takes four times as much memory
PLAIN = "give a plain file with a part of it"
SHOWN, LONGEST_NAME = 5, 60  # how many names a message shows, and characters of each


def read_text(path: Path) -> str:
    """The text of a UTF-8 file: its content, or the `text` fields of its records.  Warns of long lines that are cut.

    Raises:
        BillhookError: the file cannot be read, is a device or a pipe, is too large, or is empty.
    """
    inner = path.with_suffix("") if packed(path) else path
    read = READERS.get(inner.suffix.lower(), _plain)
    try:
        check_plain(path, f"text {path}", PLAIN, LARGEST)
        with gzip.open(path) if packed(path) else path.open("rb") as file:
            text = read(path, file)
    except UnicodeDecodeError as error:
        raise DataError(f"text {path} is not UTF-8 (byte {error.start}): convert it first") from error
    except (OSError, EOFError, ZlibError) as error:  # also gzip's errors
        raise DataError(f"text {path} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if not text.strip():
        raise DataError(f"text {path} is empty")
    return text


def read_folder(folder: Path) -> str:
    """The texts of all files below a folder, in the order of their names.  Warns of files that are no texts.

    Raises:
        BillhookError: as `read_text`, or no file is a text.
    """
    files = sorted(path for path in folder.rglob("*") if not path.is_dir())
    texts = [path for path in files if is_text(path) and path.is_file()]
    if not texts:
        raise DataError(f"text folder {folder} holds no {', '.join(READERS)} file")
    if skipped := [ascii(str(path.relative_to(folder))) for path in files if path not in set(texts)]:
        remainder = f" and {len(skipped) - SHOWN} more" if len(skipped) > SHOWN else ""
        LOG.warning("text folder %s: left out, no texts: %s%s", folder, ", ".join(skipped[:SHOWN]), remainder)
    return "\n\n".join(map(read_text, texts))


def is_text(path: Path) -> bool:
    """Whether a file's name is that of a text."""
    return (path.with_suffix("") if packed(path) else path).suffix.lower() in READERS


def name_of(path: Path) -> str:
    """A text's name: its file's name without suffixes."""
    return (path.with_suffix("") if packed(path) else path).stem


def packed(path: Path) -> bool:
    """Whether a file's name is that of a gzipped one."""
    return path.suffix.lower() == ".gz"


def _plain(path: Path, file: BufferedIOBase) -> str:
    lines, cut = [], 0
    for line, long in _lines(path, file, LONGEST):
        lines.append(_whole(line) + b"\n" if long else line)
        cut += long
    if cut:
        _say_cut(path, cut)
    return b"".join(lines).decode("utf-8-sig")


def _by_line(path: Path, file: BufferedIOBase) -> str:
    return _of_records(path, ((n, _parsed(path, f", line {n}", line)) for n, line in _records(path, file)))


def _json(path: Path, file: BufferedIOBase) -> str:
    """A list of records, alone or under the only key with a list; or one record; or JSON lines under another name."""
    content = file.read(LARGEST_RECORD + 1)
    if len(content) > LARGEST_RECORD:
        raise DataError(f"text {path} is JSON beyond {LARGEST_RECORD:,} bytes: write it as .jsonl, a record a line")
    try:
        document = json.loads(content.decode("utf-8-sig"))
    except (json.JSONDecodeError, RecursionError):  # these may be JSON lines; a wrong line is named
        lines = enumerate(content.split(b"\n"), 1)
        return _of_records(path, ((n, _parsed(path, f", line {n}", line)) for n, line in lines if line.strip()))
    except ValueError as error:  # a number with thousands of digits
        if isinstance(error, UnicodeDecodeError):
            raise
        raise DataError(f"text {path}: not JSON ({first_line(error)})") from error
    if isinstance(document, dict) and FIELD not in document:
        lists = [value for value in document.values() if isinstance(value, list)]
        document = lists[0] if len(lists) == 1 else document
    return _of_records(path, enumerate(document if isinstance(document, list) else [document], 1), "record")


def _csv(path: Path, file: BufferedIOBase) -> str:
    def lines() -> Iterator[str]:
        for n, line in _records(path, file, blank=True):
            try:
                yield line.decode("utf-8-sig" if n == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise DataError(f"text {path}, line {n} is not UTF-8: convert it first") from error

    before = csv.field_size_limit(LARGEST_RECORD)
    try:
        rows = csv.DictReader(lines())
        if FIELD not in (rows.fieldnames or []):
            raise DataError(f"text {path} has no column {FIELD!r} (it has {_named(rows.fieldnames or [])})")
        return _of_records(path, enumerate(rows, 1), "row")
    except csv.Error as error:
        raise DataError(f"text {path}: not CSV ({error})") from error
    finally:
        csv.field_size_limit(before)


def _parquet(path: Path, file: BufferedIOBase) -> str:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise DataError(
            f"text {path} is parquet; to read it, install the extra: pip install 'billhook[data]'"
        ) from error
    try:
        rows = pyarrow.parquet.ParquetFile(file)
        if FIELD not in rows.schema_arrow.names:
            raise DataError(f"text {path} has no column {FIELD!r} (it has {_named(rows.schema_arrow.names)})")
        batches = rows.iter_batches(batch_size=1024, columns=[FIELD])
        records = (record for batch in batches for record in batch.to_pylist())
        return _of_records(path, enumerate(records, 1), "row")
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError, ValueError) as error:
        if isinstance(error, BillhookError):
            raise
        raise DataError(f"text {path} is no parquet that can be read ({first_line(error)})") from error


READERS: dict[
    str, Callable[[Path, BufferedIOBase], str]
] = {  # readers by suffix; files with other suffixes are plain text
    ".txt": _plain,
    ".jsonl": _by_line,
    ".ndjson": _by_line,
    ".json": _json,
    ".csv": _csv,
    ".parquet": _parquet,
}


def _lines(path: Path, file: BufferedIOBase, longest: int) -> Iterator[tuple[bytes, bool]]:
    """Yield each line with its end, and whether it was longer than `longest` bytes and cut there."""
    total = 0
    while line := file.readline(longest):
        cut, end, total = False, line, total + len(line)
        while not end.endswith(b"\n") and (end := file.readline(LONGEST)):
            cut, total = True, total + len(end)
            _check_total(path, total)
        _check_total(path, total)
        yield line, cut


def _check_total(path: Path, total: int) -> None:
    if total > LARGEST:
        raise DataError(f"text {path} has more than {LARGEST:,} bytes, unpacked: {PLAIN}")


def _whole(line: bytes) -> bytes:
    """A cut line without its last character, which may be incomplete."""
    end = len(line)
    while end and line[end - 1] & 0xC0 == 0x80:
        end -= 1
    return line[: max(0, end - 1)]


def _records(path: Path, file: BufferedIOBase, blank: bool = False) -> Iterator[tuple[int, bytes]]:
    """Yield the lines that are not blank, or all of them, numbered from 1."""
    for n, (line, cut) in enumerate(_lines(path, file, LARGEST_RECORD), 1):
        if cut:
            raise DataError(f"text {path}, line {n}: a record of more than {LARGEST_RECORD:,} bytes: cut it")
        if blank or line.strip():
            yield n, line


def _parsed(path: Path, where: str, line: bytes) -> Any:
    try:
        return json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise DataError(f"text {path}{where} is not UTF-8 (byte {error.start}): convert it first") from error
    except RecursionError:
        raise DataError(f"text {path}{where}: not JSON (nested too deeply)") from None
    except ValueError as error:  # not JSON, or a number with thousands of digits
        raise DataError(f"text {path}{where}: not JSON ({getattr(error, 'msg', error)})") from error


def _of_records(path: Path, records: Iterable[tuple[int, Any]], kind: str = "line") -> str:
    """The texts of numbered records, joined."""
    texts, cut, total = [], 0, 0
    for n, record in records:
        if not isinstance(record, dict) or not isinstance(record.get(FIELD), str):
            raise DataError(f"text {path}, {kind} {n}: no field {FIELD!r} that holds a string")
        text = record[FIELD]
        if re.search("[\ud800-\udfff]", text):
            raise DataError(f"text {path}, {kind} {n}: half a character (a lone surrogate): convert it first")
        if len(text) > LONGEST:
            short = "\n".join(line[:LONGEST] for line in text.split("\n"))
            cut, text = cut + (len(short) < len(text)), short
        texts.append(text)
        _check_total(path, total := total + len(text))
    if cut:
        _say_cut(path, cut)
    return "\n\n".join(texts)


def _say_cut(path: Path, lines: int) -> None:
    LOG.warning(
        "text %s: of %s the first %s bytes are read", path, "a line" if lines == 1 else f"{lines} lines", f"{LONGEST:,}"
    )


def _named(columns: Iterable[str]) -> str:
    names = list(columns)
    return ", ".join(ascii(name)[:LONGEST_NAME] for name in names[:SHOWN]) + (", …" if len(names) > SHOWN else "")
