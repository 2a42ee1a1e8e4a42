"""LoRC: the cache that is asked for, and which layers keep how much of it."""

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

import billhook
from billhook.errors import BillhookError
from billhook.math.condition import condition, depths
from billhook.models import sizes
from billhook.models.families import attention
from billhook.models.plan import Plan

SETTINGS: dict[str, Any] = dict(method="lorc", layout="per_layer", samples=10, seq_len=32, look=False)
DEEP: dict[str, Any] = dict(num_hidden_layers=5, head_dim=16)


def narrowed(text: Path, **more: Any) -> Any:
    model = tiny.model("llama", **DEEP)
    return billhook.prune(
        model, tokenizer=tiny.tokenizer(), calibration=str(text), **{**SETTINGS, "kv": 0.75, **more}
    ).model


def kept(model: Any) -> list[int]:
    return [attention(model, n).value_dim for n in range(5)]


@pytest.mark.parametrize("more", [{}, {"rule": "uniform"}, {"allocation": "sensitivity", "probes": 2}])
def test_the_cache_is_as_large_as_was_asked_for(more: dict[str, Any], text_file: Path) -> None:
    model = narrowed(text_file, **more)
    share = sizes.kv_cache_entries(model, Plan(), 64, 1) / sizes.kv_cache_entries(
        tiny.model("llama", **DEEP), Plan(), 64, 1
    )
    assert share == pytest.approx(0.75, abs=0.5 / 16)
    if more.get("rule") == "uniform":
        assert kept(model) == [8] * 5
    elif not more:
        assert kept(model) == sorted(kept(model), reverse=True) and kept(model)[0] > 8 > kept(model)[-1]


def test_ranks_fall_as_condition_numbers_say() -> None:
    assert depths([2.0] * 5) == pytest.approx([0.0, 0.25, 0.5, 0.75, 1.0])
    assert depths([1.0] * 3) == [0.0] * 3
    worst_last = depths([2.0, 2.0, 64.0, 1.0])
    assert worst_last == sorted(worst_last) and worst_last[2] < 0.3 and worst_last[3] == 1.0
    W = torch.diag(torch.tensor([8.0, 4.0, 2.0]))
    assert condition(W) == pytest.approx(4.0) and condition(W * 0) == 1.0
    assert condition(torch.diag(torch.tensor([1.0, 0.0]))) == pytest.approx(1e6)


def test_what_cannot_be_is_refused(text_file: Path) -> None:
    for more, why in (
        ({"layout": "uniform"}, "holds: use layout per_layer"),
        ({"kv": 0.4}, "40.0% of the KV cache is below the smallest possible"),
        ({"rule": "uniform", "allocation": "sensitivity"}, "both say which layers keep how much"),
        ({"kv": None}, "no budget"),
    ):
        with pytest.raises(BillhookError, match=why):
            narrowed(text_file, **more)
