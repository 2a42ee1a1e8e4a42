"""Every command as a function of Python: what it returns is typed, and says what files say."""

import json
import math
from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import pytest
import tiny
from transformers import AutoModelForCausalLM

import billhook
from billhook.checkpoints.report import Report
from billhook.training import throughput

SMALL: dict[str, Any] = {"samples": 6, "seq_len": 32, "multiple_of": 4, "quiet": True}


@pytest.fixture(autouse=True)
def _kept_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BILLHOOK_CACHE", str(tmp_path / "cache"))


def test_a_prune_and_a_training_say_what_their_file_says(folder: Path, text_file: Path, tmp_path: Path) -> None:
    pruned = billhook.prune(str(folder), method="fasp", ratio=0.2, calibration=str(text_file), **SMALL)
    out = pruned.save(tmp_path / "out")
    report, stored = pruned.report, json.loads((out / "billhook.json").read_text())
    assert report.to_json() == (out / "billhook.json").read_text()
    assert report.sizes and report.sizes.after.parameters == AutoModelForCausalLM.from_pretrained(out).num_parameters()
    assert report.sizes.to_json() == json.dumps(stored["sizes"], indent=2) + "\n"
    assert [cut.error for cut in report.cuts] == [cut["error"] for cut in stored["cuts"]] and report.seconds
    assert report["recipe"] == stored["recipe"] and "search" in report and "of no name" not in report
    assert not report.recovery and report.dropped_layers == () and report.layout == "uniform"
    with pytest.raises(FrozenInstanceError):
        report.command = ""  # pyright: ignore[reportAttributeAccessIssue]

    held_out = tmp_path / "held.txt"
    held_out.write_text(tiny.text(300, 30))
    given: dict[str, Any] = {"text": (str(text_file),), "held_out": (str(held_out),), "guard": False, "tokens": 64}
    given |= {"seq_len": 16, "lr": 1e-3, "quiet": True}
    healed = billhook.recover(out, objective="ce", **given).report
    assert (healed.sizes, healed.cuts) == (report.sizes, report.cuts) and healed.recovery[0].kept_tokens == 64
    bare = billhook.recover(str(folder), objective="ce", **given).report
    assert (bare.sizes, bare.cuts, bare.command) == (None, (), None) and len(bare.recovery) == 1


def test_what_was_not_finite_is_no_number() -> None:
    cut = {"layer": 1, "kind": "ffn", "units": 8, "dropped": 4, "error_without": None, "error": 0.5, "of_later": 1}
    (found,) = Report.of({"parent": "a", "model_type": "llama", "cuts": [cut]}).cuts
    assert math.isnan(found.error_without) and found.error == 0.5 and found.error_held_out is None


def test_models_are_measured_and_compared(folder: Path, text_file: Path) -> None:
    text = [str(text_file)]
    first, other = billhook.evaluate(folder, against=folder, text=text, max_windows=2, seq_len=32, quiet=True)
    assert first.sizes.parameters == tiny.model("llama").num_parameters() and first.speeds[0].prefill > 0
    (alone,), (beside,) = first.perplexities, other.perplexities
    assert alone.against is None and beside.against and beside.against.factor == 1
    assert len(beside.window_losses) == 2 and beside.perplexity == alone.perplexity
    assert len(first.continuations) == len(first.record["prompts"])

    common = {"calibration": text[0], "text": text, "windows": 2, **SMALL}
    whole, *points = billhook.compare(folder, ["fasp", "fasp:score=wanda", "fasp:axes=heads"], [0.2], **common)
    assert whole.ratio == 0 and whole.factors == (1.0,)
    assert [bool(point.error) for point in points] == [False, False, True] and points[2].perplexities == ()
    for point in points[:2]:
        assert point.factors[0] == pytest.approx(point.perplexities[0].perplexity / whole.perplexities[0].perplexity)
    again, swept = billhook.sweep(folder, [0.2], method="fasp:stream=dense_target", **common)
    assert again.perplexities == whole.perplexities and swept.perplexities == points[0].perplexities
    assert swept.parameters == points[0].parameters and json.loads(swept.to_json())["ratio"] == 0.2


def test_what_a_model_is_and_what_it_becomes(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = billhook.inspect(folder)
    ffn = next(axis for axis in found.axes if axis.axis == "ffn")
    assert found.parameters == tiny.model("llama").num_parameters() and found.layers == 3 and ffn.units == 48
    assert billhook.check(folder).client == "transformers"
    written = billhook.export(folder, tmp_path / "model.gguf", quiet=True)
    assert written.bytes == (tmp_path / "model.gguf").stat().st_size and sum(written.types.values()) > 20
    few = billhook.quantize(folder, tmp_path / "few", method="rtn", bits="8", quiet=True)
    assert (
        few.types["Q8_0"] > 15 and few.containers["gguf"]["bytes"] == (tmp_path / "few" / "model.gguf").stat().st_size
    )
    monkeypatch.setattr(throughput, "training_pace", lambda *_: 1000.0)
    told = billhook.forecast(folder, 0.3, 10, seq_len=16, device="cpu", seconds=0.05, quiet=True)
    assert told.training_tokens_per_second == 1000 and told.commands[0].startswith(f"billhook prune {folder}")
    model = billhook.load(folder)
    assert model.num_parameters() == found.parameters
