"""Trials of the default method: which is best, and that several processes decide as one does."""

import math
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from test_auto import deep, in_files

import billhook
from billhook.calibration.nearness import Standard
from billhook.errors import BillhookError
from billhook.methods import fasp
from billhook.methods.trials import Bench, Tried, best, losses_of
from billhook.models.plan import Plan
from billhook.planning.method import Planned
from billhook.planning.texts import Texts
from billhook.runtime.activations import Room
from billhook.training import refinement


@pytest.mark.parametrize(
    ("losses", "name"),
    [
        ({"simple": [1.0, 1.1, 0.9], "better": [0.5, 0.6, 0.4]}, "better"),
        ({"simple": [1.0, 1.1, 0.9], "same": [1.01, 1.08, 0.89]}, "simple"),
        ({"worse": [2.0, 2.1, 1.9], "noisy": [1.0, 1.2, 0.8], "least": [0.9, 1.3, 0.75]}, "noisy"),
        ({"simple": [1.0], "better": [0.9]}, "better"),
        ({"ruined": [math.nan, 0.1], "far": [math.inf, 0.1], "sound": [1.0, 0.9]}, "sound"),
        ({"ruined": [math.nan, 0.1], "too": [math.nan, math.nan]}, "ruined"),
    ],
)
def test_the_simplest_that_is_not_worse_by_two_errors_wins(losses: dict[str, list[float]], name: str) -> None:
    assert best(losses) == name


@pytest.mark.parametrize(("behind", "count"), [(1.1, 2), (1.2, 1)])
def test_what_is_too_far_behind_is_not_refined(behind: float, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """An eighth is what a refinement may make up for."""
    refined: list[Any] = []
    monkeypatch.setattr(refinement, "refine", lambda *given: refined.append(given))
    monkeypatch.setattr(Standard, "divergences", lambda *_: [behind])
    texts, plan = Texts(tiny.tokens(4), tiny.tokens(2)), Plan({(n, "ffn"): 8 for n in range(6)})
    bench = Bench(deep(), texts, refinement.Refining(passes=1), Room())
    made = fasp.METHOD, Planned(plan, fasp.FaspSettings().cut)
    found = [bench.tried(made, least).refined for least in (math.inf, 1.0)]
    assert len(refined) == count and [one is not None for one in found] == [True, count == 2]


def test_what_was_refined_too_soon_does_not_count() -> None:
    """Several processes may refine what one would not have: it is decided as in one."""
    first, near, far = ([1.5], [1.0]), ([1.1], [0.99]), ([1.2], [0.5])
    early = {name: Tried(*one, 0.0) for name, one in {"first": first, "far": far, "near": near}.items()}
    assert losses_of(early) == {"first": [1.0], "far": [1.2], "near": [0.99]}
    late = {**early, "far": Tried([1.2], None, 0.0)}
    assert losses_of(late) == losses_of(early)


def test_trials_in_several_processes_end_in_the_same_bits(text_file: Path, tmp_path: Path) -> None:
    model = in_files("llama", tmp_path / "model")
    given = {"ratio": 1 / 3, "calibration": str(text_file), "samples": 8, "seq_len": 24, "layout": "per_layer"}
    one, two = (billhook.prune(model, jobs=jobs, look=False, quiet=True, **given) for jobs in (1, 2))
    assert len(one.record["auto"]["tried"]) > 1
    assert one.record["auto"]["tried"] == two.record["auto"]["tried"]
    assert all(torch.equal(a, b) for a, b in zip(one.model.parameters(), two.model.parameters(), strict=True))


def test_processes_that_would_have_nothing_to_share_are_refused(text_file: Path, tmp_path: Path) -> None:
    model = in_files("llama", tmp_path / "model")
    given: dict[str, Any] = {"ratio": 1 / 3, "calibration": str(text_file), "samples": 8, "seq_len": 24, "jobs": 2}
    refused: tuple[tuple[dict[str, Any], str], ...] = (
        ({"effort": "quick"}, "jobs: trials are what processes share"),
        ({"axes": ("layers",)}, "jobs: trials are what processes share"),
        ({"stream_weights": True}, "jobs: trials are what processes share"),
        ({"minutes": 1}, "jobs: minutes is told by what one process takes"),
    )
    for more, says in refused:
        with pytest.raises(BillhookError, match=says):
            billhook.prune(model, look=False, quiet=True, **given, **more)
