"""The file of the training windows that a recovery kept: JSON lines, one a window, with its text and a digest.

Any command reads it as a text; a recovery finds the very windows again, by their digests.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from billhook.errors import BillhookError, DataError
from billhook.runtime.documents import parsed_object, read_bytes
from billhook.tensors import Tokens
from billhook.training.text_windows import TrainingTexts

NAME = "kept.jsonl"
DIGITS = 16  # of a digest
LARGEST = 2**30  # bytes of a file
AGAIN = "name the kept.jsonl of a recovery with --keep-data"


def lines(texts: TrainingTexts, numbers: Sequence[int], tokenizer: Any) -> str:
    """The content of a file: the training windows of these numbers."""
    said = ""
    for number, digest in zip(numbers, _digests(texts.train[list(numbers)]), strict=True):
        words = tokenizer.decode(texts.train[number][len(texts.begins_with) :])
        source = texts.names[int(texts.text_of[number])]
        said += json.dumps({"text": words, "source": source, "window": digest}, ensure_ascii=False) + "\n"
    return said


def listed(path: Path) -> list[str]:
    """The digests of the windows in a file.

    Raises:
        BillhookError: it is no such file; names the line.
    """
    try:
        content = read_bytes(path, f"--keep-data {path}", AGAIN, LARGEST)
    except FileNotFoundError:
        raise DataError(f"--keep-data {path} does not exist: {AGAIN}, or give a share between 0 and 1") from None
    digests = []
    for n, line in enumerate(content.splitlines(), 1):
        digest = parsed_object(line, f"--keep-data {path}, line {n}", AGAIN).get("window")
        if not isinstance(digest, str):
            raise DataError(f"--keep-data {path}, line {n} has no field 'window' with a digest: {AGAIN}")
        digests.append(digest)
    return digests


def found(texts: TrainingTexts, digests: Sequence[str], path: Path) -> list[int]:
    """The numbers of the training windows that a file lists.

    Windows that are held out now stay held out.

    Raises:
        BillhookError: it lists windows that the texts do not have, or none to train on.
    """
    rest, numbers = Counter(digests), []
    for number, digest in enumerate(_digests(texts.train)):
        if rest[digest] > 0:
            rest[digest] -= 1
            numbers.append(number)
    rest -= Counter(digest for windows in texts.of_training for digest in _digests(windows.tokens))
    if missing := rest.total():
        raise BillhookError(
            f"--keep-data {path} lists {missing:,} windows that {' and '.join(texts.names)} have not: give the --text and "
            "--seq-len, and the tokenizer, that they were kept from"
        )
    if not numbers:
        raise BillhookError(f"--keep-data {path} lists no window to train on: {AGAIN}")
    return numbers


def _digests(windows: Tokens) -> list[str]:
    return [hashlib.sha256(window.numpy().tobytes()).hexdigest()[:DIGITS] for window in windows]
