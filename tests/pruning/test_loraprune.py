"""The method `loraprune`: what is left is what was trained with gates at 0 and 1; resumed; refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from cut_off import cut_off

import billhook
from billhook.checkpoints.load import Opened
from billhook.errors import BillhookError
from billhook.methods import METHODS
from billhook.planning.texts import Texts
from billhook.pruning.recipe import recipe
from billhook.reports.gate_tables import closing_rows
from billhook.runtime.run import Run
from billhook.training.adapting import merge
from billhook.training.gating import Units, gated

SMALL: dict[str, Any] = dict(
    method="loraprune", ratio=0.2, seq_len=32, samples=6, multiple_of=4, steps=20, rate=0.01, rank=2, look=False
)


def pruned(text: str, **other: Any) -> billhook.Result:
    given = {"calibration": text, **SMALL, **other}
    return billhook.prune(tiny.model("llama"), tokenizer=tiny.tokenizer(), **given)


@pytest.mark.parametrize(
    "shape", [dict(axes="heads,ffn"), dict(axes="groups,ffn", layout="per_layer", allocation="skip:1,0")]
)
def test_the_cut_is_the_gated_model_with_its_adapters(shape: dict[str, Any]) -> None:
    model, chosen, windows = tiny.model("llama").eval(), recipe(**SMALL, **shape), tiny.tokens(6, 24)
    texts = Texts(windows, windows[:0])
    opened = Opened(model, None, "tiny", None, torch.float32)
    planned = METHODS["loraprune"].plan(opened, chosen, texts, Run())
    units, trained = Units.of(model, chosen.kinds), tiny.model("llama").eval()
    merge(trained, planned.settings.updates)
    mask = (units.joined(planned.scores) > 0).double()
    assert int((mask == 0).sum()) == sum(planned.plan.drops.values())
    with torch.no_grad(), gated(trained, units, mask):
        wanted = trained(tiny.tokens()).logits
    METHODS["loraprune"].carry_out(model, texts, planned, Run())
    with torch.no_grad():
        assert torch.allclose(model(tiny.tokens()).logits, wanted, atol=1e-4)


def test_a_killed_prune_ends_in_the_same_bits(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = pruned(text)
    assert abs(whole.record["sizes"]["achieved_ratio"] - 0.2) < 0.02

    done = cut_off(monkeypatch, 19)
    with pytest.raises(KeyboardInterrupt):
        pruned(text, work=tmp_path / "run")
    again = pruned(text, work=tmp_path / "run")
    assert done[0] == 19 + 4 and json.dumps(again.record["loraprune"]) == json.dumps(whole.record["loraprune"])
    pairs = zip(again.model.state_dict().values(), whole.model.state_dict().values(), strict=True)
    assert all(torch.equal(*pair) for pair in pairs)
    ((_, words),) = closing_rows(whole.record["loraprune"])
    assert "of 20 steps" in words
    other = pruned(text, shuffled=True)
    assert other.record["loraprune"]["losses"] != whole.record["loraprune"]["losses"]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (dict(axes="value", layout="per_layer"), "loraprune does not prune 'value'"),
        (dict(windows=7), "--windows 7: the calibration has 6: raise --samples"),
        (dict(steps=9), "steps"),
        (dict(rank=0), "rank"),
        (dict(objective="ce"), "unknown objective 'ce'"),
        (dict(allocation="skip:1,0"), "the uniform layout cannot hold"),
    ],
)
def test_bad_settings_are_refused(given: dict[str, Any], words: str) -> None:
    with pytest.raises(BillhookError, match=words):
        recipe(**{**SMALL, **given})
