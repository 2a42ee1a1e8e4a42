"""What billhook reads back, damaged in every way: refused in one line or taken, never a traceback, never for long."""

import io
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import example_reports
import pytest
from fuzzing import Damage, Tally, file_damages, fuzz, json_damages, sample
from kept_files import KEPT, TAKEN
from rich.console import Console

from billhook import demo
from billhook.errors import BillhookError
from billhook.reports import card, history, page, records, terminal

FEW = 16  # damages of a file that the fast tests try; the slow one tries all


def record() -> dict[str, Any]:
    """A billhook.json with all that one may hold."""
    found = example_reports.recover()["cut"]
    found["cuts"] = example_reports.cut(3, ("ffn", "value"), uneven=True)["cuts"]
    found["search"] = example_reports.hunt()
    found["vocabulary"] = {"before": 300, "kept": 200, "calibration_grows": 0.01}
    found["residual"] = {"before": 64, "kept": 48, "rotated": True, "untied_parameters": 99}
    operators = [{"role": role, "error": 0.1, "error_held_out": None} for role in ("q", "down")]
    found["zeros"] = {
        **{"pattern": "2:4", "targets": ["ffn"], "zeros": 50, "weights": 100, "sparsity": 0.5},
        "operators": operators,
    }
    trial = {"closed": 0.4, "refined": True, "behind": 0.0, "behind_standard_error": 0.0, "seconds": 61.0}
    found["auto"] = {
        **{"chosen": "whole layers", "tried": {"whole layers": 0.3, "equal widths": math.nan}, "trial_windows": 16},
        "trials": {"whole layers": trial, "equal widths": {**trial, "refined": False, "behind": math.nan}},
        "refused": {"fewer experts": "there are none"},
    }
    found["refined"] = [{"first": 8, "last": 17, "before": 0.3, "after": 0.2, "kept": True}]
    found["calibration"]["elsewhere"] = {"source": "other", "windows": 8}
    found["look"] = {
        **{"text": "prose", "perplexities": [14.2, 24.6], "factor": 1.7, "factor_standard_error": 0.1, "kl": 0.4},
        **{"repetition": {"greedy": [0.1, 0.3]}, "tasks": {"sums": [0.7, None]}, "warning": ""},
    }
    return json.loads(records.to_json(found))


def shown(folder: Path) -> Callable[[], None]:
    """What evaluate, recover and prune make of a record: tables, a card and a page."""

    def shows() -> None:
        if cut := records.stored_cut(folder):
            healing = (cut.get("recovery") or [None])[-1]
            Console(file=io.StringIO()).print(terminal.summary_table(cut, "a model"))
            assert card.model_card(cut).encode()
            said = records.assemble("recover", "a model", {"command": ""}, cut=cut, healing=healing)
            assert page.render(said).encode() and records.to_json(said)

    return shows


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    (tmp_path / "billhook.json").write_text(json.dumps(record()))
    return tmp_path / "billhook.json"


def test_a_record_is_taken_as_it_was_written(stored: Path) -> None:
    shown(stored.parent)()
    assert records.stored_cut(stored.parent) == record()


def test_a_record_that_is_damaged_is_refused_or_shown(stored: Path) -> None:
    content, tally = stored.read_bytes(), Tally()
    fuzz(stored, sample([*json_damages(content, most=FEW), *file_damages(content)], FEW), [shown(stored.parent)], tally)
    assert not tally.faults and tally.counts["refused"] and tally.counts["accepted"], tally


@pytest.mark.parametrize(
    ("place", "value", "said"),
    [
        (("sizes", "after", "parameters"), "3", "sizes.after.parameters is '3': it should be a whole number"),
        (("cuts", 0, "dropped"), 9999, "cuts.0 is .*: dropped should be at most units, 1536"),
        (("parent",), " ", "parent is ' ': it should be a text that is not empty"),
        (("recovery", 0, "lr"), None, "recovery.0.lr is None: it should be a number"),
        (("auto", "chosen"), "none of them", "chosen should be one of the cuts that tried names"),
        (("auto", "trials", "whole layers"), None, "auto.trials.whole layers"),
        (("look", "perplexities"), [1.0], "look.perplexities"),
        (("kept_layers",), None, "kept_layers should name the layers that stay"),
    ],
)
def test_the_key_and_what_it_should_be_are_named(stored: Path, place: tuple[Any, ...], value: Any, said: str) -> None:
    document = record()
    parent = document
    for key in place[:-1]:
        parent = parent[key]
    parent[place[-1]] = value
    Damage("", json.dumps(document).encode()).put(stored)
    with pytest.raises(BillhookError, match=f"billhook.json: .*{said}.*: copy the folder again, or remove the file"):
        history.read(stored.parent)


@pytest.mark.parametrize("name", KEPT)
def test_what_billhook_keeps_is_refused_damaged(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BILLHOOK_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(demo, "TEXT", demo.TEXT)
    kept, tally = KEPT[name](tmp_path / "kept"), Tally()
    kept.read()
    found = fuzz(kept.path, kept.damages(FEW), [kept.read], tally)
    assert not tally.faults and (name in TAKEN or tally.counts["refused"]), tally.faults
    for one in found:
        assert one.kind != "refused" or str(kept.path.parent) in one.said, one
    kept.read()
