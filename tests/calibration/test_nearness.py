"""How near a cut model is to the unpruned one: what is kept of that is as good as its logits."""

import pytest
import tiny
import torch

from billhook.calibration.nearness import EVERY, Standard


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "qwen3_moe"])
def test_nearness_is_the_divergence_of_each_window(family: str) -> None:
    """Against both models' logits at every second position."""
    model, other, windows = tiny.model(family), tiny.model(family, seed=5), tiny.tokens(3)
    standard = Standard(model, windows)
    with torch.no_grad():
        p, q = (one(windows).logits[:, ::EVERY].double().log_softmax(-1) for one in (model, other))
    expected = (p.exp() * (p - q)).sum(-1).mean(-1)
    assert standard.divergences(other) == pytest.approx(expected.tolist(), rel=1e-3)
    assert standard.divergences(model) == pytest.approx([0, 0, 0], abs=1e-6)
    assert expected.min() > 0 and len(standard.states) == 3
