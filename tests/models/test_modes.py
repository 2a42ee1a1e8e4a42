"""What a model does in training alone: kept out of a prune, and out of a training that learns from a teacher without
it."""

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers as T
from torch import nn

import billhook
from billhook.errors import BillhookError
from billhook.models.modes import evaluation_mode, noise
from billhook.recovery import recover

LENGTH = 16
# what a config may ask for: its own rates, by family
NOISY: dict[str, Any] = {
    "gpt2": {},
    "seed_oss": {},
    "opt": {"dropout": 0.1, "layerdrop": 0.5},
    "falcon_alibi": {"hidden_dropout": 0.1, "attention_dropout": 0.1},
    "mixtral": {"router_jitter_noise": 0.3},
}


def made(family: str) -> T.PreTrainedModel:
    """A model whose config drops or shakes something in training."""
    config = tiny.CONFIGS[family]()
    for key, rate in NOISY[family].items():
        setattr(config, key, rate)
    torch.manual_seed(0)
    return T.AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("family", [*tiny.ONE_EACH, *(f"{name}, noisy" for name in NOISY)])
def test_what_a_config_asks_for_is_what_training_does(family: str) -> None:
    name, noisy, _ = family.partition(", noisy")
    model = (made(name) if noisy else tiny.model(name)).train()
    ids = tiny.tokens(4, LENGTH)
    with torch.no_grad():
        same = torch.equal(model(ids).logits, model(ids).logits)
    assert same == (not noise(model.config)), noise(model.config)
    assert bool(noise(model.config)) >= bool(noisy)


def test_every_module_is_given_back_in_its_mode() -> None:
    model = made("gpt2").train()
    model.lm_head.eval()
    with evaluation_mode(model):
        assert not any(module.training for module in model.modules())
        model.transformer.h[0].mlp.act = nn.GELU().train(False)
    assert model.transformer.h[0].mlp.act.training and not model.lm_head.training
    model.lm_head.train()
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize(
    ("family", "asked"),
    [
        ("gpt2", {"method": "fasp", "ratio": 0.2, "multiple_of": 2}),
        ("opt", {"method": "wanda", "sparsity": 0.5}),
        ("mixtral", {"method": "experts", "ratio": 0.2}),
    ],
)
def test_a_model_in_train_mode_is_pruned_as_it_is_judged(
    family: str, asked: dict[str, Any], text_file: Path, tmp_path: Path
) -> None:
    found = []
    for training in (False, True):
        given = {"tokenizer": tiny.tokenizer(), "calibration": str(text_file), "samples": 4, "seq_len": LENGTH}
        result = billhook.prune(made(family).train(training), **{"method": "fasp", **given, **asked})
        assert {module.training for module in result.model.modules()} == {training}
        result.save(tmp_path / str(training))
        found.append(result.model.state_dict())
    assert all(torch.equal(value, found[1][key]) for key, value in found[0].items())


def test_a_model_that_cannot_be_pruned_is_given_back_in_its_mode(text_file: Path) -> None:
    model = made("gpt2").train()
    with pytest.raises(BillhookError):
        billhook.prune(
            model, method="fasp", tokenizer=tiny.tokenizer(), ratio=0.2, calibration=str(text_file), seq_len=10**6
        )
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("family", ["gpt2", "seed_oss", "opt"])
@pytest.mark.covering(some={"family": 2})
def test_a_recovery_has_no_dropout_unless_it_is_asked_for(family: str, text_file: Path, tmp_path: Path) -> None:
    model = made(family)
    model.save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    before, losses = json.loads((tmp_path / "model" / "config.json").read_text()), {}
    said: dict[bool, list[str]] = {False: [], True: []}
    for dropout, lines in said.items():
        found = recover.recover(
            tmp_path / "model",
            teacher=str(tmp_path / "model"),
            text=(str(text_file),),
            held_out=(),
            guard=False,
            **{"tokens": LENGTH, "seq_len": LENGTH, "top_k": 258, "lr": 1e-4, "device": "cpu", "precision": "float32"},
            dropout=dropout,
            lessons=tmp_path / "lessons",
            announce=lines.append,
        )
        losses[dropout] = found.healing["losses"][0]
    assert abs(losses[False]) < 1e-5 < 1e-4 < losses[True]  # its own teacher: what is left is the dropout
    (line,) = [line for line in said[False] if "--dropout" in line]
    assert all(f"{key} {rate:g}" in line for key, rate in noise(model.config).items())
    assert not any("--dropout" in line for line in said[True])
    found.save(tmp_path / "out")
    after = json.loads((tmp_path / "out" / "config.json").read_text())
    assert {key: after.get(key) for key in noise(model.config)} == {key: before[key] for key in noise(model.config)}
