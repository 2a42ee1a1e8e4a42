"""The default method: what it tries, what it takes, and that what comes out is as large as asked for."""

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from folders import CutOffError

import billhook
from billhook.errors import BillhookError
from billhook.methods.rivals import RIVALS, best
from billhook.models.families import layers
from billhook.planning.sensitivity import Probe
from billhook.reports.cut_tables import cut_rows
from billhook.training import refinement


def prune(model: Any, text: Path, **settings: Any) -> Any:
    given = {"ratio": 0.3, "calibration": str(text), "samples": 8, "probes": 4, "seq_len": 24, "multiple_of": 8}
    return billhook.prune(model, method="auto", tokenizer=tiny.tokenizer(), quiet=True, **{**given, **settings})


def deep(family: str = "llama", total: int = 6) -> Any:
    return tiny.model(family, num_hidden_layers=total)


@pytest.mark.parametrize(
    ("losses", "name"),
    [
        ({"simple": [1.0, 1.1, 0.9], "better": [0.5, 0.6, 0.4]}, "better"),
        ({"simple": [1.0, 1.1, 0.9], "same": [1.01, 1.08, 0.89]}, "simple"),
        ({"worse": [2.0, 2.1, 1.9], "noisy": [1.0, 1.2, 0.8], "least": [0.9, 1.3, 0.75]}, "noisy"),
        ({"simple": [1.0], "better": [0.9]}, "better"),
    ],
)
def test_the_simplest_that_is_not_worse_by_two_errors_wins(losses: dict[str, list[float]], name: str) -> None:
    assert best(losses) == name


def test_layers_that_add_nothing_go_whole(text_file: Path) -> None:
    model = deep()
    for n in (2, 3):
        for param in layers(model)[n].parameters():
            param.data *= 0
    result = prune(model, text_file, ratio=1 / 3)
    assert result.record["auto"]["chosen"] == "whole layers" and result.record["dropped_layers"] == [2, 3]


def test_the_winner_diverges_least_of_what_was_tried(text_file: Path) -> None:
    for effort, count in (("quick", 1), ("normal", 2)):
        auto = prune(deep(), text_file, ratio=1 / 3, effort=effort, refine=False).record["auto"]
        assert len(auto["tried"]) == (count if count > 1 else 0)
        if auto["tried"]:
            assert auto["tried"][auto["chosen"]] <= 1.5 * min(auto["tried"].values())


@pytest.mark.parametrize("ratio", [0.1, 0.25, 0.4])
def test_whole_layers_and_widths_meet_a_budget_together(text_file: Path, ratio: float) -> None:
    result = prune(deep(total=8), text_file, ratio=ratio, effort="quick", multiple_of=2)
    size = result.record["sizes"]
    assert abs(size["achieved_ratio"] - ratio) < 0.02


@pytest.mark.parametrize("axes", [("ffn",), ("layers",), ("ffn", "layers")])
def test_axes_say_what_may_go(text_file: Path, axes: tuple[str, ...]) -> None:
    result = prune(deep(), text_file, ratio=1 / 3, axes=axes)
    assert ("layers" in axes) or not result.record["dropped_layers"]
    assert ("ffn" in axes) or not any(cut["dropped"] for cut in result.record["cuts"])


def test_what_no_rival_can_give_is_refused_in_one_line(text_file: Path) -> None:
    with pytest.raises(BillhookError) as error:
        prune(deep(), text_file, axes=("heads",))
    assert "\n" not in str(error.value) and "axes" in str(error.value)
    with pytest.raises(BillhookError, match="leave out allocation"):
        prune(deep(), text_file, allocation="sensitivity", layout="per_layer")


def test_refinement_can_be_left_out(text_file: Path) -> None:
    refined, plain = (prune(deep(), text_file, ratio=1 / 3, effort="quick", refine=on) for on in (True, False))
    assert "refined" not in plain.record and refined.record["refined"]
    assert any("refined" in name for name, _ in cut_rows(refined.record))
    assert any(
        not torch.equal(a, b) for a, b in zip(refined.model.parameters(), plain.model.parameters(), strict=True)
    ) == any(one["kept"] for one in refined.record["refined"])


def test_the_same_prune_is_made_twice(text_file: Path) -> None:
    first, second = (prune(deep(), text_file, ratio=1 / 3) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first.model.parameters(), second.model.parameters(), strict=True))


def test_what_was_tried_is_not_tried_again_after_a_kill(
    text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cut_off(*_: Any) -> None:
        raise CutOffError

    work = tmp_path / "work"
    with monkeypatch.context() as broken:
        broken.setattr(refinement, "refine", cut_off)
        with pytest.raises(CutOffError):
            prune(deep(), text_file, ratio=1 / 3, work=work)
    with pytest.raises(BillhookError, match="differs in ratio"):
        prune(deep(), text_file, ratio=0.5, work=work)
    monkeypatch.setattr(Probe, "divergences_of", cut_off)
    again = prune(deep(), text_file, ratio=1 / 3, work=work)
    monkeypatch.undo()
    plain = prune(deep(), text_file, ratio=1 / 3)
    assert again.record["auto"] == plain.record["auto"]
    assert all(torch.equal(a, b) for a, b in zip(again.model.parameters(), plain.model.parameters(), strict=True))


def test_every_rival_says_what_it_cuts_once() -> None:
    assert len({one.name for one in RIVALS}) == len(RIVALS)
    assert all(one.kinds and one.layouts for one in RIVALS)
