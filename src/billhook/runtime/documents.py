"""JSON files that billhook reads: one reader, whose messages name the file, the key and what it should be."""

import hashlib
import json
import math
import re
import stat
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from pydantic import BaseModel, ValidationError

from billhook.errors import BillhookError, first_line

LARGEST = 2**26  # bytes of a file; an index of half a million tensors has half as many
SEAL = "sha256"  # key that holds the digest of all other keys
DEEPEST = 100  # levels of lists and objects; copying, comparing and printing recurse as deep
SHOWN = 60  # characters of a wrong value that a message shows
SURROGATE = re.compile(r"\\u[dD][89abAB]|\\u[dD][c-fC-F]")  # half a character; the other half may be missing
PLAIN = {  # messages in the words of JSON, by pydantic's type of error
    "model_type": "it should be an object",
    "model_attributes_type": "it should be an object",
    "dict_type": "it should be an object",
    "int_type": "it should be a whole number",
    "string_type": "it should be a text",
    "bool_type": "it should be true or false",
    "float_type": "it should be a number",
    "list_type": "it should be a list",
    "string_pattern_mismatch": "it should be a text that is not empty",
}
Document = TypeVar("Document", bound=BaseModel)


def read_object(path: Path, what: str, remedy: str, largest: int = LARGEST) -> dict[str, Any]:
    """The JSON object in a file.

    Args:
        what: the file, as messages call it.
        remedy: what to do if it cannot be read.

    Raises:
        BillhookError: it is not a plain file, is larger than `largest` bytes, not UTF-8, not standard JSON (which has
            no NaN, no number beyond a float and no half characters), nested too deeply, or holds no object.
        FileNotFoundError: there is no such file.
    """
    return parsed_object(read_bytes(path, what, remedy, largest), what, remedy)


def parsed_object(content: bytes, what: str, remedy: str, *, finite: bool = True) -> dict[str, Any]:
    """The JSON object in a file's content; see `read_object`.

    Args:
        finite: False also reads NaN and infinities, as Python writes them.
    """
    only = {"parse_constant": _refuse, "parse_float": _finite} if finite else {}
    try:
        text = content.decode("utf-8")
        document = json.loads(text, **only)
        if too_deep(document):
            raise RecursionError
        if SURROGATE.search(text):
            _check_characters(document)
    except RecursionError:
        raise BillhookError(f"{what} cannot be read (nested too deeply): {remedy}") from None
    except ValueError as error:  # not UTF-8 and not JSON are kinds of it, and numbers of too many digits
        raise BillhookError(f"{what} cannot be read ({first_line(error)}): {remedy}") from error
    if not isinstance(document, dict):
        raise BillhookError(f"{what} holds {_kind(document)}, not a JSON object: {remedy}")
    return document


def read_as(kind: type[Document], path: Path, what: str, remedy: str, largest: int = LARGEST) -> Document:
    """The JSON object in a file, validated as a `kind`.

    Raises:
        BillhookError: as `read_object`, or a key is missing or of another type; names it.
        FileNotFoundError: there is no such file.
    """
    return typed(kind, read_object(path, what, remedy, largest), what, remedy)


def sealed(content: dict[str, Any]) -> str:
    """JSON of data that billhook keeps for itself, with a digest that shows later damage."""
    plain = json.loads(json.dumps(content))
    return json.dumps({**plain, SEAL: _digest(plain)}) + "\n"


def read_sealed(path: Path, what: str, remedy: str) -> dict[str, Any]:
    """Read what `sealed` wrote.

    Raises:
        BillhookError: as `read_object`, or the content was changed since.
        FileNotFoundError: there is no such file.
    """
    document = parsed_object(read_bytes(path, what, remedy), what, remedy, finite=False)
    if document.pop(SEAL, None) != _digest(document):
        raise BillhookError(f"{what} is not as it was written: {remedy}")
    return document


def typed(kind: type[Document], content: Any, what: str, remedy: str) -> Document:
    """Plain data as `kind`.

    Raises:
        BillhookError: a key is missing or of another type; names `what` and the key.
    """
    try:
        return kind.model_validate(content)
    except (ValidationError, RecursionError) as error:
        raise BillhookError(f"{what}: {_wrong(error)}: {remedy}") from None


def read_bytes(path: Path, what: str, remedy: str, largest: int = LARGEST) -> bytes:
    """The content of a plain file of at most `largest` bytes.

    Raises:
        BillhookError: it is a device, a pipe or a folder, is larger, or cannot be read.
        FileNotFoundError: there is no such file.
    """
    check_plain(path, what, remedy, largest)
    try:
        with path.open("rb") as file:
            return file.read(largest)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise BillhookError(f"{what} cannot be read ({error.strerror or error}): {remedy}") from error


def check_plain(path: Path, what: str, remedy: str, largest: int = LARGEST) -> None:
    """Check what a path names before it is opened: reading a pipe might never end.

    Raises:
        BillhookError, FileNotFoundError: as `read_bytes`.
    """
    try:
        status = path.stat()
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:  # a ValueError: the name holds a zero byte
        raise BillhookError(f"{what} cannot be read ({getattr(error, 'strerror', None) or error}): {remedy}") from error
    if not stat.S_ISREG(status.st_mode):
        raise BillhookError(f"{what} is not a plain file: {remedy}")
    if status.st_size > largest:
        raise BillhookError(f"{what} has {status.st_size:,} bytes, more than the {largest:,} it can hold: {remedy}")


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no number of JSON's")


def _finite(number: str) -> float:
    value = float(number)
    if not math.isfinite(value):
        raise ValueError(f"{number[:SHOWN]} is beyond what a number may be")
    return value


def _check_characters(document: Any) -> None:
    """Raise ValueError if a text holds half a character, which cannot be written to a file."""
    try:
        json.dumps(document, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ValueError("a text holds half a character, a lone surrogate") from None


def _wrong(error: ValidationError | RecursionError) -> str:
    """The first wrong key and what it should be."""
    if isinstance(error, RecursionError):
        return "nested too deeply"
    first = error.errors(include_url=False)[0]
    key = ".".join(map(str, first["loc"])) or "it"
    should = PLAIN.get(first["type"], first["msg"][:1].lower() + first["msg"][1:]).removeprefix("value error, ")
    if first["type"] == "missing":
        return f"{key} is missing"
    value = repr(first["input"])
    return f"{key} is {value if len(value) <= SHOWN else value[:SHOWN] + '…'}: {should}"


def _kind(value: Any) -> str:
    names = {list: "a list", str: "a string", bool: "a truth value", int: "a number", float: "a number"}
    return names.get(type(value), "null")


def too_deep(document: Any) -> bool:
    """Whether a document is nested deeper than `DEEPEST`."""
    level = [document]
    for _ in range(DEEPEST):
        level = [
            inner
            for outer in level
            if isinstance(outer, dict | list)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
    return bool(level)
