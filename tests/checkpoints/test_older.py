"""What is written is read alike by transformers 5 and by 4.57, which knows other keys and takes its defaults in
silence."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers as T

from billhook.checkpoints import load, save
from billhook.checkpoints.clients import check
from billhook.models.axes import axes
from billhook.models.surgery import remove

OLDER = "BILLHOOK_TRANSFORMERS_4"  # an interpreter that has transformers 4.57; one is made where it is not set
IDS = tiny.tokens(2, 64)
ORIGINAL = {"original_max_position_embeddings": 64}
SCALINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 2.0},
    "dynamic": {"factor": 2.0},
    "yarn": {"factor": 2.0, **ORIGINAL},
    "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, **ORIGINAL},
    "longrope": {"short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [1.5, 2.0, 2.5, 3.0], "factor": 2.0, **ORIGINAL},
}
ALL_KINDS = ("llama", "mistral", "qwen2", "gemma2", "granite", "seed_oss", "smollm3")
KINDS: list[tuple[str, str]] = [
    *((family, "yarn" if family == "gpt_oss" else "default") for family in tiny.CONFIGS),  # its class has no other
    *((family, kind) for family in ALL_KINDS for kind in SCALINGS if kind != "default"),
    *((family, "linear") for family in ("qwen3", "olmo2", "glm4_moe", "gpt_neox", "gemma3_text", "mixtral", "falcon")),
    *((family, "dynamic") for family in ("olmo2", "qwen3_moe", "olmoe")),
    ("phi3", "longrope"),
]


def model_of(family: str, kind: str) -> T.PreTrainedModel:
    """A random model whose rotary parameters are none of its class's defaults."""
    config = tiny.CONFIGS[family]()
    said = config.to_dict()
    if given := said.get("rope_parameters"):
        own = {"rope_type": kind, "rope_theta": 54321.0, **SCALINGS[kind]}
        own |= {"partial_rotary_factor": given["partial_rotary_factor"]} if "partial_rotary_factor" in given else {}
        own.pop("factor", None) if (family, kind) == ("phi3", "longrope") else None  # a factor of its own it has none
        local = {"rope_type": "default", "rope_theta": 4321.0}
        nested = {"full_attention": own, "sliding_attention": local}
        config = type(config).from_dict(said | {"rope_parameters": nested if "full_attention" in given else own})
    torch.manual_seed(0)
    model = T.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    for param in model.parameters():
        param.data *= 4 if param.ndim > 1 else 1
    return model


def written(model: T.PreTrainedModel, to: Path, source: Path | None = None) -> Path:
    to.mkdir()
    save.save(model, tiny.tokenizer(), to, source)
    return to


@pytest.mark.parametrize(("family", "kind"), KINDS)
@pytest.mark.covering(some={"family": 6})
def test_both_forms_are_written_and_say_the_same(family: str, kind: str, tmp_path: Path) -> None:
    model = model_of(family, kind)
    out = written(model, tmp_path / "out")
    said = json.loads((out / "config.json").read_text())
    assert said["torch_dtype"] == said["dtype"] == "float32"
    if "rope_parameters" in said:
        assert 54321.0 in (said.get("rope_theta"), said.get("rotary_emb_base"))
        assert (
            said["rope_scaling"] is None
            if kind == "default"
            else said["rope_scaling"]["factor" if family != "phi3" else "type"]
        )
        assert (said.get("rope_local_base_freq") == 4321.0) == ("full_attention" in said["rope_parameters"])
    again = load.load(out)
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    assert (
        again.config.rope_parameters.items() >= model.config.rope_parameters.items()
        or "full_attention" in said.get("rope_parameters", {})
        if "rope_parameters" in said
        else True
    )
    older = {key: value for key, value in said.items() if key not in ("rope_parameters", "dtype")}
    (out / "config.json").write_text(json.dumps(older))  # what 4.x sees of it, which 5.x can read as well
    assert torch.equal(load.load(out)(IDS).logits, model(IDS).logits)


def test_a_config_of_4_stays_what_it_says(tmp_path: Path) -> None:
    """The form of most folders on the hub: theta and scaling at the top, torch_dtype."""
    model = model_of("llama", "llama3")
    folder = written(model, tmp_path / "model")
    said = json.loads((folder / "config.json").read_text())
    of_4 = {key: value for key, value in said.items() if key not in ("rope_parameters", "dtype")}
    (folder / "config.json").write_text(json.dumps(of_4))
    out = written(load.open_model(str(folder)).model, tmp_path / "out", folder)
    found = json.loads((out / "config.json").read_text())
    assert {key: found[key] for key in ("rope_theta", "rope_scaling", "torch_dtype")} == {
        key: of_4[key] for key in ("rope_theta", "rope_scaling", "torch_dtype")
    }
    assert torch.equal(load.load(out)(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("copied", [False, True])
def test_the_tokenizer_is_of_a_class_that_both_know(copied: bool, tmp_path: Path) -> None:
    tokenizer = tiny.tokenizer()
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|im_start|>"]})
    tokenizer.save_pretrained(tmp_path / "model")
    assert "TokenizersBackend" in (tmp_path / "model" / "tokenizer_config.json").read_text()
    (out := tmp_path / "out").mkdir()
    save.save(tiny.model("llama"), tokenizer, out, tmp_path / "model" if copied else None)
    said = json.loads((out / "tokenizer_config.json").read_text())
    assert said["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert "extra_special_tokens" not in said and said["additional_special_tokens"]
    again, text = T.AutoTokenizer.from_pretrained(out), "a<|im_start|>b</s> c"
    assert again(text).input_ids == tokenizer(text).input_ids
    assert again.all_special_tokens == tokenizer.all_special_tokens
    assert again.decode(tokenizer(text).input_ids, skip_special_tokens=True) == "ab c"


@pytest.fixture(scope="module")
def older(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An interpreter with transformers 4.57."""
    if python := os.environ.get(OLDER):
        return python
    place = tmp_path_factory.mktemp("older")
    python = str(place / "bin" / "python")
    torch_now = torch.__version__.partition("+")[0]
    wanted = ["transformers==4.57.*", f"torch=={torch_now}", "accelerate"]
    subprocess.run([sys.executable, "-m", "venv", str(place)], check=True)
    environment = {key: value for key, value in os.environ.items() if key != "PIP_NO_INDEX"}
    done = subprocess.run(
        [python, "-m", "pip", "install", "-q", *wanted], env=environment, capture_output=True, text=True
    )
    if done.returncode:
        pytest.skip(
            f"transformers 4.57 cannot be installed here, and {OLDER} names no Python that has it: {done.stderr[-200:]}"
        )
    return python


@pytest.mark.slow
@pytest.mark.parametrize(("family", "kind"), KINDS)
def test_4_57_reads_what_is_written(family: str, kind: str, older: str, tmp_path: Path) -> None:
    """Equal tokens, logits within float32's roundings, and its own tokenizer."""
    found = check.check(written(model_of(family, kind), tmp_path / "out"), "transformers", older)
    assert found["version"].startswith("4.57") and found["logits_drift"] < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "qwen3", "opt", "phi3"])
def test_4_57_reads_layers_of_their_own_sizes(family: str, older: str, tmp_path: Path) -> None:
    model = model_of(family, "default")
    for axis in axes(model, ("ffn",)):
        remove(model, axis, torch.arange(7 * axis.layer))
    found = check.check(written(model, tmp_path / "out"), "transformers", older)
    assert found["version"].startswith("4.57") and found["logits_drift"] < 1e-4
