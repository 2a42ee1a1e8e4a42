"""A row that the user gives is proved as a derived one is; what is wrong with it is said in one line."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny
import torch
from folders import run
from transformers import AutoModelForCausalLM

import billhook
from billhook.checkpoints import load
from billhook.errors import BillhookError
from billhook.models import families, given, proof
from billhook.models.shrink import default, shrunk

GEMMA = """
model_type: gemma
layers: model.layers
up: [mlp.gate_proj, mlp.up_proj]
down: mlp.down_proj
"""


@pytest.fixture(autouse=True)
def _rows_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    for rows in ((given, "ROWS"), (families, "DERIVED"), (proof, "_proved")):
        monkeypatch.setattr(*rows, {})


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    to = tmp_path_factory.mktemp("given") / "tiny-gemma"
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(shrunk(default("gemma"))).save_pretrained(to)
    tiny.tokenizer().save_pretrained(to)
    yield to


def test_it_is_proved_and_shown(gemma: Path, tmp_path: Path) -> None:
    file = tmp_path / "row.yaml"
    file.write_text(GEMMA)
    row = billhook.inspect(gemma, family_row=file).row
    assert row["by"] == "file" and row["proved"] == ["ffn", "layers"]
    assert row["keys"] == {"width": "intermediate_size"}


def test_without_one_the_derived_row_is_shown(gemma: Path) -> None:
    row = billhook.inspect(gemma).row
    assert row["by"] == "derivation" and row["places"]["up"] == ("mlp.gate_proj", "mlp.up_proj")
    assert "heads, groups, value" in row["refused"]


def test_json_is_read_and_a_prune_goes_by_it(gemma: Path, tmp_path: Path, text_file: Path) -> None:
    """Of the FFN's writers the row knows one: what holds is offered, the FFN is not."""
    file = tmp_path / "row.json"
    one = {"model_type": "gemma", "layers": "model.layers", "up": ["mlp.up_proj"], "down": "mlp.down_proj"}
    file.write_text(json.dumps(one))
    settings = {"calibration": str(text_file), "samples": 4, "seq_len": 32, "look": False, "family_row": str(file)}
    with pytest.raises(BillhookError, match="gemma cannot give up 'ffn'"):
        billhook.prune(gemma, method="fasp", ratio=0.1, multiple_of=4, **settings)
    result = billhook.prune(gemma, method="layerchop", ratio=0.25, **settings)
    assert result.model.config.num_hidden_layers == 3
    assert f"--family-row {file}" in result.record["command"]


def test_every_command_that_opens_a_model_takes_one(gemma: Path, tmp_path: Path, text_file: Path) -> None:
    """Each proves it before it works: here, that the model has no such layers."""
    file, out = tmp_path / "row.yaml", tmp_path / "out"
    file.write_text(GEMMA.replace("down_proj", "fc2"))
    wants = {
        "evaluate": ("--text", text_file),
        "recover": ("--teacher", "demo", "--tokens", "1k", "--text", text_file, "-o", out),
        "forecast": ("--ratio", "0.2", "--minutes", "1"),
        "quantize": ("-o", out),
        "export": ("-o", tmp_path / "out.gguf"),
        "check": (),
        "prune": ("--ratio", "0.2", "--calibration", text_file, "-o", out),
    }
    for command, more in wants.items():
        assert "down: there is no 'mlp.fc2'" in run(command, gemma, *more, "--family-row", file), command
    assert not out.exists() and not (tmp_path / "out.gguf").exists()


def test_python_opens_by_one(gemma: Path, tmp_path: Path) -> None:
    file = tmp_path / "row.yaml"
    file.write_text(GEMMA.replace("mlp.gate_proj, ", ""))
    billhook.load(gemma, family_row=file)
    assert families.DERIVED["gemma"].up == ("mlp.up_proj",)


def test_of_several_models_one_has_to_be_of_its_type(gemma: Path, folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "row.yaml"
    file.write_text(GEMMA)
    load.use_row(str(file), [str(folder), str(gemma)])
    with pytest.raises(BillhookError, match=r"is of 'gemma', and .* is of 'llama'"):
        load.use_row(str(file), [str(folder)])


WRONG = {
    "no mapping": ("[]", "row.yaml is not a mapping: write model_type"),
    "no YAML": ("a: [", "row.yaml cannot be read"),
    "unknown key": (GEMMA + "dwon: x", "unknown setting 'dwon': did you mean 'down'"),
    "another type": (GEMMA + "stacked: 3", "stacked 3: .*boolean"),
    "a size that is none": (GEMMA + "keys: {depth: x}", "keys.depth"),
    "a key that is none": (GEMMA + "keys: {width: wide}", "keys: width: 'wide' is no whole number of the config"),
    "a type by hand": (GEMMA.replace("gemma", "llama"), "llama has a row by hand, which wins"),
    "a type that is none": (GEMMA.replace("gemma", "gamma"), "'gamma': the installed transformers has no causal LM"),
    "of another model": (GEMMA.replace("gemma", "cohere"), "is of 'cohere', and .*tiny-gemma is of 'gemma'"),
    "half an FFN": (GEMMA.replace("down:", "# "), "up and down belong together"),
    "no layers": (GEMMA.replace("model.layers", "model.blocks"), "layers: there is no 'model.blocks'"),
    "no list": (GEMMA.replace("model.layers", "model.norm"), "'model.norm' is no list of decoder layers"),
    "no linear module": (GEMMA.replace("down_proj", "act_fn"), "'mlp.act_fn' is no linear module of decoder layer 0"),
    "no module": (GEMMA.replace("down_proj", "fc2"), "down: there is no 'mlp.fc2'"),
    "half a mixture": (GEMMA + "experts: mlp.experts", "experts and router belong together"),
    "experts nowhere": (GEMMA + "experts: moe\nrouter: gate", "experts: 'moe' is in no decoder layer"),
}


@pytest.mark.parametrize(("content", "words"), WRONG.values(), ids=list(WRONG))
def test_a_row_that_cannot_be_used(content: str, words: str, gemma: Path, tmp_path: Path) -> None:
    file = tmp_path / "row.yaml"
    file.write_text(content)
    assert re.search(words, run("inspect", gemma, "--family-row", file))


def test_a_file_that_is_not_there(gemma: Path) -> None:
    assert "family row no-row.yaml cannot be read: " in run("inspect", gemma, "--family-row", "no-row.yaml")
