"""The method `mlpruning`: layers that matter learn to keep more; cut as it was trained; resumed; refused."""

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
from billhook.reports.gate_tables import share_rows
from billhook.runtime.run import Run
from billhook.training.adapting import merge
from billhook.training.gating import Units, gated

SMALL: dict[str, Any] = dict(
    method="mlpruning", ratio=0.3, seq_len=32, samples=6, multiple_of=4, steps=20, settling=4, rank=2, look=False
)
UNEVEN: dict[str, Any] = dict(layout="per_layer")


def pruned(text: str, **other: Any) -> billhook.Result:
    given = {"calibration": text, **SMALL, **other}
    return billhook.prune(tiny.uneven(), tokenizer=tiny.tokenizer(), **given)


def test_layers_that_matter_keep_more_which_beats_equal_widths(text: str) -> None:
    learned, equal = pruned(text, **UNEVEN), pruned(text)
    first, second, last = learned.record["mlpruning"]["shares"]["ffn"]
    assert second - max(first, last) > 0.1 and len(set(equal.record["mlpruning"]["shares"]["ffn"])) == 1
    dropped = [cut["dropped"] for cut in learned.record["cuts"]]
    assert dropped[1] < 0.5 * min(dropped[0], dropped[2])
    assert abs(learned.record["sizes"]["achieved_ratio"] - 0.3) < 0.02
    ends = [sum(one.record["mlpruning"]["losses"][-4:]) for one in (learned, equal)]
    assert ends[0] < 0.7 * ends[1]
    ((_, words),) = share_rows(learned.record["mlpruning"])
    assert "of 24 steps" in words and "of FFN channels" in words


@pytest.mark.parametrize("shape", [dict(axes="heads,ffn", **UNEVEN), dict(axes="groups,ffn")])
def test_the_cut_is_the_gated_model_with_its_adapters(shape: dict[str, Any]) -> None:
    model, chosen, windows = tiny.uneven(), recipe(**SMALL, **shape), tiny.tokens(6, 24)
    texts = Texts(windows, windows[:0])
    planned = METHODS["mlpruning"].plan(Opened(model, None, "tiny", None, torch.float32), chosen, texts, Run())
    trained = tiny.uneven()
    units, stays = Units.of(trained, chosen.kinds), []
    for axis in units.axes:
        place = axis.layer, axis.kind
        ranks = planned.scores[place].view(axis.blocks, -1).argsort(dim=1, stable=True).argsort(dim=1)
        stays.append((ranks >= planned.plan.drops[place] // axis.blocks).flatten().double())
    merge(trained, planned.settings.updates)
    with torch.no_grad(), gated(trained, units, torch.cat(stays)):
        wanted = trained(tiny.tokens()).logits
    METHODS["mlpruning"].carry_out(model, texts, planned, Run())
    with torch.no_grad():
        assert torch.allclose(model(tiny.tokens()).logits, wanted, atol=1e-4)


def test_a_killed_prune_ends_in_the_same_bits(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = pruned(text, **UNEVEN)
    for at in (18, 6):  # while shares are learned, and then, of the 4 that are left and 4 more, while adapters settle
        cut_off(monkeypatch, at)
        with pytest.raises(KeyboardInterrupt):
            pruned(text, **UNEVEN, work=tmp_path / "run")
        monkeypatch.undo()
    again = pruned(text, **UNEVEN, work=tmp_path / "run")
    assert json.dumps(again.record["mlpruning"]) == json.dumps(whole.record["mlpruning"])
    pairs = zip(again.model.state_dict().values(), whole.model.state_dict().values(), strict=True)
    assert all(torch.equal(*pair) for pair in pairs)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (dict(axes="value", layout="per_layer"), "mlpruning does not prune 'value'"),
        (dict(windows=7), "--windows 7: the calibration has 6: raise --samples"),
        (dict(settling=-1), "settling"),
        (dict(rank=0), "rank"),
        (dict(score="best"), "unknown score 'best'"),
        (dict(allocation="sensitivity", layout="per_layer"), "mlpruning has no allocation"),
    ],
)
def test_bad_settings_are_refused(given: dict[str, Any], words: str) -> None:
    with pytest.raises(BillhookError, match=words):
        recipe(**{**SMALL, **given})
