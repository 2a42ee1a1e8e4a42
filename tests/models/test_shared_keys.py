"""Layers that take keys and values from earlier ones, and attention of several sizes (Gemma 4): what has to stay."""

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from tiny import FULL, SLIDING

import billhook
from billhook.calibration.forward import enter
from billhook.checkpoints import save, verify
from billhook.errors import BillhookError
from billhook.models import surgery
from billhook.models.axes import refusal
from billhook.models.vocabulary import trim

SHARED: dict[str, Any] = dict(  # layers 0 and 1 give, 3 and 5 take from 1, 2 and 4 from 0
    num_hidden_layers=6,
    kinds=(SLIDING, FULL) * 3,
    num_kv_shared_layers=4,
    use_double_wide_mlp=True,
)
IDS = tiny.tokens()


@pytest.mark.parametrize("gone", [(3,), (2, 3), (2, 3, 4)])
def test_layers_that_take_can_go(gone: tuple[int, ...], tmp_path: Path) -> None:
    model = tiny.model("gemma4_text", **SHARED)
    with surgery.without(model, [], gone):
        skipped = model(IDS).logits
    surgery.drop_layers(model, gone)
    torch.testing.assert_close(model(IDS).logits, skipped, rtol=1e-5, atol=1e-5)
    assert model.config.num_kv_shared_layers == 4 - len(gone)
    assert model.model.embed_tokens_per_layer.weight.shape[1] == 4 * (6 - len(gone))
    save.save(model, tiny.tokenizer(), tmp_path, None)
    assert verify.verify(tmp_path, model)["cache_drift"] < 1e-5


REFUSED = {
    "what others take from": ((1,), "layer 1 would go: later layers take its keys and values"),
    "the last of full attention": ((5,), "layer 4 is of type sliding_attention, which its config does not let it be"),
}


@pytest.mark.parametrize(("gone", "words"), REFUSED.values(), ids=list(REFUSED))
def test_layers_that_have_to_stay(gone: tuple[int, ...], words: str) -> None:
    model = tiny.model("gemma4_text", **SHARED)
    with pytest.raises(BillhookError, match=words):
        surgery.drop_layers(model, gone)
    assert len(model.model.layers) == 6


def test_widths_that_one_key_says_twice_are_refused() -> None:
    assert "twice as wide" in refusal(tiny.model("gemma4_text", **SHARED), "ffn", "uniform")
    assert not refusal(tiny.model("gemma4_text"), "ffn", "uniform")


def test_layers_by_position_go_and_measured_ones_are_refused(tmp_path: Path) -> None:
    (folder := tmp_path / "shared").mkdir()
    save.save(tiny.model("gemma4_text", **SHARED), tiny.tokenizer(), folder, None)
    out = billhook.prune(folder, method="layerchop", preset="output", ratio=0.2).save(tmp_path / "out")
    assert billhook.load(out).config.layer_types == [SLIDING, FULL, SLIDING, FULL, FULL]
    with pytest.raises(BillhookError, match="take keys and values from earlier ones"):
        enter(tiny.model("gemma4_text", **SHARED), [IDS])


def test_tokens_that_are_embedded_twice_stay() -> None:
    with pytest.raises(BillhookError, match="it embeds every token once more for its layers"):
        trim(tiny.model("gemma4_text"), tiny.tokenizer(), ["words"])


def test_one_matrix_of_keys_and_values_and_experts_beside_the_ffn(tmp_path: Path) -> None:
    mixed = dict(enable_moe_block=True, num_experts=4, top_k_experts=2, moe_intermediate_size=16)
    alike = dict(attention_k_eq_v=True, num_global_key_value_heads=1, hidden_size_per_layer_input=0)
    model = tiny.model("gemma4_text", **mixed, **alike)
    assert "beside an FFN" in refusal(model, "experts", "uniform")
    with surgery.without(model, [], [1]):
        skipped = model(IDS).logits
    surgery.drop_layers(model, [1])
    assert torch.equal(model(IDS).logits, skipped)
    save.save(model, tiny.tokenizer(), tmp_path, None)
    assert verify.verify(tmp_path, model)["logits"] == "equal"
