"""The method `softtopk`: what matters is found whatever the start, in every layer as much; resumed; refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from cut_off import cut_off
from transformers import PreTrainedModel

import billhook
from billhook.errors import BillhookError
from billhook.planning import gated_plan
from billhook.pruning.recipe import recipe
from billhook.reports.gate_tables import gate_rows

SMALL: dict[str, Any] = dict(
    method="softtopk", ratio=0.3, seq_len=32, samples=6, probes=3, multiple_of=4, steps=20, rate=0.3, look=False
)


def planted() -> PreTrainedModel:
    """A model of whose FFN channels every other one is hardly heard."""
    model = tiny.model("llama").eval()
    for layer in model.model.layers:
        layer.mlp.down_proj.weight.data *= torch.tensor([0.02, 6.0]).repeat(24)
    return model


def pruned(text: str, **other: Any) -> billhook.Result:
    given = {"calibration": text, **SMALL, **other}
    return billhook.prune(planted(), tokenizer=tiny.tokenizer(), **given)


def by_lot(opened: Any, recipe: Any, units: Any, *rest: Any) -> torch.Tensor:
    """A random order, where the score's is asked for."""
    draw = torch.Generator().manual_seed(recipe.calibration.seed)
    return torch.randn(len(units.prices), generator=draw, dtype=torch.float64)


def test_what_a_task_needs_is_found_from_a_random_start(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gated_plan, "scored", by_lot)
    found = pruned(text, restoration=False)
    told = found.record["softtopk"]
    assert told["taken"] == "learned" and told["unrestored"]["learned"] < 0.3 * told["unrestored"]["start"]
    assert len({cut["dropped"] for cut in found.record["cuts"]}) == 1  # of every layer as many
    assert abs(found.record["sizes"]["achieved_ratio"] - 0.3) < 0.02
    dense, kept = planted().model.layers[1].mlp.down_proj.weight, found.model.model.layers[1].mlp.down_proj.weight
    places = [int((column == dense.T).all(1).nonzero()) for column in kept.T]
    assert sum(place % 2 for place in places) > 0.8 * len(places)  # of those heard; nothing is scaled
    ((_, words),) = gate_rows(told)
    assert "nats a token before restoration" in words


def test_a_killed_prune_ends_in_the_same_bits(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = dict(layout="per_layer", axes="groups,ffn")
    whole = pruned(text, **given)
    done = cut_off(monkeypatch, 19)
    with pytest.raises(KeyboardInterrupt):
        pruned(text, **given, work=tmp_path / "run")
    again = pruned(text, **given, work=tmp_path / "run")
    assert done[0] == 19 + 4 and json.dumps(again.record["softtopk"]) == json.dumps(whole.record["softtopk"])
    pairs = zip(again.model.state_dict().values(), whole.model.state_dict().values(), strict=True)
    assert all(torch.equal(*pair) for pair in pairs)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (dict(axes="heads"), "softtopk does not prune 'heads'"),
        (dict(windows=7), "--windows 7: the calibration has 6: raise --samples"),
        (dict(heat=0), "heat"),
        (dict(allocation="sensitivity", layout="per_layer"), "softtopk has no allocation"),
    ],
)
def test_bad_settings_are_refused(given: dict[str, Any], words: str) -> None:
    with pytest.raises(BillhookError, match=words):
        recipe(**{**SMALL, **given})
