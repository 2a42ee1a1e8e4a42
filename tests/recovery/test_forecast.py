"""`billhook forecast`: what minutes buy, from measured speed, and commands that billhook itself takes."""

import json
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny

from billhook import cli
from billhook.errors import BillhookError
from billhook.pruning.recipe import recipe
from billhook.recovery import budget, forecast
from billhook.recovery.settings import recovery
from billhook.training import throughput

ASKED: dict[str, Any] = {"seq_len": 16, "device": "cpu", "seconds": 0.05}


def test_minutes_become_tokens_at_the_speed_measured(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(throughput, "training_pace", lambda *_: 1000.0)
    monkeypatch.setattr(throughput, "answering_pace", lambda *_: 4000.0)
    found = forecast.forecast(str(folder), 0.3, 10, **ASKED)
    each = (1 + budget.EVALUATING + 3 * budget.TRIAL) / 1000 + 1 / 4000
    assert found["tokens"] == int(600 / each) // 1000 * 1000
    whole = sum(param.numel() for param in tiny.model("llama").parameters())
    assert found["parameters"] < whole and found["training_bytes"] == 16 * found["parameters"]


def test_the_commands_are_ones_that_billhook_takes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(throughput, "training_pace", lambda *_: 1000.0)
    prune, recover = forecast.forecast(str(folder), 0.3, 10, **ASKED)["commands"]
    for line, check in ((prune, recipe), (recover, recovery)):
        words = shlex.split(line)
        flags = {
            word.removeprefix("--").replace("-", "_"): words[n + 1]
            for n, word in enumerate(words)
            if word.startswith("--")
        }
        check(**flags)
    (alone,) = forecast.forecast(str(folder), 0.3, 0.1, **ASKED)["commands"]
    assert "prune" in alone  # too few tokens


def test_it_measures_and_prints(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    line = [
        "billhook",
        "forecast",
        str(folder),
        "--ratio",
        "0.3",
        "--minutes",
        "5",
        "--seq-len",
        "16",
        "--seconds",
        "1",
        "--json",
    ]
    monkeypatch.setattr(sys, "argv", line)
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert left.value.code == 0
    found = json.loads(capsys.readouterr().out)
    assert found["training_tokens_per_second"] > 0 and found["trainable"] == "decoder" and found["minutes"] == 5


def test_what_does_not_fit_is_not_all_trained(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forecast, "free_bytes", lambda _: 1000)
    assert forecast.forecast(str(folder), 0.3, 5, **ASKED)["trainable"] == "lora"


@pytest.mark.parametrize("ratio", [0.0, 1.0, -0.2])
def test_a_ratio_that_is_none(ratio: float, folder: Path) -> None:
    with pytest.raises(BillhookError, match="give a share between 0 and 1"):
        forecast.forecast(str(folder), ratio, 5, **ASKED)


def test_too_little_time(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(throughput, "training_pace", lambda *_: 0.01)
    with pytest.raises(BillhookError, match="less than one window of 16: give more time"):
        forecast.forecast(str(folder), 0.3, 0.1, **ASKED)
