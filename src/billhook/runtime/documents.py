"""JSON that billhook reads back: one reader, which names the file, the key and what it should be."""

import hashlib
import json
import math
import re
import stat
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from billhook.errors import BillhookError, first_line

LARGEST = 2**26  # bytes of a file: an index of half a million tensors has half of that
LARGEST_YAML = 2**17  # bytes of a recipe or an allocation: YAML takes a second for them
SEAL = "sha256"  # the key of a digest of all others
DEEPEST = 100  # lists and objects within one another: what follows a document down copies, compares and prints it, too
SHOWN = 60  # characters of a value that is wrong
HALF = re.compile(r"\\u[dD][89abAB]|\\u[dD][c-fC-F]")  # of a character, which may lack its other half
PLAIN = {  # pydantic's words for what JSON calls otherwise
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
        remedy: what to do where it cannot be read.

    Raises:
        BillhookError: it is no plain file, larger than `largest` bytes, not UTF-8, not JSON as the standard has it (no NaN, no
            number beyond a float, no half a character), nested too deeply, or holds no object.
        FileNotFoundError: there is none.
    """
    return parsed_object(read_bytes(path, what, remedy, largest), what, remedy)


def parsed_object(content: bytes, what: str, remedy: str, *, finite: bool = True) -> dict[str, Any]:
    """The JSON object in what a file holds; see `read_object`.  With NaN and infinities, as Python writes them, if not `finite`."""
    only = {"parse_constant": _refuse, "parse_float": _finite} if finite else {}
    try:
        text = content.decode("utf-8")
        found = json.loads(text, **only)
        if _deep(found):
            raise RecursionError
        if HALF.search(text):
            _check_characters(found)
    except RecursionError:
        raise BillhookError(f"{what} cannot be read (nested too deeply): {remedy}") from None
    except ValueError as error:  # not UTF-8 and not JSON are kinds of it, and numbers of too many digits
        raise BillhookError(f"{what} cannot be read ({first_line(error)}): {remedy}") from error
    if not isinstance(found, dict):
        raise BillhookError(f"{what} holds {_kind(found)}, not a JSON object: {remedy}")
    return found


def read_as(kind: type[Document], path: Path, what: str, remedy: str, largest: int = LARGEST) -> Document:
    """The JSON object in a file, each key of the type that `kind` gives it.

    Raises:
        BillhookError: as `read_object`, or a key is missing or of another type; names it.
        FileNotFoundError: there is no such file.
    """
    return typed(kind, read_object(path, what, remedy, largest), what, remedy)


def sealed(content: dict[str, Any]) -> str:
    """JSON of what billhook keeps for itself, with a digest that tells whether it is still what was written."""
    plain = json.loads(json.dumps(content))
    return json.dumps({**plain, SEAL: _digest(plain)}) + "\n"


def read_sealed(path: Path, what: str, remedy: str) -> dict[str, Any]:
    """What `sealed` wrote.

    Raises:
        BillhookError: as `read_object`, or it is no longer what was written.
        FileNotFoundError: there is no such file.
    """
    found = parsed_object(read_bytes(path, what, remedy), what, remedy, finite=False)
    if found.pop(SEAL, None) != _digest(found):
        raise BillhookError(f"{what} is not as it was written: {remedy}")
    return found


def read_yaml(path: Path, what: str) -> Any:
    """The plain data in a YAML file of somebody's own, JSON among them.

    Raises:
        BillhookError: it is no plain file, is too large, not UTF-8, not YAML, or nested too deeply.
    """
    try:
        found = yaml.load(read_bytes(path, what, "write it again", LARGEST_YAML).decode("utf-8"), _Plain)
        if _deep(found):
            raise RecursionError
    except BillhookError:
        raise
    except RecursionError:
        raise BillhookError(f"{what} cannot be read (nested too deeply)") from None
    except (OSError, yaml.YAMLError, ValueError) as error:  # a date that is none is a ValueError
        raise BillhookError(f"{what} cannot be read: {first_line(error)}") from error
    return found


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
    """What a plain file of at most `largest` bytes holds.

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
    """Look at what a path names before it is opened, which a pipe would never end.

    Raises:
        BillhookError, FileNotFoundError: as `read_bytes`.
    """
    try:
        seen = path.stat()
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:  # a zero in its name
        raise BillhookError(f"{what} cannot be read ({getattr(error, 'strerror', None) or error}): {remedy}") from error
    if not stat.S_ISREG(seen.st_mode):
        raise BillhookError(f"{what} is not a plain file: {remedy}")
    if seen.st_size > largest:
        raise BillhookError(f"{what} has {seen.st_size:,} bytes, more than the {largest:,} it can hold: {remedy}")


class _Plain(yaml.SafeLoader):
    """Without aliases: a few lines of them stand for more than a memory holds."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("it has an alias, which is not read: write out what it stands for")
        return super().compose_node(parent, index)


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no number of JSON's")


def _deep(document: Any) -> bool:
    """Whether it is deeper than `DEEPEST`."""
    level = [document]
    for _ in range(DEEPEST):
        level = [
            within
            for one in level
            if isinstance(one, dict | list)
            for within in (one.values() if isinstance(one, dict) else one)
        ]
    return bool(level)


def _finite(number: str) -> float:
    found = float(number)
    if not math.isfinite(found):
        raise ValueError(f"{number[:SHOWN]} is beyond what a number may be")
    return found


def _check_characters(found: Any) -> None:
    """Raise ValueError if a text holds half a character, which no file could be written with."""
    try:
        json.dumps(found, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ValueError("a text holds half a character, a lone surrogate") from None


def _wrong(error: ValidationError | RecursionError) -> str:
    """The first key that is wrong and what it should be."""
    if isinstance(error, RecursionError):
        return "nested too deeply"
    first = error.errors(include_url=False)[0]
    key = ".".join(map(str, first["loc"])) or "it"
    should = PLAIN.get(first["type"], first["msg"][:1].lower() + first["msg"][1:]).removeprefix("value error, ")
    if first["type"] == "missing":
        return f"{key} is missing"
    given = repr(first["input"])
    return f"{key} is {given if len(given) <= SHOWN else given[:SHOWN] + '…'}: {should}"


def _kind(value: Any) -> str:
    names = {list: "a list", str: "a string", bool: "a truth value", int: "a number", float: "a number"}
    return names.get(type(value), "null")
