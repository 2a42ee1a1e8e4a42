"""Layers that are one thing each: an FFN, a mixture, attention or Mamba (Nemotron-H)."""

from pathlib import Path

import tiny
import torch

from billhook.checkpoints import save, verify
from billhook.models import surgery
from billhook.models.axes import axes, refusal
from billhook.models.experts import fuse, unfuse
from billhook.models.families import check_known, linears

KINDS = ("linear_attention", "mlp", "full_attention", "moe", "mlp")
IDS = tiny.tokens()


def test_ffns_and_experts_between_other_layers(tmp_path: Path) -> None:
    """Channels of all go, in a model whose experts work on a latent; then all layers that are an FFN."""
    model = tiny.model("nemotron_h", kinds=KINDS, moe_latent_size=12, mlp_bias=False)
    unfuse(model)
    check_known(model)
    assert [len(linears(model, n)) for n in (0, 1, 2)] == [0, 2, 0]
    zeroed = tiny.model("nemotron_h", kinds=KINDS, moe_latent_size=12, mlp_bias=False)
    unfuse(zeroed)
    for axis in axes(model, ("ffn", "expert_ffn", "shared")):
        surgery.zero(zeroed, axis, torch.arange(8))
        surgery.remove(model, axis, torch.arange(8))
    torch.testing.assert_close(model(IDS).logits, zeroed(IDS).logits)
    with surgery.without(model, [], [1, 4]):
        skipped = model(IDS).logits
    surgery.drop_layers(model, [1, 4])
    assert torch.equal(model(IDS).logits, skipped)
    assert model.config.layer_types == ["linear_attention", "full_attention", "moe"]
    fuse(model)
    save.save(model, tiny.tokenizer(), tmp_path, None)
    assert verify.verify(tmp_path, model)["cache_drift"] < 1e-5


def test_a_model_without_a_mixture_says_so() -> None:
    model = tiny.model("nemotron_h", kinds=("linear_attention", "mlp", "full_attention"))
    assert refusal(model, "experts", "uniform") == "only mixtures of experts have that axis, and it is dense"
    assert not refusal(model, "ffn", "uniform") and "all its FFNs" in refusal(
        tiny.model("nemotron_h"), "ffn", "uniform"
    )
