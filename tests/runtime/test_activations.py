"""Hidden states beyond a budget wait in files, and nothing else changes."""

import tempfile
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

import billhook
from billhook.errors import BillhookError
from billhook.runtime import activations
from billhook.runtime.offload import parameters

BATCH = 8 * 32 * 32 * 4  # bytes: windows, tokens, channels, float32
GIVEN: dict[str, Any] = {"method": "fasp", "samples": 20, "seq_len": 32, "multiple_of": 1}
WAYS: dict[str, dict[str, Any]] = {
    "target": {"ratio": 0.3},
    "dense": {"ratio": 0.3, "stream": "dense"},
    "sequential": {"ratio": 0.3, "stream": "sequential"},
    "layers": {"method": "layerchop", "drop": "1", "patch": "linear"},
    "wanda": {"method": "wanda", "sparsity": 0.5},
    "fistapruner": {"method": "fistapruner", "sparsity": 0.5},
    "slicegpt": {"method": "slicegpt", "ratio": 0.3},
    "slicegpt as it is": {"method": "slicegpt", "ratio": 0.3, "rotate": False, "stream_weights": True},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.covering(some={"way": 2})
def test_a_budget_changes_no_bit(way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("passage", "gram"):
        monkeypatch.setattr(f"billhook.calibration.{module}.BATCH_TOKENS", 256)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    tiny.model("llama").save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text(tiny.text())
    written, kept = [], activations.Room.file
    monkeypatch.setattr(activations.Room, "file", lambda room: written.append(kept(room)) or written[-1])
    given = {"calibration": str(tmp_path / "text.txt"), **GIVEN, **WAYS[way]}
    whole = billhook.prune(tmp_path / "model", **given)
    assert not written
    tight = billhook.prune(tmp_path / "model", hidden_budget=BATCH, **given)
    assert len(written) > 4
    assert not any(file.exists() for file in written)
    kept = [[(name, one.clone()) for name, one in parameters(found.model)] for found in (whole, tight)]
    for (name, one), (_, two) in zip(*kept, strict=True):
        assert one.equal(two), name
    assert whole.record["cuts"] == tight.record["cuts"] and whole.record["zeros"] == tight.record["zeros"]


def test_what_is_kept_comes_back_as_it_was_and_room_is_given_back() -> None:
    first, second = torch.randn(4, 3).bfloat16(), torch.randn(4, 3).bfloat16()
    room = activations.Room(24)
    one, two = room.keep(first), room.keep(second)
    assert one.file is None and two.file is not None
    assert one.read() is first and two.read().equal(second)
    del one
    assert room.keep(first).file is None
    with pytest.raises(
        BillhookError, match=r"--hidden-budget 24 bytes: the hidden states of one batch alone take 48: raise it"
    ):
        room.keep(torch.zeros(4, 3))
    assert activations.Room().keep(torch.zeros(1000)).file is None
