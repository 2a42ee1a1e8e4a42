"""Rows that are derived: what is proved on a small model of a type is offered; the rest is refused with a reason."""

import copy
import json
from dataclasses import replace

import derived_types
import pytest
import torch
from transformers import AutoModelForCausalLM

from billhook.checkpoints.gguf.write import shape_of
from billhook.errors import BillhookError
from billhook.models import families, proof
from billhook.models.axes import axes
from billhook.models.derive import built, derived
from billhook.models.families import row_of
from billhook.models.shrink import default, shrunk
from billhook.models.surgery import drop_layers

KEPT = json.loads(derived_types.FILE.read_text())["types"]


@pytest.mark.covering(some={"model_type": 2})
@pytest.mark.parametrize("model_type", derived_types.SAMPLE)
def test_what_is_said_of_a_type_is_proved(model_type: str) -> None:
    assert derived_types.row_of(model_type) == KEPT[model_type]


@pytest.mark.slow
@pytest.mark.parametrize("model_type", derived_types.TYPES)
def test_what_is_said_of_every_type_is_proved(model_type: str) -> None:
    assert derived_types.tried(model_type) == KEPT[model_type]


def test_a_wrong_row_is_not_proved(monkeypatch: pytest.MonkeyPatch) -> None:
    """Writers that are not all of them: what is removed is not what was silenced."""
    monkeypatch.setattr(proof, "derived", lambda config, fused=True: replace(derived(config), up=("mlp.up_proj",)))
    row = proof.proved(default("gemma"))
    assert "ffn" not in proof.offered(row) and "layers" in proof.offered(row)


def test_a_key_that_sizes_something_else_is_not_proved(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = {"width": "max_position_embeddings"}
    monkeypatch.setattr(proof, "derived", lambda config, fused=True: replace(derived(config), keys=wrong))
    assert "ffn" not in proof.offered(proof.proved(default("gemma")))


def test_a_row_is_of_the_process_and_by_hand_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(families, "DERIVED", {})
    proof.ensure({"model_type": "llama"})
    assert not families.DERIVED
    small = shrunk(default("gemma"))
    proof.ensure(small.to_dict())
    model = AutoModelForCausalLM.from_config(small).eval()
    assert row_of(model).derived and len(axes(model, ("ffn",))) == small.num_hidden_layers
    before = model.config.num_hidden_layers
    drop_layers(model, [1])
    assert model.config.num_hidden_layers == before - 1


def test_all_layers_of_one_type_do_not_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(families, "DERIVED", {})
    small = shrunk(default("qwen3_5_text"))
    proof.ensure(small.to_dict())
    model = AutoModelForCausalLM.from_config(small)
    full = [n for n, kind in enumerate(small.layer_types) if kind == "full_attention"]
    with pytest.raises(BillhookError, match="all layers of type full_attention"):
        drop_layers(copy.deepcopy(model), full)


def test_no_gguf_is_written_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(families.DERIVED, "gemma", derived(shrunk(default("gemma"))))
    with pytest.raises(BillhookError, match="no GGUF is written of gemma, whose row is derived"):
        shape_of(built(shrunk(default("gemma"))))


def test_what_has_no_decoder_layers_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(families, "DERIVED", {})
    with pytest.raises(BillhookError, match="none can be derived: it is an encoder"):
        proof.ensure(default("bert").to_dict())


def test_randomness_is_left_as_it_was() -> None:
    before = torch.get_rng_state()
    derived_types.row_of("gemma")
    assert torch.equal(before, torch.get_rng_state())
