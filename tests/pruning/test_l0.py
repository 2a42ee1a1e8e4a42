"""The method `l0`: held to its budget, cut as it was trained; resumed; refused."""

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
from billhook.math import hard_concrete
from billhook.methods import METHODS
from billhook.planning.texts import Texts
from billhook.pruning.recipe import recipe
from billhook.reports.gate_tables import held_rows
from billhook.runtime.run import Run
from billhook.training.adapting import merge
from billhook.training.gating import DECAYS, Units, gated
from billhook.training.l0_gates import HardConcrete

SMALL: dict[str, Any] = dict(
    method="l0", ratio=0.3, seq_len=32, samples=6, multiple_of=4, steps=20, rank=2, look=False, layout="per_layer"
)


def pruned(text: str, **other: Any) -> billhook.Result:
    given = {"calibration": text, **SMALL, **other}
    return billhook.prune(tiny.model("llama"), tokenizer=tiny.tokenizer(), **given)


def test_multipliers_hold_what_is_expected_to_go_and_costly_units_stay() -> None:
    """On a loss that is a sum over units, in place of a model's: within half a percent of the decoder's ratio."""
    model = tiny.model("llama")
    units = Units.of(model, ("ffn",))
    goal = units.goal({(n, "ffn"): 16 for n in range(3)}, apart=False)
    cost = torch.arange(144, dtype=torch.float64) / 1000
    learner = HardConcrete(goal, [], 512, (1.0, 0.0), seed=0)
    optimizer = torch.optim.Adam(learner.groups(), betas=DECAYS)
    for step in range(512):
        optimizer.zero_grad()
        ((1 - learner.gates(step)) @ cost + learner.penalty(step)).backward()
        optimizer.step()
    log_alpha = learner.log_alpha.detach()
    assert float(hard_concrete.excess(log_alpha, goal, 1.0).abs()) < 0.03
    assert log_alpha[96:].mean() > log_alpha[:48].mean() + 2


@pytest.mark.parametrize("shape", [dict(axes="groups,ffn", rank=0), dict(layout="uniform", rank=2)])
def test_the_cut_is_the_gated_model_with_its_adapters(shape: dict[str, Any]) -> None:
    model, windows = tiny.model("llama").eval(), tiny.tokens(6, 24)
    chosen, texts = recipe(**{**SMALL, **shape}), Texts(windows, windows[:0])
    planned = METHODS["l0"].plan(Opened(model, None, "tiny", None, torch.float32), chosen, texts, Run())
    units, trained = Units.of(model, chosen.kinds), tiny.model("llama").eval()
    assert bool(planned.settings.updates) == bool(chosen.settings.rank)
    merge(trained, planned.settings.updates)
    stays = torch.cat(
        [
            planned.scores[place].argsort(stable=True).argsort() >= planned.plan.drops[place]
            for place in ((axis.layer, axis.kind) for axis in units.axes)
        ]
    )
    with torch.no_grad(), gated(trained, units, stays * units.joined(planned.settings.scales)):
        wanted = trained(tiny.tokens()).logits
    METHODS["l0"].carry_out(model, texts, planned, Run())
    with torch.no_grad():
        assert torch.allclose(model(tiny.tokens()).logits, wanted, atol=1e-4)


def test_a_killed_prune_ends_in_the_same_bits(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = pruned(text)
    assert abs(whole.record["sizes"]["achieved_ratio"] - 0.3) < 0.01  # whatever was expected to go
    ((_, words),) = held_rows(whole.record["l0"])
    assert "of the gated parameters" in words

    done = cut_off(monkeypatch, 19)
    with pytest.raises(KeyboardInterrupt):
        pruned(text, work=tmp_path / "run")
    again = pruned(text, work=tmp_path / "run")
    assert done[0] == 19 + 4 and json.dumps(again.record["l0"]) == json.dumps(whole.record["l0"])
    pairs = zip(again.model.state_dict().values(), whole.model.state_dict().values(), strict=True)
    assert all(torch.equal(*pair) for pair in pairs)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (dict(axes="heads"), "l0 does not prune 'heads'"),
        (dict(windows=7), "--windows 7: the calibration has 6: raise --samples"),
        (dict(steps=9), "steps"),
        (dict(rank=-1), "rank"),
        (dict(allocation="sensitivity"), "l0 has no allocation"),
    ],
)
def test_bad_settings_are_refused(given: dict[str, Any], words: str) -> None:
    with pytest.raises(BillhookError, match=words):
        recipe(**{**SMALL, **given})
