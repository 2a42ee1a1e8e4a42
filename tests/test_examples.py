"""Every program in examples/ does what it says, on a tiny random model and in this process; none is longer than a
page."""

import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from billhook.pruning import bits_search

EXAMPLES = Path(__file__).parents[1] / "examples"
SMALL: dict[str, Any] = dict(samples=12, seq_len=32, multiple_of=4)


def example(name: str) -> dict[str, Any]:
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))


def test_what_is_written_is_read_and_served(
    folder: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "smaller")
    example("prune_in_memory")["main"](str(folder), out, calibration=str(text_file), **SMALL)
    said = capsys.readouterr().out
    assert "parameters became" in said and "logits equal" in said
    size = AutoModelForCausalLM.from_pretrained(out).num_parameters()
    assert f"{size:,} parameters became" not in said and f" became {size:,}\n" in said
    example("read_report")["main"](out)
    said = capsys.readouterr().out
    assert f"→ {size:>13,}" in said and said.count("48 → 32") == 3
    example("serve_with_transformers")["main"](out, "once", new_tokens=8)
    assert "8 tokens, " in capsys.readouterr().out


def test_a_score_of_ones_own_decides(folder: Path, text_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = example("own_score")
    own["main"](str(folder), calibration=str(text_file), **SMALL)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["wanda", "obs", "unlike_others"]
    assert len({line.split()[-1] for line in lines}) == 3

    x = torch.randn(50, 4, dtype=torch.float64)
    x[:, 3] = -2 * x[:, 0]  # says what another says
    found = own["unlike_others"](torch.ones(2, 4), x.T @ x)
    assert found[[0, 3]].max() < 1e-9 < found[[1, 2]].min()


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # peft asks for it
def test_adapters_train_on_what_was_pruned(
    folder: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "adapted"
    example("prune_then_lora")["main"](str(folder), str(text_file), str(out), steps=11, **SMALL)
    said = capsys.readouterr().out
    first, last = (float(line.split()[-1]) for line in said.splitlines() if line.startswith("step"))
    assert last < first
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.config.intermediate_size < 48 and f"{model.num_parameters():,} parameters as before" in said


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
def test_qpruners_road_ends_in_an_adapter_of_both_clients(
    folder: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for extra in ("compressed_tensors", "optuna"):
        pytest.importorskip(extra)
    monkeypatch.setattr(bits_search, "TRIALS", 2)
    out, windows = tmp_path / "qpruned", {"seq_len": 16, "held_out": (), "guard": False}
    training = {**windows, "lr": 1e-3, "rank": 4, "device": "cpu", "precision": "float32"}
    settings = dict(memory="32kB", tokens=96, training=training, **SMALL)
    example("qpruner")["main"](str(folder), str(text_file), str(out), **settings)
    assert "bits a weight" in capsys.readouterr().out
    assert (out / "packed" / "model.gguf").exists() and (out / "adapter" / "adapter.gguf").exists()
    assert (out / "adapter" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_an_example_is_short_and_says_how_it_is_run(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    assert f"    python examples/{path.name} " in source.split('"""')[1]
    assert source.count("\n") <= 50 and f'example("{path.stem}")' in Path(__file__).read_text(encoding="utf-8")
