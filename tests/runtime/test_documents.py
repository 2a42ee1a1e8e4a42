"""What is read back from JSON: never a traceback, always the file and what is wrong with it."""

import json
import os
from pathlib import Path

import pytest
from pydantic import BaseModel

from billhook.errors import BillhookError
from billhook.runtime.documents import read_as, read_object


class Sizes(BaseModel):
    width: int
    names: list[str] = []


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "cannot be read"),
        (b'{"a": 1', "cannot be read"),
        (b'{"a": "\xff"}', "cannot be read"),
        (b'{"a": NaN}', "NaN"),
        (b'{"a": ' + b"[" * 100_000, "nested too deeply"),
        (b'{"a": ' + b"[" * 101 + b"]" * 101 + b"}", "nested too deeply"),
        (b'{"a": ' + b"9" * 10_000 + b"}", "cannot be read"),
        (b'{"a": -1e999}', "-1e999 is beyond what a number may be"),
        (b'{"a": "\\ud83d"}', "half a character"),
        (b'{"\\udc00": 1}', "half a character"),
        (b"[1]", "a list"),
        (b"null", "null"),
        (b'{"a": "' + b"x" * 300 + b'"}', "more than the 300"),
    ],
)
def test_an_object_that_cannot_be_read_is_named(tmp_path: Path, content: bytes, said: str) -> None:
    file = tmp_path / "file.json"
    file.write_bytes(content)
    with pytest.raises(BillhookError, match="the file") as error:
        read_object(file, "the file", "copy it again", 100_100 if len(content) > 1000 else 300)
    assert said in str(error.value)
    assert str(error.value).endswith("copy it again")
    assert len(str(error.value)) < 300


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(BillhookError, match="not a plain file"):
        read_object(tmp_path / "pipe", "it", "copy it again")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({}, "width is missing"),
        ({"width": "x" * 500}, "width is 'x"),
        ({"width": 1, "names": ["a", 2]}, "names.1 is 2: it should be a text"),
    ],
)
def test_a_key_of_another_type_is_named(tmp_path: Path, content: dict[str, object], said: str) -> None:
    (tmp_path / "sizes.json").write_text(json.dumps(content))
    with pytest.raises(BillhookError, match=r"^sizes") as error:
        read_as(Sizes, tmp_path / "sizes.json", "sizes", "copy it again")
    assert said in str(error.value)
    assert len(str(error.value)) < 200
