"""Processes that share a text make the bits that one makes, however many they are."""

import json
import sys
from pathlib import Path
from typing import Any

import processes
import pytest
import tiny
from processes import launched

from billhook.calibration import gram, passage
from billhook.checkpoints.resume import FinishedLayers
from billhook.evaluation import perplexity
from billhook.runtime.peers import Peers

FASP = ["--method", "fasp", "--ratio", "0.2", "--multiple-of", "2"]
SENSITIVITY = ["--layout", "per_layer", "--allocation", "sensitivity", "--probes", "2"]
WAYS = {
    "fasp": [*FASP, "--axes", "ffn,heads"],
    "sensitivity": [*FASP, *SENSITIVITY],
    "sparsegpt": ["--method", "sparsegpt", "--pattern", "2:4", "--stream", "layer_target"],
    "wanda": ["--method", "wanda", "--sparsity", "0.5", "--stream", "dense"],
    "lorc": ["--method", "lorc", "--ratio", "0.05", "--layout", "per_layer"],
    "files": [*FASP, "--stream-weights"],
    "experts": ["--method", "fasp", "--ratio", "0.3", "--multiple-of", "8", "--axes", "expert_ffn"],
}
SMALL = ((passage, "BATCH_TOKENS", 32), (gram, "BATCH_TOKENS", 4), (perplexity, "HEAD_TOKENS", 32))


def command(line: list[str]) -> None:
    """A command, two windows of 16 tokens in a batch, each in parts of a product."""
    for module, name, value in SMALL:
        setattr(module, name, value)
    processes.command(line)


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with two models and a text; what `command` changes is put back."""
    for module, name, _ in SMALL:
        monkeypatch.setattr(module, name, getattr(module, name))
    monkeypatch.setattr(sys, "argv", sys.argv)
    for name, family in (("model", "llama"), ("mixture", "qwen2_moe")):
        tiny.model(family).save_pretrained(tmp_path / name)
        tiny.tokenizer().save_pretrained(tmp_path / name)
    (tmp_path / "text.txt").write_text(tiny.text())
    return tmp_path


def prune(bench: Path, way: str, output: str) -> list[str]:
    """Ten windows to fit and one held out: neither shares out evenly."""
    given = ["--calibration", str(bench / "text.txt"), "--samples", "11", "--seq-len", "16", "--device", "cpu"]
    model = bench / ("mixture" if way == "experts" else "model")
    return ["prune", str(model), *WAYS[way], *given, "--no-look", "-o", str(bench / output)]


def alone(line: list[str]) -> None:
    with pytest.raises(SystemExit) as left:
        command(line)
    assert not left.value.code


@pytest.mark.parametrize(
    ("way", "count"),
    [("fasp", 2), ("sparsegpt", 3), *(pytest.param(way, 2, marks=pytest.mark.whole) for way in list(WAYS)[1:])],
)
def test_processes_prune_as_one(way: str, count: int, bench: Path) -> None:
    alone(prune(bench, way, "one"))
    launched(count, command, prune(bench, way, "shared"))
    one, shared = (bench / name / "model.safetensors" for name in ("one", "shared"))
    assert one.read_bytes() == shared.read_bytes()
    assert not (bench / "shared.unfinished").exists()


@pytest.mark.whole
def test_processes_go_on_with_what_one_began(bench: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alone(prune(bench, "fasp", "one"))
    save = FinishedLayers.save

    def once(*given: Any) -> None:
        save(*given)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(SystemExit):
        patched.setattr(FinishedLayers, "save", once)
        command(prune(bench, "fasp", "shared"))
    assert (bench / "shared.unfinished" / "layer-0.json").exists()
    launched(2, command, prune(bench, "fasp", "shared"))
    one, shared = (bench / name / "model.safetensors" for name in ("one", "shared"))
    assert one.read_bytes() == shared.read_bytes()


def test_processes_evaluate_as_one(bench: Path) -> None:
    tiny.model("llama", seed=1).save_pretrained(bench / "other")
    tiny.tokenizer().save_pretrained(bench / "other")
    line = ["evaluate", str(bench / "other"), "--against", str(bench / "model"), "--text", str(bench / "text.txt")]
    line += ["--seq-len", "16", "--windows", "7", "--parts", "none", "--device", "cpu", "--json"]
    alone([*line, str(bench / "one.json")])
    launched(2, command, [*line, str(bench / "shared.json")])
    one, shared = (
        [model["perplexities"] for model in json.loads((bench / name).read_text())["models"]]
        for name in ("one.json", "shared.json")
    )
    assert one == shared and one[1][0]["against"]["kl"] > 0


@pytest.mark.parametrize("line", [["search", "demo"], ["prune", "demo", "--ratio", "0.2", "--dry-run"]])
def test_commands_of_one_process(
    line: list[str], bench: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit) as left:
        command([*line, "-o", str(bench / "out")])
    assert left.value.code == 2 and not (bench / "out").exists()
    assert capsys.readouterr().err.endswith("works in one process: start it without accelerate launch\n")


@pytest.mark.parametrize("total", [0, 1, 4, 7])
def test_every_item_is_done_once_and_in_order(total: int) -> None:
    items = list(range(total))
    for count in (1, 2, 3, 5):
        every = [Peers(rank, count) for rank in range(count)]
        assert sorted(item for one in every for item in one.share(items)) == items
        rounds = zip(*(one.rounds(items) for one in every), strict=True)  # all have as many
        assert [item for each in rounds for item, sharing in each[: each[0][1]]] == items
