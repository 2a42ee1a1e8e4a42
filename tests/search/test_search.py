"""A search for samples and metric: the same whenever it is asked, wherever it was cut off, and never behind what was
known."""

import json
import math
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

import billhook
from billhook import data
from billhook.checkpoints import load
from billhook.choices import SAMPLERS
from billhook.cuts.chopping import Settings as Patching
from billhook.cuts.chopping import chop
from billhook.errors import BillhookError
from billhook.methods.searched import asked
from billhook.models.axes import axes
from billhook.models.plan import Plan, even_plan
from billhook.models.sizes import saved_by
from billhook.models.surgery import drop_layers, zero
from billhook.pruning import compare, contenders
from billhook.pruning.recipe import recipe
from billhook.reports.search_tables import outcome_words
from billhook.runtime.run import Run
from billhook.search import adapruner, evaluator, harness, ladder, layer_blocks
from billhook.search import measured as measurements
from billhook.search.budgets import BaseCut, Shape, attention_counts, exchanged, longest_block, shaped
from billhook.search.inputs import read_inputs
from billhook.search.measured import prepare
from billhook.search.metrics import Solution, digest, known_metrics, mixtures
from billhook.search.samplers import Study
from billhook.search.space import Candidate, Dimension, lowest, space
from billhook.search.trial import Trial, by_fronts, paired_gain, verdict
from billhook.search.validation import FINAL, RungWindows, split

SMALL: dict[str, Any] = dict(
    method="adapruner", ratio=0.3, seq_len=64, pool=24, pool_len=32, samples=4, trials=16, multiple_of=4
)


def base_cut(drops: dict[str, int], layout: str = "uniform") -> BaseCut:
    return BaseCut(tiny.model("llama"), even_plan(3, drops), 1, layout)


def found(text: str, **other: Any) -> dict[str, Any]:
    given = {"calibration": text, **SMALL, **other}
    return billhook.prune(tiny.model("llama"), tokenizer=tiny.tokenizer(), **given).record["search"]


@pytest.fixture(scope="module", autouse=True)
def _rungs_are_short() -> Iterator[None]:
    """What a search does is the same on as many windows as tell its candidates apart."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (harness, measurements):
            patch.setattr(module, "RUNGS", (4, 8, 16))
        patch.setattr(harness, "PROMOTED", 4)
        yield


@pytest.fixture(scope="module")
def counted(text: str) -> tuple[dict[str, Any], int]:
    """A whole search, and how often it asked for losses."""
    asked: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        real = evaluator.masked_losses
        patch.setattr(evaluator, "masked_losses", lambda *given: asked.append(1) or real(*given))
        return found(text), len(asked)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("measured")


@pytest.fixture(autouse=True)
def _a_pool_is_measured_once(measured: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which takes half of a small search; what is compared with another search measures its own."""
    for name in ("evidence", "gate_fishers") if "whole" not in request.fixturenames else ():
        real = getattr(measurements, name)
        monkeypatch.setattr(
            measurements, name, lambda *given, real=real, **more: real(*given, **more | {"folder": measured})
        )


@pytest.fixture
def whole(counted: tuple[dict[str, Any], int]) -> dict[str, Any]:
    return counted[0]


def stop(*_: Any) -> list[float]:
    raise KeyboardInterrupt


def test_the_same_seed_gives_the_same_search(text: str, whole: dict[str, Any]) -> None:
    assert json.dumps(found(text)) == json.dumps(whole)
    assert json.dumps(found(text, seed=1)) != json.dumps(whole)


def test_a_search_that_was_cut_off_goes_on_to_the_same_end(
    text: str, counted: tuple[dict[str, Any], int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (whole, asked), real, count = counted, evaluator.masked_losses, 0

    def tried(*args: Any) -> list[float]:
        nonlocal count
        count += 1
        return stop() if count == 14 else real(*args)

    monkeypatch.setattr(evaluator, "masked_losses", tried)
    with pytest.raises(KeyboardInterrupt):
        found(text, work=tmp_path / "study")
    assert count == 14
    assert json.dumps(found(text, work=tmp_path / "study")) == json.dumps(whole)
    assert count - 1 == asked  # nothing was tried twice


def test_a_finished_study_asks_nothing_again_and_goes_further(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = found(text, work=tmp_path / "study", restoration=False)
    longer = found(text, work=tmp_path / "study", restoration=False, trials=24)
    assert [one["mask"] for one in longer["trials"][:16]] == [one["mask"] for one in first["trials"]]
    monkeypatch.setattr(evaluator, "masked_losses", None)
    assert json.dumps(found(text, work=tmp_path / "study", restoration=False)) == json.dumps(first)


def test_another_search_does_not_take_up_a_study(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = tmp_path / "study"
    monkeypatch.setattr(evaluator, "masked_losses", stop)
    with pytest.raises(KeyboardInterrupt):
        found(text, work=study)
    with pytest.raises(BillhookError, match=r"holds an unfinished run that differs in ratio"):
        found(text, work=study, ratio=0.4)
    with pytest.raises(BillhookError, match=r"differs in model"):
        billhook.prune(tiny.model("llama", 1), tokenizer=tiny.tokenizer(), work=study, calibration=text, **SMALL)
    with pytest.raises(KeyboardInterrupt):  # it is taken, and work begins
        found(text, work=study, ratio=0.4, fresh=True)


def test_two_processes_find_what_one_does(text: str, whole: dict[str, Any], tmp_path: Path) -> None:
    source = tmp_path / "model"
    tiny.model("llama").save_pretrained(source)
    tiny.tokenizer().save_pretrained(source)
    given = {"calibration": text, **SMALL}
    two = billhook.prune(source, jobs=2, **given).record["search"]
    assert [t["mask"] for t in whole["trials"]] == [t["mask"] for t in two["trials"]]
    assert whole["winner"] == two["winner"]
    with pytest.raises(BillhookError, match="jobs: other processes cannot see a model in memory"):
        found(text, jobs=2)


def test_equal_masks_are_tried_once(text: str, whole: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, bytes]] = []
    real = evaluator.masked_losses

    def watched(model: Any, mask: Any, windows: torch.Tensor, *rest: Any) -> list[float]:
        seen.append((digest(mask), windows.numpy().tobytes()))
        return real(model, mask, windows, *rest)

    monkeypatch.setattr(evaluator, "masked_losses", watched)
    found(text, restoration=False)
    assert len(set(seen)) == len(seen)
    states = [one["state"] for one in whole["trials"]]
    assert states[:8] == ["repeated"] * 8  # the known metrics, tried before
    assert {"tried", "dropped"} <= set(states)
    for one in whole["trials"]:
        assert (one["worse"] is None) == (one["state"] == "dropped")


def test_no_window_serves_two_ends(text: str) -> None:
    windows = tiny.tokens(40, 64)
    parts = split(windows, 0)
    pieces = [tuple(row.tolist()) for row in torch.cat([parts.proxy, parts.rungs])]
    deciding = {tuple(row.tolist()) for row in parts.final}
    assert len(set(pieces)) == len(pieces) == 40 - len(parts.final) and not deciding & set(pieces)
    with pytest.raises(BillhookError, match="has 11 windows of 64 tokens, and a search needs 12"):
        split(windows[:11], 0)


@pytest.mark.parametrize("windows", [4, 8, FINAL])
def test_a_candidate_that_is_no_better_passes_one_time_in_44(windows: int) -> None:
    draw, tries = random.Random(windows), 4000
    passed = 0
    for _ in range(tries):
        standard = [draw.gauss(3, 1) for _ in range(windows)]  # windows differ more than candidates do
        passed += verdict(standard, [x + draw.gauss(0, 0.02) for x in standard])["accepted"]
    assert 0.015 < passed / tries < 0.03
    better = [draw.gauss(3, 1) for _ in range(windows)]
    assert verdict(better, [x - draw.gauss(0.1, 0.02) for x in better])["accepted"]


def test_what_has_no_error_is_not_believed_unless_it_is_all_there_is() -> None:
    inf, nan = math.inf, math.nan
    assert verdict([inf, inf], [2.0, 3.0])["accepted"]
    for standard, own in (([2.0, 3.0], [inf, 2.0]), ([2.0, 3.0], [nan, 2.0]), ([2.0, 3.0], [2.0, 3.0]), ([3.0], [2.0])):
        assert not verdict(standard, own)["accepted"]


@pytest.mark.parametrize("better", [True, False])
def test_what_does_not_beat_the_standard_on_unseen_windows_is_not_taken(
    text: str, better: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every candidate is a tenth of a nat better than it is on the windows of the search, and as good or worse at the
    end."""
    real = adapruner.AdaPruner.finished

    def finished(self: adapruner.AdaPruner, candidates: Any, rung: Any) -> Any:
        both = real(self, candidates, rung)
        standards, others = both[: adapruner.STANDARDS], both[adapruner.STANDARDS :]
        gain, off = 0.05 if better else 0.0, torch.linspace(-0.01, 0.01, len(standards[0][1])).tolist()
        final = [x - gain + o for x, o in zip(standards[0][1], off, strict=True)]
        return [standards[0]] * len(standards) + [([x - 0.1 for x in rung], final) for rung, _ in others]

    monkeypatch.setattr(adapruner.AdaPruner, "finished", finished)
    end = found(text, restoration=False)
    assert end["accepted"] is better and end["chosen"] is not None
    if not better:
        assert end["winner"]["solution"]["coefficients"] == {end["standard"]: 1.0}


def test_a_cut_vocabulary_is_searched_with_what_is_left_of_it(text: str) -> None:
    given = {**SMALL, "calibration": text, "vocab_from": (text,)}
    result = billhook.prune(tiny.model("llama"), tokenizer=tiny.tokenizer(), **given)
    assert result.record["vocabulary"] and result.record["search"]["pool"]["samples"][0] in Path(text).read_text()


def test_a_pool_smaller_than_its_clusters_has_fewer(text: str) -> None:
    assert max(found(text, pool=3, restoration=False)["pool"]["clusters"]) <= 2


def test_what_the_winner_drops_is_gone_and_nothing_else_has_changed(text: str) -> None:
    given = {**SMALL, "space": "paper", "calibration": text}
    result = billhook.prune(tiny.model("llama"), tokenizer=tiny.tokenizer(), **given)
    masked = tiny.model("llama")
    for axis, cut in zip(axes(masked, ("ffn",)), result.record["cuts"], strict=True):
        stayed, rows = (m.model.layers[axis.layer].mlp.gate_proj.weight for m in (result.model, masked))
        gone = [n for n, row in enumerate(rows) if not (stayed == row).all(1).any()]
        assert len(gone) == cut["dropped"]
        zero(masked, axis, torch.tensor(gone))
    ids = tiny.tokens()
    assert torch.allclose(result.model(ids).logits, masked(ids).logits, atol=1e-5)
    assert not result.record["search"]["restoration"]


def test_a_loss_that_is_no_number_fails_its_trial_alone(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = evaluator.masked_losses, 0

    def broken(*args: Any) -> list[float]:
        nonlocal calls
        calls += 1
        return [math.nan] * len(args[2]) if calls % 5 == 0 and len(args[2]) == 4 else real(*args)

    monkeypatch.setattr(evaluator, "masked_losses", broken)
    states = [one["state"] for one in found(text)["trials"]]
    assert "failed" in states and "tried" in states


@pytest.mark.parametrize(
    "sampler", [pytest.param(name, marks=[pytest.mark.whole] * (name == "gp")) for name in SAMPLERS]
)
def test_every_sampler_learns_or_at_least_asks(sampler: str) -> None:
    dimensions = {"x": Dimension(0.0, 1.0, 0.1), "n": Dimension(0, 9, 1), "c": Dimension(choices=("a", "b"))}

    def run() -> list[float]:
        study, losses = Study(dimensions, sampler, 3), []
        for batch in range(12):
            first = [{"x": 1.0, "n": 9, "c": "a"}] if not batch else []
            for number, given in study.ask(4, first):
                losses.append(given["x"] + given["n"] / 9 + (given["c"] == "a"))
                if number % 7 == 6:
                    study.drop(number, 1.0)
                else:
                    study.tell(number, None if number % 7 == 5 else losses[-1])
        assert set(study.importance()) == set(dimensions)
        return losses

    losses = run()
    assert losses[0] == 3.0 and losses == run()
    if sampler != "random":
        assert sum(losses[-16:]) < sum(losses[:16])


def test_a_study_without_differences_has_no_importance() -> None:
    study = Study({"x": Dimension()}, "random", 0)
    for number, _ in study.ask(3):
        study.tell(number, 1.0)
    assert study.importance() in ({}, {"x": 0.0})


@pytest.mark.parametrize("name", ["full", "paper", "samples", "metric", "samples,metric,budgets"])
def test_known_metrics_are_points_of_their_space(name: str) -> None:
    open_ = space(name, base_cut({"ffn": 8, "groups": 1}, "per_layer"), 3, 24)
    standard = known_metrics(3)["param_second"]
    for solution in open_.known.values() if "metric" in open_.groups else [standard]:
        decoded = open_.decode(open_.encode(solution), standard)
        assert decoded.solution == solution
        assert decoded.shape == (Shape() if "budgets" in open_.groups else None)
        assert decoded.attention == (1 if "attention" in open_.dimensions() else None)


def test_a_point_says_what_it_chose() -> None:
    open_ = space("full", base_cut({"ffn": 8}), 3, 24)
    given = open_.encode(known_metrics(3)["energy"]) | {
        "cluster 0": 0,
        "cluster 1": 2,
        "cluster 2": 2,
        "windows": 9,
        "draw": 4,
    }
    own = open_.decode(given, Solution((1, 1, 1))).solution
    assert own.levels == (0, 1, 1) and (own.count, own.draw) == (9, 4) and own.coefficients == {"energy": 1.0}
    nothing = open_.decode(
        given | {name: 0 for name in given if name in ("energy",)}, known_metrics(3)["energy"]
    ).solution
    assert nothing.coefficients == {"energy": 1.0}
    assert lowest((0, 0)) == (1, 1) and lowest((2, 0)) == (1, 0) and lowest((2, 1)) == (2, 1)
    assert all(lowest(each) in mixtures(3) for each in [(0, 0, 0), (2, 2, 0), (1, 2, 0)])


@pytest.mark.parametrize("layout", ["uniform", "per_layer"])
def test_attention_and_channels_make_up_for_each_other(layout: str) -> None:
    model = tiny.model("llama_bias")
    base = BaseCut(model, even_plan(3, {"ffn": 20, "groups": 0}), 1, layout)
    counts = attention_counts(base)
    assert counts[0] == 0 and set(counts) == {0, 1}
    other = exchanged(base, attention=1)
    assert {count for (_, kind), count in other.drops.items() if kind == "groups"} == {1}
    step = sum(axis.price(model) for axis in axes(model, ("ffn",)))
    assert 0 <= saved_by(model, other) - saved_by(model, base.plan) < step
    assert attention_counts(replace(base, plan=even_plan(3, {"ffn": 4}))) == ()
    with pytest.raises(BillhookError, match="makes up for that"):
        exchanged(replace(base, plan=even_plan(3, {"ffn": 1, "groups": 0})), attention=1)


@pytest.mark.parametrize("block", [(1, 1), (1, 2), (2, 1)])
def test_a_block_of_layers_and_channels_make_up_for_each_other(block: tuple[int, int]) -> None:
    model = tiny.model("llama", num_hidden_layers=5)
    base = BaseCut(model, even_plan(5, {"ffn": 40}), 1, "uniform")
    assert longest_block(model, base.plan) == 2
    other = exchanged(base, block=block)
    assert other.layers == tuple(range(block[0], sum(block))) and not {n for n, _ in other.drops} & set(other.layers)
    assert len(set(other.drops.values())) == 1
    step = sum(axis.price(model) for axis in axes(model, ("ffn",)))
    assert 0 <= saved_by(model, other) - saved_by(model, base.plan) < step
    with pytest.raises(BillhookError, match="makes up for that"):
        exchanged(base, block=(1, 3))


def test_a_search_may_take_whole_layers(text: str) -> None:
    model = tiny.model("llama", num_hidden_layers=5)
    result = billhook.prune(model, tokenizer=tiny.tokenizer(), **{**SMALL, "calibration": text, "ratio": 0.45})
    record, sizes = result.record["search"], result.record["sizes"]
    used = {tuple(one["block"]) for one in record["trials"] if one["block"]}
    assert "block" in record["dimensions"] and 0 < len(used) == len({count for _, count in used})
    assert all(start > 0 and start + count < 5 for start, count in used)
    assert {"tried", "repeated"} <= {one["state"] for one in record["trials"]}
    assert result.record["dropped_layers"] == list(range(*_ends(record["winner"])))
    assert sizes["achieved_ratio"] >= 0.44


def test_what_makes_up_for_a_block_in_a_trial_is_layerchops_patch(text: str) -> None:
    made = layer_blocks.patch(tiny.model("llama"), tiny.tokens(8, 32), (1, 1), Run())
    cut = tiny.model("llama")
    chop(cut, tiny.tokens(8, 32), Plan(layers=(1,)), Patching(patch="linear"), Run())
    assert made is not None and torch.allclose(made.weight, cut.model.layers[0].mlp.down_proj.weight, atol=1e-6)
    model, gone = tiny.model("llama"), {(1, "layers"): torch.empty(0, dtype=torch.long)}
    windows = tiny.tokens(4, 32)
    assert evaluator.masked_losses(model, gone, windows, None, made, None) == evaluator.masked_losses(
        cut, {}, windows, None, None, None
    )
    assert torch.equal(
        model.model.layers[0].mlp.down_proj.weight, tiny.model("llama").model.layers[0].mlp.down_proj.weight
    )


def _ends(winner: dict[str, Any] | None) -> tuple[int, int]:
    start, count = (winner and winner["block"]) or (0, 0)
    return start, start + count


def test_a_layer_passed_by_in_a_trial_is_as_good_as_gone() -> None:
    model, gone = tiny.model("llama", num_hidden_layers=5), tiny.model("llama", num_hidden_layers=5)
    drop_layers(gone, (1, 2))
    windows, nothing = tiny.tokens(4, 32), torch.empty(0, dtype=torch.long)
    there, here = ({(n, "layers"): nothing for n in layers} for layers in ((1, 2), ()))
    assert evaluator.masked_losses(model, there, windows, None, None, None) == evaluator.masked_losses(
        gone, here, windows, None, None, None
    )
    assert evaluator.masked_losses(model, here, windows, None, None, None) != evaluator.masked_losses(
        gone, here, windows, None, None, None
    )


def test_a_search_over_attention_keeps_the_size(text: str) -> None:
    given = {**SMALL, "space": "full", "axes": ("ffn", "groups"), "multiple_of": 1, "calibration": text}
    result = billhook.prune(tiny.model("llama"), tokenizer=tiny.tokenizer(), **given)
    record = result.record["search"]
    assert "attention" in record["dimensions"] and {one["attention"] for one in record["trials"]} == {0, 1}
    assert result.record["sizes"]["achieved_ratio"] == pytest.approx(0.3, abs=0.02)


@pytest.mark.parametrize("shape", [Shape(), Shape(1, 1), Shape(0, 0, 0.8, -0.4), Shape(1, 0, -0.8, 0.8)])
def test_a_shape_saves_as_much_and_spares_what_it_says(shape: Shape) -> None:
    model = tiny.model("llama_bias")
    base = BaseCut(model, even_plan(3, {"ffn": 12}), 1, "per_layer")
    plan = shaped(base, shape, 0.1)
    drops = [plan.drops[n, "ffn"] for n in range(3)]
    assert sum(drops) == 36
    assert all(drops[n] == 0 for n in range(shape.first)) and all(drops[2 - n] == 0 for n in range(shape.last))
    if shape == Shape(0, 0, 0.8, -0.4):
        assert drops[0] < drops[2]


def test_a_shape_that_spares_too_much_is_refused() -> None:
    with pytest.raises(BillhookError, match="spares too many layers"):
        shaped(base_cut({"ffn": 32}, "per_layer"), Shape(2, 1), 0.3)


def test_a_large_cut_leaves_shapes_room(text: str) -> None:
    model, chosen = tiny.model("llama"), recipe(**{**SMALL, "calibration": text, "layout": "per_layer"})
    inputs = read_inputs(load.Opened(model, tiny.tokenizer(), "tiny", None, model.dtype), asked(chosen))
    validation, base = inputs.texts.validation, BaseCut(model, even_plan(3, {"ffn": 32}), 4, "per_layer")
    measured_by, rungs = evaluator.evaluator_of(model, "nll", None), RungWindows(validation.rungs)
    problem = prepare(base, asked(chosen), inputs.pool, validation, measured_by, rungs, Run())
    drops = [problem.plan(Candidate(shape=Shape(0, 0, 0.8, 0.0))).drops[n, "ffn"] for n in range(3)]
    assert sum(drops) == 96
    assert drops[2] == 40  # of 48, where an even cut leaves 16: half of that stays, and three tenths would be 15


def test_rungs_come_in_turn_and_none_twice_at_once() -> None:
    rungs = RungWindows(torch.arange(5)[:, None])
    taken = [rungs.take(count)[:, 0].tolist() for count in (3, 4, 64)]
    assert taken == [[0, 1, 2], [3, 4, 0, 1], [2, 3, 4, 0, 1]] and rungs.used == 3 + 4 + 5


def test_the_front_comes_first() -> None:
    def trial(number: int, first: float, second: float) -> Trial:
        losses = {"promoted": [first, second], "standard": [0.0, 0.0]}
        return Trial(number, Candidate(Solution((1,))), str(number), losses=losses)

    steady, best, worse = trial(0, -0.2, -0.2), trial(1, -0.6, 0.0), trial(2, 0.1, 0.3)
    assert [t.number for t in by_fronts([worse, steady, best])] == [1, 0, 2]


def test_gains_are_paired() -> None:
    assert paired_gain([1.0, 3.0], [0.5, 2.5]) == {"gain": 0.5, "standard_error": 0.0}
    assert paired_gain([1.0], [0.5])["standard_error"] is None


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"trials": 0}, "trials 0"),
        ({"pool": 9999}, r"text 'words' has \d+ windows of 32 tokens for the pool, fewer than 9999"),
        ({"space": "everything"}, "unknown space 'everything'"),
        ({"space": "budgets"}, "leaves nothing to choose here: budgets need a cut as large as a layer, or"),
        ({"space": "samples", "pool": 8, "clusters": 1}, "leaves nothing to choose here"),
        ({"sampler": "tpee"}, "unknown sampler 'tpee': did you mean 'tpe'"),
        ({"objective": "ppl"}, "unknown objective 'ppl'"),
        ({"minutes": 1e-4}, r"minutes 0.0001 is too short for one trial"),
        ({"clusters": 9}, "clusters 9"),
        ({"allocation": "global"}, "adapruner has no allocation"),
        ({"ratio": None, "vocab_from": ("demo",)}, "no budget: give ratio"),
        ({"axes": ("value",), "layout": "per_layer"}, "adapruner does not prune 'value'"),
    ],
)
def test_bad_input_is_refused(text: str, wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(BillhookError, match=message):
        found(text, **wrong)


def test_validation_that_shares_windows_with_calibration_is_refused(text: str, tmp_path: Path) -> None:
    own = tmp_path / "valid.txt"
    own.write_text(tiny.text(6000, 400)[3000:9000])
    with pytest.raises(BillhookError, match=r"\d+ of the \d+ windows of validation are also in the calibration text"):
        found(text, validation=(str(own),))


def test_without_optuna_the_extra_is_named(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "optuna", None)
    with pytest.raises(BillhookError, match=r"billhook\[search\]"):
        found(text)


def test_a_search_reads_several_texts(text: str, tmp_path: Path) -> None:
    other = tmp_path / "other.txt"
    other.write_text(tiny.text(9000, 500)[30000:].upper())
    record = found(f"{text}+{other}")
    assert record["pool"]["sources"] == ["words", "other"] and record["judges"] == [
        "the last fifth of words",
        "the last fifth of other",
    ]
    assert data.calibration_text(f"{text}+{other}").name == "words+other"
    assert math.isclose(sum(record["pool"]["shares"]), 1, abs_tol=1e-4)


def test_it_competes_like_any_method(text: str, tmp_path: Path) -> None:
    source = tmp_path / "model"
    tiny.model("llama").save_pretrained(source)
    tiny.tokenizer().save_pretrained(source)
    opened = load.open_model(str(source))
    by = compare.judged(opened, [data.Text("words", tiny.text(300))], 32, 4, tmp_path / "kept")
    compared = [contenders.contender(one) for one in ("adapruner:trials=10,pool=24,pool_len=32", "fasp")]
    common = {"samples": 4, "seq_len": 64, "multiple_of": 4, "calibration": text}
    _, searched, fasp = compare.compare(opened, compared, [0.3], by, common)
    assert searched["error"] is None and searched["parameters"] == fasp["parameters"]


def test_trials_end_when_time_does(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "deadline", lambda *_: lambda: True)
    assert len(found(text)["trials"]) == ladder.BATCH


def test_fasps_own_score_is_among_the_standards_of_a_repair(whole: dict[str, Any]) -> None:
    names = [one["name"] for one in whole["finalists"]]
    count = adapruner.STANDARDS
    assert names[count] == "obs (FASP)" and all(isinstance(name, int) for name in names[count + 1 :])
    assert not any(
        one["by_fasp"] for one in whole["finalists"] if one["name"] != "obs (FASP)"
    )  # no budgets are open here


def test_budgets_stand_by_fasps_own_score_too(text: str) -> None:
    record = found(text, layout="per_layer")
    rows = record["finalists"][adapruner.STANDARDS + 1 :]
    own, again = ([one["name"] for one in rows if one["by_fasp"] is by_fasp] for by_fasp in (False, True))
    assert own == again and len(own) == ladder.FINALISTS


def test_where_fasps_own_score_is_best_it_is_what_prunes(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = adapruner.AdaPruner.finished

    def finished(self: adapruner.AdaPruner, candidates: Any, rung: Any) -> Any:
        return [
            losses if candidate.solution else ([0.0], [0.0] * len(losses[1]))
            for candidate, losses in zip(candidates, real(self, candidates, rung), strict=True)
        ]

    monkeypatch.setattr(adapruner.AdaPruner, "finished", finished)
    given = {**SMALL, "calibration": text, "seed": 5}
    result = billhook.prune(tiny.model("llama"), tokenizer=tiny.tokenizer(), **given)
    assert result.record["search"]["winner"]["solution"] is None and result.record["search"]["standard"] == "obs (FASP)"
    assert "beats" not in outcome_words(result.record["search"])
    assert sum(result.record["search"]["pool"]["shares"]) == 0


def test_no_restoration_in_the_papers_own_space() -> None:
    assert not recipe(method="adapruner", ratio=0.2, space="paper").settings.cut.restoration
    assert all(recipe(method=name, ratio=0.2).settings.cut.restoration for name in ("adapruner", "fasp"))
