"""`billhook prune --recover-minutes`: a cut and a training as one run."""

from pathlib import Path
from typing import Any

import pytest
import tiny
from folders import CutOffError, written

from billhook.errors import BillhookError
from billhook.pruning import heal
from billhook.pruning.heal import prune_and_recover
from billhook.pruning.recipe import recipe
from billhook.recovery import setup
from billhook.reports.card import model_card
from billhook.reports.page import render


@pytest.fixture(autouse=True)
def _measured_shortly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(setup, "PACE_SECONDS", 0.0)
    for pace in ("training_pace", "answering_pace"):
        monkeypatch.setattr(setup.throughput, pace, lambda *_: 600.0)


def healed(tmp_path: Path, minutes: float = 0.03, **settings: Any) -> Any:
    if not (tmp_path / "model").exists():
        written("llama", tmp_path / "model")
        (tmp_path / "text.txt").write_text(tiny.text(3000))
    given = {"ratio": 0.3, "calibration": str(tmp_path / "text.txt"), "samples": 8, "seq_len": 24, "multiple_of": 8}
    chosen = recipe("fasp", **{**given, "look": False, **settings})
    return prune_and_recover(str(tmp_path / "model"), chosen, minutes, tmp_path / "work")


def test_one_report_has_the_cut_and_the_training(tmp_path: Path) -> None:
    result = healed(tmp_path)
    assert result.record["cuts"] and result.healing["kept_tokens"] > 0
    assert result.healing["student"] == f"{tmp_path / 'model'}, pruned"
    assert (tmp_path / "work" / "cut" / "config.json").exists()
    out = result.save(tmp_path / "out")
    assert "without training" not in model_card(result.record)
    assert (out / "report.html").exists() and render(result.page())


@pytest.mark.usefixtures("looks")
def test_the_closing_look_is_of_what_was_trained(tmp_path: Path) -> None:
    assert healed(tmp_path, look=True).record["look"]["kl"] > 0


def test_a_run_that_was_cut_off_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def cut_off(*_: Any, **__: Any) -> None:
        raise CutOffError

    with monkeypatch.context() as broken:
        broken.setattr(heal, "recover", cut_off)
        with pytest.raises(CutOffError):
            healed(tmp_path)
    with pytest.raises(BillhookError, match="differs in ratio"):
        healed(tmp_path, ratio=0.4)
    monkeypatch.setattr(heal, "prune", cut_off)  # it has been done
    with pytest.raises(BillhookError, match="too short"):
        healed(tmp_path, minutes=1e-4)
    assert healed(tmp_path).healing["kept_tokens"] > 0


@pytest.mark.parametrize(("settings", "said"), [({"minutes": -1.0}, "more than 0"), ({"minutes": 1e-4}, "too short")])
def test_what_cannot_be_is_refused(tmp_path: Path, settings: dict[str, Any], said: str) -> None:
    with pytest.raises(BillhookError, match=said):
        healed(tmp_path, **settings)


def test_zeros_are_not_filled(tmp_path: Path) -> None:
    written("llama", tmp_path / "model")
    with pytest.raises(BillhookError, match="makes zeros"):
        prune_and_recover(str(tmp_path / "model"), recipe("wanda", sparsity=0.5), 1.0, tmp_path / "work")
    assert not (tmp_path / "work").exists()
