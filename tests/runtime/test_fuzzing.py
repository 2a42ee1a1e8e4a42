"""What damages files must find what it is there to find."""

import json
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from fuzzing import VALUES, Tally, attempt, file_damages, fuzz, json_damages, json_with, places, safetensors_damages
from safetensors.torch import load_file, save_file

from billhook.errors import BillhookError


def test_every_key_is_damaged_in_every_way() -> None:
    document = {"a": [1, {"b": None}, 3, [4]], "c": {"d": "e"}}
    assert list(places(document)) == [(), ("a",), ("a", 0), ("a", 3), ("a", 3, 0), ("c",), ("c", "d")]
    found = {one.name: one.content for one in json_damages(json.dumps(document).encode())}
    assert len(found) == 7 * len(VALUES)
    assert json.loads(found["a.3.0: dropped"]) == {"a": [1, {"b": None}, 3, []], "c": {"d": "e"}}
    assert json.loads(found["c.d: NaN"])["c"]["d"] != json.loads(found["c.d: NaN"])["c"]["d"]
    assert json_with(document, ("c",), b"1e999") == b'{"a": [1, {"b": null}, 3, [4]], "c": 1e999}'
    with pytest.raises(RecursionError):
        json.loads(found["a: nested deeply"])


def test_safetensors_are_damaged_in_their_header(tmp_path: Path) -> None:
    save_file({"w": torch.ones(3)}, tmp_path / "whole")
    content = (tmp_path / "whole").read_bytes()
    found = {one.name: one.content for one in safetensors_damages(content, ["a text", "zero"])}
    (tmp_path / "same").write_bytes(found["w.shape.0: zero"].replace(b"[0]", b"[3]"))
    assert load_file(tmp_path / "same")["w"].tolist() == [1, 1, 1]
    with pytest.raises(Exception, match="Error while deserializing"):
        (tmp_path / "bad").write_bytes(found["w.dtype: a text"])
        load_file(tmp_path / "bad")


def _refuses() -> None:
    raise BillhookError("no")


def _sleeps() -> None:
    time.sleep(5)


def _swells() -> None:
    np.ones(2**31, dtype=np.uint8)


@pytest.mark.parametrize(
    ("function", "kind"),
    [
        (list, "accepted"),
        (_refuses, "refused"),
        (lambda: {}["x"], "traceback"),
        (_sleeps, "hang"),
        (_swells, "memory"),
        (lambda: sys.stderr.write("Traceback (most recent call last)"), "traceback"),
    ],
)
def test_outcomes_are_told_apart(function: object, kind: str) -> None:
    assert callable(function) and attempt(function, seconds=0.2).kind == kind


def test_commands_are_run_as_the_shell_does(folder: Path, tmp_path: Path) -> None:
    assert attempt(["inspect", folder, "--json"]).kind == "accepted"
    refused = attempt(["inspect", tmp_path / "nowhere"])
    assert refused.kind == "refused" and "nowhere" in refused.said
    assert attempt(["inspect", folder, "--nothing"]).kind == "refused"


def test_a_file_is_whole_again_and_faults_are_named(tmp_path: Path) -> None:
    path, tally = tmp_path / "x.json", Tally(seconds=5, memory=2**26)
    path.write_text('{"a": 1}')

    def reads() -> None:
        try:
            assert json.loads(path.read_text())["a"] != "text"
        except (ValueError, OSError, RecursionError):
            raise BillhookError("not to be read") from None

    damages = [*json_damages(path.read_bytes()), *file_damages(path.read_bytes())]
    fuzz(path, [one for one in damages if one.kind != "pipe"], [reads], tally)
    assert path.read_text() == '{"a": 1}' and tally.inputs == len(damages) - 1
    assert any(fault.startswith("x.json, a: dropped: reads: traceback: KeyError") for fault in tally.faults)
    assert any("a device: reads:" in fault for fault in tally.faults)  # it never ends
    assert tally.counts["refused"] > 9 and tally.counts["accepted"] > 9
