"""Prunes of models whose row is derived: mixtures on the command line, and a model in memory."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from folders import run
from transformers import AutoModelForCausalLM, PreTrainedModel

import billhook
from billhook.models import families
from billhook.models.shrink import default, shrunk

FEW = ("--samples", 6, "--seq-len", 24, "--probes", 2, "--no-look")


@pytest.fixture(scope="module", autouse=True)
def _rows_of_their_own() -> Iterator[None]:
    """Proved once each: a proof takes as long as a prune."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(families, "DERIVED", {})
        yield


def small(model_type: str) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(shrunk(default(model_type))).eval()


def written(model_type: str, to: Path) -> Path:
    small(model_type).save_pretrained(to)
    tiny.tokenizer().save_pretrained(to)
    return to


def pruned(model: Path, text: Path, out: Path, *more: object) -> dict[str, Any]:
    """The config of what the command wrote, after the stock class has loaded it with as many parameters as it says."""
    assert run("prune", model, "--calibration", text, *FEW, "-o", out, *more) == ""
    stock = AutoModelForCausalLM.from_pretrained(out)
    report = json.loads((out / "billhook.json").read_text())
    assert sum(p.numel() for p in stock.parameters()) == report["sizes"]["after"]["parameters"]
    return json.loads((out / "config.json").read_text())


def test_experts_go_with_what_is_added_beside_the_router(text_file: Path, tmp_path: Path) -> None:
    model = written("ernie4_5_moe", tmp_path / "model")
    config = pruned(model, text_file, tmp_path / "out", "--method", "experts", "--ratio", 0.1)
    assert config["moe_num_experts"] == 7 and config["moe_layer_start_index"] == 1


def test_channels_of_experts_go_where_a_key_says_their_number(text_file: Path, tmp_path: Path) -> None:
    model = written("granitemoe", tmp_path / "model")
    how = ("--method", "fasp", "--axes", "expert_ffn", "--multiple-of", 8, "--ratio", 0.1)
    assert pruned(model, text_file, tmp_path / "out", *how)["intermediate_size"] < 112


def test_the_default_runs_on_a_mixture(text_file: Path, tmp_path: Path) -> None:
    model = written("granitemoe", tmp_path / "model")
    config = pruned(model, text_file, tmp_path / "out", "--ratio", 0.25)
    before = json.loads((model / "config.json").read_text())
    sizes = ("num_hidden_layers", "num_local_experts", "intermediate_size")
    assert config["model_type"] == "granitemoe" and any(config[key] < before[key] for key in sizes)


def test_a_model_in_memory(text_file: Path) -> None:
    model, given = small("starcoder2"), {"calibration": str(text_file), "samples": 6, "seq_len": 24, "look": False}
    result = billhook.prune(
        model, method="fasp", ratio=0.2, multiple_of=8, tokenizer=tiny.tokenizer(), quiet=True, **given
    )
    assert result.model is model and model.config.intermediate_size < 112
    assert model(tiny.tokens()).logits.isfinite().all()
