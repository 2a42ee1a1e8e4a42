"""Many prunes of one model: equal sizes, one pass for many ratios, nothing measured twice, and the knee."""

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from billhook import cli, data
from billhook.checkpoints import load
from billhook.cuts.narrowing import Settings, narrow, narrow_each
from billhook.errors import BillhookError
from billhook.math.knee import knee
from billhook.models.families import layers
from billhook.models.plan import Plan
from billhook.pruning import compare as compare_module
from billhook.pruning import prune
from billhook.pruning.compare import Judged, _each, _text_sha256, bend, compare, judged, perplexity, sweep
from billhook.pruning.contenders import contender
from billhook.pruning.recipe import recipe
from billhook.runtime.run import Run

COMMON = {"samples": 6, "seq_len": 32, "multiple_of": 8}


@pytest.fixture
def opened(folder: Path) -> load.Opened:
    return load.open_model(str(folder))


@pytest.fixture
def common(text_file: Path) -> dict[str, Any]:
    return COMMON | {"calibration": str(text_file)}


@pytest.fixture
def by(opened: load.Opened, tmp_path: Path) -> Judged:
    return judged(opened, [data.Text("words", tiny.text(300))], 32, 4, tmp_path / "kept")


@pytest.mark.parametrize("family", ["llama", "qwen2_sliding", "opt"])
def test_one_pass_gives_the_bits_of_many(family: str) -> None:
    tokens, model = tiny.tokens(6, 32), tiny.model(family)
    total = len(layers(model))
    plans = [Plan({(n, "ffn"): drop for n in range(total)}) for drop in (8, 24)] + [
        Plan({(0, "ffn"): 8, (0, "groups"): 1}, (1,))
    ]
    for plan, (found, cuts) in zip(plans, narrow_each(model, tokens, plans, Settings(), Run()), strict=True):
        alone = tiny.model(family)
        assert cuts == narrow(alone, tokens, plan, Settings(stream="dense"), Run())
        one, other = found.state_dict(), alone.state_dict()
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    whole = tiny.model(family).state_dict()
    assert all(torch.equal(whole[key], value) for key, value in model.state_dict().items())


def test_a_contender_is_a_method_with_settings() -> None:
    found = contender(" fasp:score=wanda, axes=ffn+groups,layout=per_layer ")
    assert found.settings == {"method": "fasp", "score": "wanda", "axes": ("ffn", "groups"), "layout": "per_layer"}
    assert contender("fasp").settings == {"method": "fasp"}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("fast", "method 'fast'"),
        ("fasp:skore=wanda", "skore"),
        ("fasp:score", "write method:setting=value"),
        ("fasp:ratio=0.3", "without a budget"),
    ],
)
def test_a_wrong_contender_is_refused(text: str, said: str) -> None:
    with pytest.raises(BillhookError, match=said):
        contender(text)


def test_contenders_come_out_equal_in_size(opened: load.Opened, by: Judged, common: dict[str, Any]) -> None:
    contenders = [contender("fasp:multiple_of=1"), contender("fasp"), contender("fasp:score=wanda,stream=dense")]
    dense, *points = compare(opened, contenders, [0.2, 0.4], by, common)
    assert dense["series"] == "unpruned" and dense["ratio"] == 0
    assert [(p["series"], p["ratio"]) for p in points] == [(c.name, r) for r in (0.2, 0.4) for c in contenders]
    for ratio in (0.2, 0.4):
        sizes = {p["parameters"] for p in points if p["ratio"] == ratio}
        assert max(sizes) <= min(sizes) * 1.005
    for point in points:
        (score,) = point["perplexities"]
        assert score["factor"] == pytest.approx(score["perplexity"] / dense["perplexities"][0]["perplexity"])
        assert point["error"] is None and point["note"] is None
    assert all(layer.mlp.down_proj.in_features == 48 for layer in layers(opened.model))  # the model itself is whole


def test_nothing_is_measured_twice(
    opened: load.Opened, by: Judged, common: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    contenders = [contender("fasp"), contender("fasp:score=wanda")]
    once = compare(opened, contenders[:1], [0.3], by, common)
    both = compare(opened, contenders, [0.3], by, common)
    assert both[:2] == once
    monkeypatch.setattr(compare_module, "prune_opened", None)
    monkeypatch.setattr(compare_module, "perplexity", None)
    assert compare(opened, contenders, [0.3], by, common) == both
    with pytest.raises(TypeError):
        compare(opened, contenders, [0.4], by, common)


def test_what_a_contender_cannot_do_is_its_error(opened: load.Opened, by: Judged, common: dict[str, Any]) -> None:
    contenders = [contender("fasp:axes=heads"), contender("fasp")]
    _, refused, fine = compare(opened, contenders, [0.4], by, common)
    assert "heads" in refused["error"] and refused["perplexities"] == []
    assert fine["error"] is None and fine["achieved_ratio"] == pytest.approx(0.4, abs=0.1)


def test_processes_of_their_own_find_the_same(
    opened: load.Opened, by: Judged, common: dict[str, Any], tmp_path: Path
) -> None:
    contenders = [contender("fasp"), contender("fasp:score=wanda"), contender("fasp:score=energy")]
    here = compare(opened, contenders, [0.3], by, common)
    apart = compare_module.judged(opened, [data.Text("words", tiny.text(300))], 32, 4, tmp_path / "apart")
    there = compare(opened, contenders, [0.3], apart, common, jobs=2)
    drop = lambda points: [{k: v for k, v in p.items() if k not in ("seconds", "perplexities")} for p in points]  # noqa: E731
    assert drop(here) == drop(there)
    for one, other in zip(here, there, strict=True):
        assert one["perplexities"][0]["perplexity"] == pytest.approx(other["perplexities"][0]["perplexity"], rel=1e-6)


@pytest.mark.parametrize("stream", ["dense", "dense_target"])
def test_a_sweep_is_the_prunes_it_stands_for(
    stream: str, opened: load.Opened, by: Judged, common: dict[str, Any], folder: Path
) -> None:
    chosen = [recipe(method="fasp", **common, ratio=ratio, stream=stream) for ratio in (0.2, 0.4)]
    dense, *points = sweep(opened, "fasp", chosen, by)
    assert dense["achieved_ratio"] == 0
    for one, point in zip(chosen, points, strict=True):
        result = prune.prune_opened(load.open_model(str(folder)), one, Run())
        assert point["parameters"] == result.record["sizes"]["after"]["parameters"]
        assert point["perplexities"][0]["perplexity"] == perplexity(result.model, by.windows[0]).perplexity


def test_a_sweep_goes_on_where_it_was_cut_off(
    opened: load.Opened, by: Judged, common: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = [recipe(method="fasp", **common, ratio=ratio, stream="dense") for ratio in (0.2, 0.3, 0.4)]
    sweep(opened, "fasp", [chosen[0], chosen[2]], by)
    asked: list[list[float | None]] = []
    each = _each
    monkeypatch.setattr(
        compare_module,
        "_each",
        lambda opened, missing, *rest: (asked.append([m.budget.ratio for m in missing]), each(opened, missing, *rest))[
            1
        ],
    )
    assert [p["ratio"] for p in sweep(opened, "fasp", chosen, by)] == [0, 0.2, 0.3, 0.4]
    assert asked == [[0.3]]


def test_another_text_is_another_result(
    opened: load.Opened, by: Judged, common: dict[str, Any], text_file: Path
) -> None:
    chosen = recipe(method="fasp", **common, ratio=0.3)
    before = by.key(chosen)
    _text_sha256.cache_clear()
    text_file.write_text(tiny.text(700))
    assert by.key(chosen) != before


def line(ratios: Sequence[float | int], place: float, below: float, above: float) -> list[float]:
    return [3 + below * x + (above - below) * max(0.0, x - place) for x in ratios]


def test_the_knee_of_two_straight_pieces() -> None:
    ratios = [0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6]
    found = knee(ratios, line(ratios, 0.3, 1.0, 5.0))
    assert found is not None
    assert found.ratio == pytest.approx(0.3, abs=0.002) and found.low <= found.ratio <= found.high
    assert found.high - found.low < 0.01
    assert (found.below, found.above) == pytest.approx((1.0, 5.0), rel=0.02)


def test_noise_widens_the_interval() -> None:
    ratios = [0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6]
    noise = [0.0, 0.04, -0.03, 0.02, -0.04, 0.03, -0.02]
    found = knee(ratios, [y + e for y, e in zip(line(ratios, 0.3, 1.0, 5.0), noise, strict=True)])
    assert found is not None and found.low < 0.3 < found.high and found.high - found.low > 0.02


@pytest.mark.parametrize(
    "losses",
    [
        line([0, 0.1, 0.2, 0.3, 0.4, 0.5], 0.3, 2.0, 2.0),
        line([0, 0.1, 0.2, 0.3, 0.4, 0.5], 0.3, 3.0, 1.0),
        [1.0, math.inf, math.nan, 2.0, 3.0, 4.0],
    ],
)
def test_no_knee_where_there_is_none(losses: list[float]) -> None:
    assert knee([0, 0.1, 0.2, 0.3, 0.4, 0.5], losses) is None


def run(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr("sys.argv", ["billhook", *arguments])
    with pytest.raises(SystemExit) as end:
        cli.main()
    return int(end.value.code or 0)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("BILLHOOK_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_the_commands_write_pages_and_numbers(
    folder: Path,
    text_file: Path,
    tmp_path: Path,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = [
        "--calibration",
        str(text_file),
        "--samples",
        "6",
        "--seq-len",
        "32",
        "--text",
        str(text_file),
        "--windows",
        "4",
    ]
    page = tmp_path / "sweep.html"
    assert (
        run(
            [
                "sweep",
                str(folder),
                "--ratios",
                "0.2:0.8:0.2",
                *given,
                "--method",
                "fasp:multiple-of=8",
                "--report",
                str(page),
            ],
            monkeypatch,
        )
        == 0
    )
    assert "seconds" in capsys.readouterr().out
    found = json.loads(page.with_suffix(".json").read_text())
    assert found["kind"] == "sweep" and [p["ratio"] for p in found["points"]] == [0, 0.2, 0.4, 0.6, 0.8]
    assert [bool(p["error"]) for p in found["points"]] == [
        False,
        False,
        False,
        True,
        True,
    ]  # all channels are half of it
    assert found["conditions"]["command"].startswith("billhook sweep") and "<svg" in page.read_text()
    assert (
        run(
            [
                "compare",
                str(folder),
                "--methods",
                "fasp:multiple_of=8",
                "--methods",
                "fasp:multiple_of=8,score=wanda",
                "--ratio",
                "0.3",
                *given,
                "--json",
                "-",
            ],
            monkeypatch,
        )
        == 0
    )
    found = json.loads(capsys.readouterr().out)
    assert found["kind"] == "compare" and len(found["points"]) == 3


def test_a_prune_leaves_a_page(folder: Path, text_file: Path, tmp_path: Path) -> None:
    result = prune.prune(
        str(folder), method="fasp", ratio=0.3, samples=6, seq_len=32, multiple_of=8, calibration=str(text_file)
    )
    out = result.save(tmp_path / "out")
    told = json.loads((out / "report.json").read_text())
    assert told["kind"] == "prune" and told["cut"]["sizes"] == json.loads((out / "billhook.json").read_text())["sizes"]
    assert "billhook evaluate" in (out / "report.html").read_text()
    assert all(0 <= cut["score_dropped"] < 1 for cut in told["cut"]["cuts"])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["sweep", "MODEL", "--ratios", "0.5:0.1:0.1"], "--ratios '0.5:0.1:0.1'"),
        (["sweep", "MODEL", "--ratios", "0.1:0.5:0"], "--ratios"),
        (["sweep", "MODEL", "--ratios", "0.1,1.5"], "ratios between 0 and 1"),
        (["sweep", "MODEL", "--ratios", "a:b:c"], "--ratios"),
        (["sweep", "MODEL", "--ratios", "0.2", "--method", "fast"], "method 'fast'"),
        (["sweep", "MODEL", "--ratios", "0.2", "--report", "/dev/null/page.html"], "/dev/null"),
        (["compare", "MODEL", "--methods", "fasp,fasp", "--ratio", "0.2"], "two contenders are the same"),
        (["compare", "MODEL", "--methods", "fasp:score=wandb", "--ratio", "0.2"], "wanda"),
        (["compare", "MODEL", "--methods", " ", "--ratio", "0.2"], "--methods names none"),
        (["compare", "MODEL", "--methods", "fasp", "--ratio", "1.2"], "ratio"),
        (["compare", "MODEL", "--methods", "fasp", "--ratio", "0.2", "--seq-len", "1"], "seq-len 1"),
    ],
)
def test_bad_input(
    arguments: list[str],
    said: str,
    folder: Path,
    text_file: Path,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = ["--calibration", str(text_file), "--text", str(text_file)]
    given += [] if "--seq-len" in arguments else ["--seq-len", "32"]
    assert run([str(folder) if a == "MODEL" else a for a in arguments] + given, monkeypatch) == 2
    told = capsys.readouterr().err
    assert said in told and len(told.strip().splitlines()) == 1 and "Traceback" not in told


@pytest.mark.parametrize(
    ("below", "said"), [(1.0, "safe up to 30% ± 0%"), (4.0, "steep from 30% ± 0% on, .*×3.3 by then")]
)
def test_only_a_cheap_knee_is_called_safe(below: float, said: str) -> None:
    ratios = [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6]
    points = [
        {"error": None, "achieved_ratio": x, "perplexities": [{"text": "words", "window_losses": [y, y]}]}
        for x, y in zip(ratios, line(ratios, 0.3, below, 9.0), strict=True)
    ]
    found = bend(points)
    assert found is not None and re.match(said, found["verdict"])
