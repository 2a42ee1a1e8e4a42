"""The method `gates`: what comes of it on a tiny model of uneven layers, cut and folded; resumed; refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

import billhook
from billhook.checkpoints.load import Opened
from billhook.errors import BillhookError
from billhook.methods import METHODS
from billhook.models import sizes
from billhook.planning.texts import Texts
from billhook.pruning.recipe import recipe
from billhook.reports.gate_tables import gate_rows
from billhook.runtime.run import Run
from billhook.training import gating
from billhook.training.gating import Units, gated

SMALL: dict[str, Any] = dict(
    method="gates", ratio=0.3, seq_len=32, samples=6, probes=3, multiple_of=4, steps=20, rate=0.2, look=False
)


def pruned(text: str, **other: Any) -> billhook.Result:
    given = {"calibration": text, **SMALL, **other}
    return billhook.prune(tiny.uneven(), tokenizer=tiny.tokenizer(), **given)


def test_layers_that_matter_keep_more_and_the_budget_is_met(text: str) -> None:
    found = pruned(text, layout="per_layer")
    dropped = {cut["layer"]: cut["dropped"] for cut in found.record["cuts"]}
    told = found.record["gates"]
    assert dropped[1] < 16 < dropped[0] and told["taken"] == "learned"
    assert told["unrestored"]["learned"] < 0.5 * told["unrestored"]["start"] and len(told["losses"]) == 20
    assert abs(found.record["sizes"]["achieved_ratio"] - 0.3) < 0.01
    json.dumps(told, allow_nan=False)
    ((_, words),) = gate_rows(told)
    assert "nats a token before restoration" in words


def test_equal_widths_choose_units_within_layers(text: str) -> None:
    found = pruned(text, axes="groups,ffn")
    assert len({(cut["kind"], cut["dropped"]) for cut in found.record["cuts"]}) == 2
    assert found.model.config.intermediate_size < 48


@pytest.mark.parametrize("scaling", [0, 8])
def test_the_cut_is_the_gated_model(scaling: int) -> None:
    """The gates at 0, and at 1 or what was learned as scales, and what is left after the cut put out the same."""
    model, windows = tiny.uneven(), tiny.tokens(9, 24)
    chosen = recipe(**SMALL, layout="per_layer", axes="groups,ffn", restoration=False, scaling=scaling)
    texts = Texts(windows[:6], windows[6:])
    opened = Opened(model, None, "tiny", None, torch.float32)
    planned = METHODS["gates"].plan(opened, chosen, texts, Run())
    units = Units.of(model, chosen.kinds)
    stays = torch.cat(
        [
            planned.scores[place].argsort().argsort() >= planned.plan.drops[place]
            for place in ((axis.layer, axis.kind) for axis in units.axes)
        ]
    ).double()
    scales = units.joined(planned.settings.scales) if scaling else torch.ones_like(stays)
    assert bool(scaling) == bool((scales != 1).any())
    before = sizes.decoder_parameters(model)
    with torch.no_grad(), gated(model, units, stays * scales):
        wanted = model(tiny.tokens()).logits
    METHODS["gates"].carry_out(model, texts, planned, Run())
    with torch.no_grad():
        assert torch.allclose(model(tiny.tokens()).logits, wanted, atol=1e-4)
    assert sizes.decoder_parameters(model) == before - sum(
        axis.price(tiny.uneven()) * planned.plan.drops[axis.layer, axis.kind] for axis in units.axes
    )


def test_a_killed_prune_ends_in_the_same_bits(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = dict(layout="per_layer", restoration=False, scaling=4)
    whole, real, done = pruned(text, **given), gating._loss, [0]

    def killed(*given: Any) -> torch.Tensor:
        done[0] += 1
        if done[0] in (18, 25):  # while units are learned, and while scales are
            raise KeyboardInterrupt
        return real(*given)

    monkeypatch.setattr(gating, "_loss", killed)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            pruned(text, **given, work=tmp_path / "run")
    again = pruned(text, **given, work=tmp_path / "run")
    assert json.dumps(again.record["gates"]) == json.dumps(whole.record["gates"])
    pairs = zip(again.model.state_dict().values(), whole.model.state_dict().values(), strict=True)
    assert all(torch.equal(*pair) for pair in pairs)
    with pytest.raises(BillhookError, match="differs in rate"):
        pruned(text, **{**given, "rate": 0.1}, work=tmp_path / "run")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (dict(axes="heads"), "gates does not prune 'heads'"),
        (dict(allocation="sensitivity", layout="per_layer"), "gates has no allocation"),
        (dict(way="hard"), "unknown way 'hard'"),
        (dict(windows=7), "--windows 7: the calibration has 6: raise --samples"),
        (dict(scaling=5), "--scaling learns what restoration solves for: give --no-restoration with it"),
        (dict(steps=0), "steps"),
        (dict(rate=0), "rate"),
    ],
)
def test_bad_settings_are_refused(given: dict[str, Any], words: str) -> None:
    with pytest.raises(BillhookError, match=words):
        recipe(**{**SMALL, **given})
