"""benchmarks/gpu in miniature on the CPU: every row runs, none twice, and floors count the operations that run."""

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

GPU = Path(__file__).parents[1] / "benchmarks" / "gpu"
sys.path += [str(GPU.parent), str(GPU)]
bare, floors, rows, run, shapes = (
    importlib.import_module(name) for name in ("bare", "floors", "rows", "run", "shapes")
)
CPU = torch.device("cpu")


def test_every_row_runs_and_the_same_command_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["--tiny", "--device", "cpu", "--out", str(tmp_path)]
    assert run.main([*asked, "--rows", "opt"]) == 0
    first = (tmp_path / "gpu.csv").read_text()
    capsys.readouterr()
    assert run.main(asked) == 0
    said, kept = capsys.readouterr().out, (tmp_path / "gpu.csv").read_text()
    assert kept.startswith(first)  # the row that was there is not measured again
    table = said[said.index("| x floor |") :]
    for what in rows.counted(shapes.TINY):
        assert f"| {what} |" in table, what
    assert {row["row"] for row in run.kept(tmp_path, {})} == set(rows.ROWS)
    assert "apart by 0.0e+00" in table  # the same model on the same device


def test_a_row_that_fails_leaves_the_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(bench: Any) -> Any:
        raise RuntimeError("out of memory")

    monkeypatch.setitem(rows.ROWS, "fasp", broken)
    assert run.main(["--tiny", "--device", "cpu", "--out", str(tmp_path), "--rows", "fasp;perplexity"]) == 1
    said = capsys.readouterr()
    assert "failed: fasp" in said.out and "| perplexity, a tiny LLaMA |" in said.out and "out of memory" in said.err


def test_floors_count_the_operations_that_run() -> None:
    shape, windows, length = shapes.TINY_LLAMA, 3, 16
    model = shapes.made(shape, CPU)
    model.set_attn_implementation("eager")  # which computes the half that is masked as well
    with FlopCounterMode(display=False) as counter:
        model(shapes.tokens(shape, windows, length))
    tokens = windows * length
    masked = shape.layers * 2 * tokens * length * shape.hidden
    assert counter.get_total_flops() == floors.forward(shape, tokens, length, head=True).bf16 + masked


def test_a_floor_is_the_larger_of_two_times() -> None:
    card = floors.Card("one", bf16=10.0, float32=5.0, float64=2.0, bandwidth=100.0)
    assert floors.Work(bf16=20, float32=5, float64=2, moved=100).seconds(card) == 4
    assert floors.Work(bf16=20, moved=1000).seconds(card) == 10
    assert (floors.Work(bf16=1, moved=2) * 3 + floors.Work(float64=1)) == floors.Work(3, 0, 1, 6)


def test_the_bare_sweep_leaves_two_of_four() -> None:
    """A peer that does less than its paper would be no peer."""
    for prune in (bare.sweep, bare.wanda):
        model, windows = shapes.made(shapes.TINY_LLAMA, CPU), shapes.tokens(shapes.TINY_LLAMA, 4, 32)
        bare.sparsegpt(model, windows, prune)
        weight = model.model.layers[1].mlp.down_proj.weight
        assert bool(((weight.view(-1, 4) == 0).sum(1) == 2).all()) and bool(weight.isfinite().all())
