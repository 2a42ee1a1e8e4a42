"""Candidates judged after a short heal: each is trained alike, the best on held-out text wins, the ranks are told."""

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers as T

from billhook.errors import BillhookError
from billhook.pruning import prune as prune_module
from billhook.pruning.recipe import recipe
from billhook.recovery import candidates
from billhook.training import trainer

LENGTH = 16


@pytest.fixture
def bench(tmp_path: Path) -> Path:
    """A model of six layers and two texts."""
    torch.manual_seed(0)
    T.AutoModelForCausalLM.from_config(tiny.CONFIGS["llama"](num_hidden_layers=6)).save_pretrained(tmp_path / "deep")
    tiny.tokenizer().save_pretrained(tmp_path / "deep")
    words = tiny.text(1200)
    (tmp_path / "train.txt").write_text(words[:3000])
    (tmp_path / "held.txt").write_text(words[3000:])
    return tmp_path


def prune(bench: Path, **more: Any) -> dict[str, Any]:
    given = {
        **{"method": "layerchop", "layers": 4, "select": "healed", "candidates": ("input", "middle", "output")},
        **{"heal_tokens": 96, "calibration": str(bench / "train.txt"), "held_out": (str(bench / "held.txt"),)},
        **{"seq_len": LENGTH, "samples": 4, "probes": 2},
    }
    return prune_module.prune(str(bench / "deep"), **{"statistics": bench / "kept", **given, **more}).record


def test_every_candidate_is_trained_and_the_best_wins(bench: Path) -> None:
    report = prune(bench)
    found = report["selection"]
    rows = {one["name"]: one for one in found["candidates"]}
    assert rows.keys() == {"input", "middle", "output"} and found["by"] == "held" and found["heal_tokens"] == 96
    assert rows["input"]["dropped"] == [1, 2] and rows["output"]["dropped"] == [3, 4]
    for moment in ("before", "after"):
        order = sorted(rows.values(), key=lambda one: one[f"rank_{moment}"])
        worth = [one[moment]["held"] for one in order]
        assert worth == sorted(worth) and [one[f"rank_{moment}"] for one in order] == [1, 2, 3]
    assert rows[found["chosen"]]["rank_after"] == 1 and report["dropped_layers"] == rows[found["chosen"]]["dropped"]
    assert all(one["before"] != one["after"] for one in rows.values())


def test_the_ranks_after_training_decide(bench: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def told(folder: object, name: str, key: dict[str, Any], measure: object) -> dict[str, Any]:
        better = key["dropped"] == [3, 4]
        return {"before": {"held": 9.0 if better else 5.0}, "after": {"held": 3.0 if better else 4.0}}

    monkeypatch.setattr(candidates.cache, "cached", told)
    found = prune(bench)["selection"]
    (first,) = (one for one in found["candidates"] if one["name"] == "output")
    assert found["chosen"] == "output" and (first["rank_before"], first["rank_after"]) == (3, 1)


def test_what_was_trained_is_kept_and_the_same_layers_are_trained_once(
    bench: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = prune(bench, candidates=("input", "output", "reverse"))  # two names of one choice
    healed = []
    monkeypatch.setattr(trainer, "RecoveryTrainer", lambda *_: healed.append(1))
    assert len(list((bench / "kept").glob("candidate-*"))) == 2
    again = prune(bench, candidates=("input", "output", "reverse"))
    assert not healed and again["selection"]["candidates"] == first["selection"]["candidates"]


def test_checkpoints_of_one_candidate_are_not_anothers(bench: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = prune(bench, candidates=("input", "output"))["selection"]["candidates"]
    monkeypatch.setattr(trainer, "SAVE_SECONDS", 0.0)  # a long heal writes some
    again = prune(bench, candidates=("input", "output"), seed=0, statistics=bench / "other")
    assert again["selection"]["candidates"] == first


def test_the_record_and_the_command_tell_it(bench: Path) -> None:
    given = {"method": "layerchop", "layers": 4, "select": "healed", "candidates": ("input", "output"), "samples": 4}
    given |= {"heal_tokens": 64, "calibration": str(bench / "train.txt"), "held_out": (str(bench / "held.txt"),)}
    prune_module.prune(str(bench / "deep"), **given, seq_len=LENGTH, probes=2).save(bench / "out")
    record = json.loads((bench / "out" / "billhook.json").read_text())
    card = (bench / "out" / "README.md").read_text()
    assert record["selection"]["chosen"] in ("input", "output")
    assert "--select healed --candidates input,output --heal-tokens 64" in card
    assert "Judged after a short heal" in (bench / "out" / "report.html").read_text()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"method": "fasp", "ratio": 0.2}, "--select belongs to --method layerchop"),
        ({"drop": "1"}, "--drop or --keep names them: give one"),
        ({"ratio": 0.2, "candidates": ("input",)}, "name at least two --candidates"),
        ({"ratio": 0.2, "candidates": ("input", "midle")}, "did you mean 'middle'?"),
        ({"ratio": 0.2, "heal_tokens": "0"}, "heal-tokens 0: input should be greater"),
    ],
)
def test_what_is_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(BillhookError, match=said.replace("?", r"\?")):
        recipe(**{"method": "layerchop", "select": "healed", **settings})
