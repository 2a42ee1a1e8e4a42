"""Damaged files, and what a command makes of them: it refuses in one line or works, and never takes long or much.

    fuzz(folder / "config.json", json_damages(content), [["inspect", folder]], tally)
    assert not tally.faults, tally

A command is its arguments, run in this process as the shell would run it, or a function, which refuses by
BillhookError: what reads a file takes milliseconds by itself, and seconds in a command around it.
"""

import io
import json
import os
import random
import resource
import shutil
import signal
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from billhook import cli
from billhook.errors import BillhookError

Drawn = TypeVar("Drawn")
Command = Sequence[object] | Callable[[], object]
SECONDS, BYTES = 60, 2**30  # what a command may take, of memory beyond what the process has
DEPTH = 100_000  # of what is nested deeply: no parser's stack holds it
DROPPED = object()
MARK = "\N{REPLACEMENT CHARACTER} here"
VALUES: dict[str, Any] = {  # what stands in a key's place: plain data, or JSON as it is written
    "dropped": DROPPED,
    "null": None,
    "a text": "text",
    "an empty text": "",
    "a word with a tag": "<script>x</script>\n[red]",
    "half a character": b'"\\ud800"',
    "true": True,
    "zero": 0,
    "negative": -3,
    "a fraction": 0.37,
    "huge": 10**40,
    "beyond a float": b"1e999",
    "more digits than are read": b"9" * 5000,
    "NaN": b"NaN",
    "minus infinity": b"-Infinity",
    "an empty list": [],
    "a list of null": [None],
    "a list of lists": [[1], ["text"]],
    "an empty object": {},
    "an object": {"text": {"text": None}},
    "nested deeply": b"[" * DEPTH + b"]" * DEPTH,
}


@dataclass(frozen=True)
class Damage:
    """What lies where a file lay: bytes, or something that is no file."""

    name: str
    content: bytes = b""
    kind: str = "file"  # or folder, pipe, device, loop

    def put(self, path: Path) -> None:
        """Replace what is at `path`."""
        remove(path)
        if self.kind == "file":
            path.write_bytes(self.content)
        elif self.kind == "folder":
            path.mkdir()
        elif self.kind == "pipe":
            os.mkfifo(path)
        else:
            path.symlink_to("/dev/zero" if self.kind == "device" else path.name)


def file_damages(content: bytes, prefixes: int = 24) -> Iterator[Damage]:
    """Damages of any file: prefixes of it, bytes that are wrong, and what is no file at all."""
    for end in sorted({len(content) * n // prefixes for n in range(prefixes)} | {1, len(content) - 1}):
        yield Damage(f"the first {end} bytes", content[:end])
    middle = len(content) // 2
    yield Damage("not UTF-8 at the start", b"\xff\xfe" + content)
    yield Damage("not UTF-8 in the middle", content[:middle] + b"\xff" + content[middle:])
    yield Damage("zeros", bytes(len(content)))
    yield Damage("twice", content + content)
    yield Damage("a mark of UTF-8 before it", b"\xef\xbb\xbf" + content)
    for kind in ("folder", "pipe", "device", "loop"):
        yield Damage(f"a {kind}", kind=kind)


def json_damages(
    content: bytes, values: Iterable[str] = tuple(VALUES), most: int | None = None, seed: int = 0
) -> Iterator[Damage]:
    """Every key of a JSON document (of lists the first and the last item) with each of `VALUES` in its place, or `most`
    of them."""
    document = json.loads(content)
    pairs = [(place, name) for place in places(document) for name in values]
    for place, name in sample(pairs, most, seed) if most is not None else pairs:
        yield Damage(f"{'.'.join(map(str, place)) or 'all of it'}: {name}", json_with(document, place, VALUES[name]))


def safetensors_damages(
    content: bytes, values: Iterable[str] = tuple(VALUES), most: int | None = None, seed: int = 0
) -> Iterator[Damage]:
    """A safetensors file whose header is damaged as JSON, or says another length than it has."""
    size = int.from_bytes(content[:8], "little")
    for damage in json_damages(content[8 : 8 + size], values, most, seed):
        header = damage.content + b" " * (-len(damage.content) % 8)
        yield Damage(damage.name, len(header).to_bytes(8, "little") + header + content[8 + size :])
    for length in (0, 1, size - 1, size + 1, len(content), 2**31, 2**63, 2**64 - 1):
        yield Damage(f"a header of {length} bytes", length.to_bytes(8, "little") + content[8:])
    yield Damage("more behind the end", content + bytes(64))


def places(document: Any, here: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """Where values stand in a document, itself first."""
    yield here
    if isinstance(document, dict):
        for key, value in document.items():
            yield from places(value, (*here, key))
    elif isinstance(document, list):
        for n in sorted({0, len(document) - 1} if document else ()):
            yield from places(document[n], (*here, n))


def json_with(document: Any, place: Sequence[str | int], value: Any) -> bytes:
    """The document with `value` at a place: plain data, bytes that are written as they are, or DROPPED."""
    copy = json.loads(json.dumps(document))
    if not place:
        copy = None if value is DROPPED else MARK if isinstance(value, bytes) else value
    else:
        parent = copy
        for key in place[:-1]:
            parent = parent[key]
        if value is DROPPED:
            del parent[place[-1]]
        else:
            parent[place[-1]] = MARK if isinstance(value, bytes) else value
    written = json.dumps(copy).encode()
    return written.replace(json.dumps(MARK).encode(), value) if isinstance(value, bytes) else written


def sample(damages: Iterable[Drawn], most: int, seed: int = 0) -> list[Drawn]:
    """At most so many of them, drawn by the seed."""
    found = list(damages)
    return found if len(found) <= most else random.Random(seed).sample(found, most)


class HangError(BaseException):
    """A command took too long."""


@dataclass
class Tally:
    """What was tried, and what came of it."""

    seconds: float = SECONDS  # that a command may take
    memory: int = BYTES
    inputs: int = 0
    counts: Counter[str] = field(default_factory=Counter)  # refused, accepted
    faults: list[str] = field(default_factory=list)  # with the input and the command
    worst: float = 0.0  # seconds that a command took

    def __str__(self) -> str:
        return (
            f"{self.inputs:,} inputs, {self.counts.total():,} commands: {self.counts['refused']:,} refused, "
            f"{self.counts['accepted']:,} accepted, {len(self.faults):,} faults, {self.worst:.1f} s at most"
        )


@dataclass(frozen=True)
class Outcome:
    """How a command ended."""

    kind: str  # refused, accepted, or what is wrong
    said: str  # the last line of standard error


def attempt(command: Command, seconds: float = SECONDS, memory: int = BYTES) -> Outcome:
    """Run a command in this process, as the shell would, within so many seconds and so much more memory."""
    out, err = io.StringIO(), io.StringIO()
    given, code = sys.argv, 0
    try:
        with redirect_stdout(out), redirect_stderr(err), warnings.catch_warnings(), _limits(seconds, memory):
            warnings.simplefilter("ignore")
            if callable(command):
                _called(command)
            sys.argv = ["billhook", *map(str, command)]
            cli.main()
    except SystemExit as end:
        code = end.code
    except HangError:
        return Outcome("hang", f"{seconds} s")
    except MemoryError as error:
        return Outcome("memory", str(error))
    except Exception as error:
        return Outcome("traceback", f"{type(error).__name__}: {error}"[:300])
    finally:
        sys.argv = given
    return judged(code, err.getvalue())


def _called(function: Callable[[], object]) -> NoReturn:
    """A function as a command: what it raises for bad input is one line and exit code 2."""
    try:
        function()
    except BillhookError as error:
        sys.stderr.write(f"billhook: error: {error}\n")
        sys.exit(2)
    sys.exit(0)


def judged(code: Any, said: str) -> Outcome:
    """What an exit code and standard error say."""
    lines = [line for line in said.splitlines() if line.strip()]
    last = lines[-1] if lines else ""
    if "Traceback" in said:
        return Outcome("traceback", last)
    if code == 0 or code is None:
        return Outcome("accepted", last)
    errors = [line for line in lines if line.startswith("billhook: error: ")]
    one_line = code == 2 and errors == [last] and len(last) < 1000
    return Outcome("refused" if one_line else f"exit code {code}, {len(errors)} error lines", last)


def fuzz(
    path: Path,
    damages: Iterable[Damage],
    commands: Sequence[Command],
    tally: Tally,
    *,
    out: Path | None = None,
    before: Callable[[], object] = lambda: None,
) -> list[Outcome]:
    """Run each command on each damage of the file at `path`, which is whole again afterwards.

    Args:
        out: what the commands write: nothing may be left there by one that refuses.
        before: puts everything else as it should be, before each command.
    """
    whole, found = path.read_bytes() if path.is_file() else None, []
    try:
        for damage in damages:
            tally.inputs += 1
            for command in commands:
                before()
                damage.put(path)
                began = time.perf_counter()
                outcome = attempt(command, tally.seconds, tally.memory)
                tally.worst = max(tally.worst, time.perf_counter() - began)
                found.append(outcome)
                said = command.__name__ if callable(command) else " ".join(map(str, command))[:80]
                where = f"{path.name}, {damage.name}: {said}"
                if outcome.kind in ("refused", "accepted"):
                    tally.counts[outcome.kind] += 1
                else:
                    tally.faults.append(f"{where}: {outcome.kind}: {outcome.said}")
                if out is not None:
                    if outcome.kind == "refused" and out.exists():
                        tally.faults.append(f"{where}: refused, and {out.name} is there")
                    remove(out)
    finally:
        remove(path)
        if whole is not None:
            path.write_bytes(whole)
    return found


def remove(path: Path) -> None:
    """Whatever is there, if anything is."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def _limits(seconds: float, memory: int) -> Iterator[None]:
    """Raise HangError after so many seconds; MemoryError, or what a library makes of it, beyond so many more bytes."""

    def late(*_: object) -> None:
        raise HangError

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    old, term = signal.signal(signal.SIGALRM, late), signal.getsignal(signal.SIGTERM)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + memory, hard))
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)
        signal.signal(signal.SIGTERM, term)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
