"""The default method: what it tries, what it takes, and that what comes out is as large as asked for."""

import runpy
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any, NoReturn

import pytest
import test_allocation
import tiny
import torch
from folders import CutOffError, run, same

import billhook
from billhook.calibration.nearness import Standard
from billhook.checkpoints.load import Opened
from billhook.cli.methods import page
from billhook.cuts.settings import Chopping
from billhook.errors import BillhookError
from billhook.methods import auto as auto_method
from billhook.methods import layerchop
from billhook.methods.minutes import Work, spent
from billhook.methods.rivals import RIVALS
from billhook.methods.trials import best
from billhook.models.families import layers
from billhook.models.plan import Plan
from billhook.planning import axis_plan, sensitivity
from billhook.planning.method import Planned
from billhook.planning.texts import Texts, with_another_kind
from billhook.pruning import rehearsal
from billhook.pruning.dry_run import estimate
from billhook.pruning.recipe import recipe
from billhook.reports.cut_tables import calibration_words, cut_rows
from billhook.reports.page import render
from billhook.runtime.progress import quiet
from billhook.runtime.run import Run
from billhook.training import refinement


def prune(model: Any, text: Path, **settings: Any) -> Any:
    given = {"ratio": 0.3, "calibration": str(text), "samples": 5, "probes": 2, "seq_len": 24, "multiple_of": 8}
    return billhook.prune(model, method="auto", tokenizer=tiny.tokenizer(), quiet=True, **{**given, **settings})


def deep(family: str = "llama", total: int = 6) -> Any:
    return tiny.model(family, num_hidden_layers=total)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The default with a third gone, of the text that all tests have."""
    text = tmp_path_factory.mktemp("text") / "words.txt"
    text.write_text(tiny.text())
    return prune(deep(), text, ratio=1 / 3, look=False)


def test_layers_that_add_nothing_go_whole(text_file: Path) -> None:
    model = deep()
    for n in (2, 3):
        for param in layers(model)[n].parameters():
            param.data *= 0
    result = prune(model, text_file, ratio=1 / 3)
    assert result.record["auto"]["chosen"] == "whole layers" and result.record["dropped_layers"] == [2, 3]


def test_the_winner_is_the_best_of_what_was_tried(text_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, list[float]]] = []

    def noted(losses: dict[str, list[float]]) -> str:
        seen.append(losses)
        return best(losses)

    monkeypatch.setattr(auto_method, "best", noted)
    for effort, count in (("quick", 0), ("normal", 3)):
        seen.clear()
        auto = prune(deep(), text_file, ratio=1 / 3, effort=effort, refine=False).record["auto"]
        assert len(auto["tried"]) == count and len(seen) == bool(count)
        if count:
            assert auto["chosen"] == best(seen[0])
            assert auto["tried"] == {name: pytest.approx(fmean(each)) for name, each in seen[0].items()}


def test_two_kinds_of_text_judge_in_turns(text_file: Path) -> None:
    texts = Texts(tiny.tokens(4), tiny.tokens(2))
    opened, length = Opened(deep(), tiny.tokenizer(), "", None, torch.float32), texts.probe.shape[1]
    wiki = recipe(method="auto", ratio=0.3, calibration=str(text_file), seq_len=length)
    both = with_another_kind(texts, opened, wiki, "reference", quiet)
    assert torch.equal(both.judges[::2], texts.probe) and torch.equal(both.judges[1::2], both.elsewhere.tokens)
    assert both.record(length)["elsewhere"] == {"source": "Python's language reference", "windows": 2}
    assert texts.judges is texts.probe and wiki.settings.second(wiki.calibration) == "reference"
    mixed = recipe(method="auto", ratio=0.3, calibration="demo+mixed")
    own = recipe(method="auto", ratio=0.3, calibration=str(text_file), judge="own")
    assert mixed.settings.second(mixed.calibration) is own.settings.second(own.calibration) is None
    given = recipe(method="auto", ratio=0.3, calibration="mixed", judge=str(text_file))
    assert given.settings.second(given.calibration) == str(text_file)


def test_a_text_of_ones_own_judges(text_file: Path, tmp_path: Path) -> None:
    """The report, the command and the dry run know it; what cannot judge is refused in a line."""
    other, short = tmp_path / "other.txt", tmp_path / "short.txt"
    other.write_text(" ".join(f"{n} weirs and {n + 1} sluices" for n in range(0, 900, 7)))
    short.write_text("Weirs.")
    given = {"ratio": 1 / 3, "refine": False}
    found, own, plain = (
        prune(deep(), text_file, **given, **more) for more in ({"judge": str(other)}, {"judge": "own"}, {})
    )
    assert found.record["calibration"]["elsewhere"] == {"source": "other", "windows": 2}
    assert "2 of other" in calibration_words(found.record)
    assert f"--judge {other}" in found.record["command"] and "--judge" not in plain.record["command"]
    assert "elsewhere" not in own.record["calibration"] and plain.record["calibration"]["elsewhere"]["windows"] == 2
    losses = [one.record["auto"]["tried"]["whole layers"] for one in (found, own, plain)]
    assert len(set(losses)) == 3 and recipe(ratio=0.3, judge=str(other)).settings.texts == (str(other),)
    for wrong, says in (
        (short, "less than one window"),
        (text_file, "are also in what is calibrated on"),
        (tmp_path / "none.txt", "does not exist"),
        ("", "no text named"),
    ):
        with pytest.raises(BillhookError, match=says) as error:
            prune(deep(), text_file, **given, judge=str(wrong))
        assert "\n" not in str(error.value)


def test_a_text_that_judges_is_priced(text_file: Path) -> None:
    """A second text is judged by as often as the first; own windows alone are half of it."""
    two, one = (
        Work.of(deep(), 8, recipe(method="auto", ratio=0.3, calibration=str(text_file), judge=judge))
        for judge in ("reference", "own")
    )
    assert (two.judges, one.judges) == (16, 8)


def test_two_thirds_of_the_layers_go_and_widths_with_them(text_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auto_method, "best", lambda _: "whole layers and equal widths")
    record = prune(deep(total=8), text_file, ratio=0.5, multiple_of=2, refine=False).record
    assert len(record["dropped_layers"]) == 2 and {cut["kind"] for cut in record["cuts"]} == {"ffn"}
    assert abs(record["sizes"]["achieved_ratio"] - 0.5) < 0.02


@pytest.mark.parametrize("ratio", [0.1, 0.25, 0.4])
def test_whole_layers_and_widths_meet_a_budget_together(text_file: Path, ratio: float) -> None:
    result = prune(deep(total=8), text_file, ratio=ratio, effort="quick", multiple_of=2)
    size = result.record["sizes"]
    assert abs(size["achieved_ratio"] - ratio) < 0.02


@pytest.mark.parametrize("layout", ["uniform", "per_layer"])
@pytest.mark.parametrize("axes", [("ffn",), ("layers",), ("ffn", "layers")])
@pytest.mark.covering
def test_axes_say_what_may_go(text_file: Path, axes: tuple[str, ...], layout: str) -> None:
    result = prune(deep(), text_file, ratio=1 / 3, axes=axes, layout=layout, multiple_of=2, refine=False)
    assert ("layers" in axes) or not result.record["dropped_layers"]
    assert ("ffn" in axes) or not any(cut["dropped"] for cut in result.record["cuts"])


def test_what_no_rival_can_give_is_refused_in_one_line(text_file: Path) -> None:
    with pytest.raises(BillhookError) as error:
        prune(deep(), text_file, axes=("heads",))
    assert "\n" not in str(error.value) and "axes" in str(error.value)
    with pytest.raises(BillhookError, match="leave out allocation"):
        prune(deep(), text_file, allocation="sensitivity", layout="per_layer")


@pytest.mark.parametrize("family", ["granite", "mistral", "phi3", "qwen2"])
@pytest.mark.covering(some={"family": 4})
def test_which_family_it_is_does_not_show(text_file: Path, plain: Any, family: str) -> None:
    """The same function, written as another family, is cut in the same places, and as well."""
    carried = runpy.run_path(str(Path(__file__).parents[2] / "benchmarks" / "carry_over.py"))["carried"]
    other = prune(carried(deep(), family), text_file, ratio=1 / 3)
    first, second = plain.record["auto"], other.record["auto"]
    assert first["chosen"] == second["chosen"] and plain.record["dropped_layers"] == other.record["dropped_layers"]
    assert first["tried"] == pytest.approx(second["tried"], rel=1e-2)
    ids = tiny.tokens()
    assert (plain.model(ids).logits - other.model(ids).logits).norm() <= 1e-2 * plain.model(ids).logits.norm()


def test_refinement_can_be_left_out(text_file: Path) -> None:
    refined, plain = (prune(deep(), text_file, ratio=1 / 3, effort="quick", refine=on) for on in (True, False))
    assert "refined" not in plain.record and refined.record["refined"]
    assert any("refined" in name for name, _ in cut_rows(refined.record))
    assert any(
        not torch.equal(a, b) for a, b in zip(refined.model.parameters(), plain.model.parameters(), strict=True)
    ) == any(one["kept"] for one in refined.record["refined"])


def test_the_same_prune_is_made_twice(text_file: Path, plain: Any) -> None:
    again = prune(deep(), text_file, ratio=1 / 3)
    assert all(torch.equal(a, b) for a, b in zip(again.model.parameters(), plain.model.parameters(), strict=True))


def test_what_was_tried_is_not_tried_again_after_a_kill(
    text_file: Path, plain: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refine, refined = refinement.refine, []

    def cut_off(*given: Any) -> Any:
        refined.append(1)
        if len(refined) > 3:  # whole layers, widths and both were tried
            raise CutOffError
        return refine(*given)

    work = tmp_path / "work"
    with monkeypatch.context() as broken:
        broken.setattr(refinement, "refine", cut_off)
        with pytest.raises(CutOffError):
            prune(deep(), text_file, ratio=1 / 3, work=work)
    for other, says in (({"ratio": 0.5}, "ratio"), ({"ratio": 1 / 3, "judge": "own"}, "judge, second text")):
        with pytest.raises(BillhookError, match=f"differs in {says}"):
            prune(deep(), text_file, work=work, **other)
    monkeypatch.setattr(Standard, "divergences", None)
    again = prune(deep(), text_file, ratio=1 / 3, work=work)
    assert all(again.record["auto"][name] == plain.record["auto"][name] for name in ("chosen", "tried", "refused"))
    assert all(torch.equal(a, b) for a, b in zip(again.model.parameters(), plain.model.parameters(), strict=True))


def test_one_window_is_too_few_to_refine_on(text_file: Path) -> None:
    with pytest.raises(BillhookError, match="raise samples"):
        prune(deep(), text_file, samples=1)
    assert prune(deep(), text_file, samples=2, ratio=1 / 3, effort="quick").record["refined"]
    assert prune(deep(), text_file, samples=1, ratio=1 / 3, effort="quick", refine=False).record["dropped_layers"]


def test_layers_and_uneven_widths_meet_a_budget_together(text_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all that the per_layer layout can hold; what one rival measures is not measured for another."""
    measured: list[int] = []
    curves = sensitivity.curves
    monkeypatch.setattr(axis_plan, "curves", lambda *a, **k: (measured.append(1), curves(*a, **k))[1])
    name = "whole layers and uneven widths"
    monkeypatch.setattr(auto_method, "best", lambda losses: name)
    record = prune(deep(total=8), text_file, layout="per_layer", ratio=0.4, multiple_of=2, refine=False).record
    assert list(record["auto"]["tried"]) == ["whole layers", name, "uneven widths"] and measured == [1]
    assert len(record["dropped_layers"]) == 1 and any(cut["dropped"] for cut in record["cuts"])
    assert abs(record["sizes"]["achieved_ratio"] - 0.4) < 0.02


def test_minutes_say_how_much_is_tried_and_how_long_it_is_refined(text_file: Path) -> None:
    record = prune(deep(), text_file, ratio=1 / 3, minutes=1).record
    assert len(record["auto"]["tried"]) > 1 and record["calibration"]["windows"] == 5
    assert " of 1, before it was written" in dict(cut_rows(record))["minutes"]
    uneven: dict[str, Any] = {"layout": "per_layer", "axes": ("ffn",), "multiple_of": 2}
    assert prune(deep(), text_file, minutes=1, refine=False, **uneven).record["cuts"]
    with pytest.raises(BillhookError, match="the quickest cut takes about"):
        prune(deep(), text_file, ratio=1 / 3, minutes=1e-6)
    with pytest.raises(BillhookError, match="give one"):
        prune(deep(), text_file, minutes=1, effort="quick")


def test_a_refinement_has_what_the_rest_has_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever was foretold: of two minutes 70 seconds are gone, and a look of ten is to come."""
    given: list[Any] = []
    monkeypatch.setattr(refinement, "aims", lambda *_: None)
    monkeypatch.setattr(refinement, "refine", lambda *all_of_it: given.append(all_of_it[3]) or [])
    monkeypatch.setattr(type(layerchop.METHOD), "carry_out", lambda *_: {})
    planned, refining = Planned(Plan(layers=(2, 3)), Chopping()), refinement.Refining(seconds=1.0)
    run = Run()
    run.clock.seconds |= {"look": 10.0, "trials": 60.0}
    for minutes in (2, 0.5, None):
        won = auto_method.Won(layerchop.METHOD, planned, refining, minutes=minutes)
        auto_method.METHOD.carry_out(deep(), Texts(tiny.tokens(4), tiny.tokens(2)), Planned(planned.plan, won), run)
    assert [one.seconds for one in given] == [40.0, 1.0, 1.0]


def test_more_minutes_are_never_spent_on_less() -> None:
    """By a cost that is made up: what is tried grows with the time, and a refinement has what is left of it."""
    price = 0.05, 0.4, 0.2
    work, rivals = Work(30, 64, 8, 16, 8.0, 6, True, 10, True), [one for one in RIVALS if "uniform" in one.layouts]
    chosen = [spent(minutes, work, rivals, (True, False), price) for minutes in (3, 8, 12, 20, 60)]
    assert [one.rivals for one in chosen] == sorted(one.rivals for one in chosen)
    for minutes, effort in zip((3, 8, 12, 20, 60), chosen, strict=True):
        stages = work.stages(replace(effort, passes=0), rivals[: effort.rivals], True)
        assert sum(one.seconds(*price) for one in stages.values()) + (effort.seconds or 0) == pytest.approx(
            60 * minutes
        )
    assert chosen[-1].rivals > chosen[0].rivals and chosen[-1].windows > chosen[0].windows


def test_a_dry_run_fills_the_minutes(text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a price that is made up: two measurements on a busy machine are far apart."""
    monkeypatch.setattr(rehearsal, "window_seconds", lambda *_: (0.01, 0.02, 0.05))
    model = in_files("llama", tmp_path / "model")
    given = {"ratio": 1 / 3, "calibration": str(text_file), "samples": 8, "seq_len": 24, "multiple_of": 2}
    own = {"layers", "trials", "patch", "goals", "look"}

    def said(minutes: float) -> tuple[dict[str, Any], float]:
        stages = estimate(str(model), recipe(minutes=minutes, **given), tmp_path / "out")["stages"]
        return stages, sum(one["seconds"] for name, one in stages.items() if name in own)

    plenty, others = said(100)
    assert "trials" in plenty
    seconds = others + plenty["refinement"]["seconds"] / 4
    tight, others = said(seconds / 60)
    assert tight["refinement"]["flops"] < plenty["refinement"]["flops"]
    assert others + tight["refinement"]["seconds"] == pytest.approx(seconds)


@pytest.mark.parametrize("axes", [(), ("ffn",), ("layers", "ffn")])
def test_a_dry_run_says_what_it_comes_to(axes: tuple[str, ...], text_file: Path, tmp_path: Path) -> None:
    model = in_files("llama", tmp_path / "model")
    given = {"ratio": 1 / 3, "calibration": str(text_file), "samples": 5, "seq_len": 24, "axes": axes, "multiple_of": 2}
    said = estimate(str(model), recipe(**given), tmp_path / "out")
    found = billhook.prune(model, quiet=True, probes=2, **given).record
    assert said["decoder_parameters"]["before"] == found["sizes"]["before"]["decoder_parameters"]
    gap = said["decoder_parameters"]["after"] / found["sizes"]["after"]["decoder_parameters"] - 1
    assert abs(gap) < 0.02  # another rival may have won
    assert {"refinement", "goals"} <= set(said["stages"]) & set(found["seconds"])
    assert said["stages"]["refinement"]["flops"] > 0 and said["peak_bytes"] > 0
    tried = said["will"].removeprefix("tries ").partition(" (each fitted on 5 windows")[0].split("; ")
    if "trials" in said["stages"]:
        assert set(found["auto"]["tried"]) <= set(tried)
    assert f"fitted on {found['calibration']['windows']} windows, then refined" in said["will"]


@pytest.mark.parametrize("family", ["qwen2_moe", "gpt2", "gemma2"])
def test_a_dry_run_tells_of_every_family(family: str, text_file: Path, tmp_path: Path) -> None:
    model = in_files(family, tmp_path / "model")
    given = {"ratio": 1 / 3, "calibration": str(text_file), "samples": 5, "seq_len": 24, "multiple_of": 8}
    said = estimate(str(model), recipe(**given), tmp_path / "out")["stages"]
    assert said["refinement"]["seconds"] > 0 and ("patch" in said) == (family != "gemma2")
    if family == "qwen2_moe":
        with pytest.raises(BillhookError, match="experts counts what its text does"):
            estimate(str(model), recipe(axes=("experts",), **given), tmp_path / "out")
        with pytest.raises(BillhookError, match="has no per_layer layout"):
            estimate(str(model), recipe(layout="per_layer", **given), tmp_path / "out")


def test_a_dry_run_of_weights_in_files_tells_of_a_refinement_and_no_trial(text_file: Path, tmp_path: Path) -> None:
    model = in_files("llama", tmp_path / "model")
    given = {"ratio": 1 / 3, "calibration": str(text_file), "samples": 5, "seq_len": 24}
    said, whole = (
        estimate(str(model), recipe(**given), tmp_path / "out", stream_weights=stream) for stream in (True, False)
    )
    assert {"trials", "look"} <= set(whole["stages"]) - set(said["stages"])
    assert {"layers", "goals", "refinement"} <= set(said["stages"])
    assert said["peak_bytes"] <= whole["peak_bytes"]
    with pytest.raises(BillhookError, match="weights are streamed"):
        estimate(str(model), recipe(minutes=1, **given), tmp_path / "out", stream_weights=True)


def test_layers_may_go_where_experts_may(text_file: Path) -> None:
    given = {"axes": ("layers", "experts"), "refine": False}
    record = prune(tiny.model("mixtral"), text_file, ratio=1 / 3, **given).record
    assert "whole layers" in record["auto"]["tried"], record["auto"]


def test_what_is_measured_first_is_not_foretold(text_file: Path, tmp_path: Path) -> None:
    model = in_files("llama", tmp_path / "model")
    given = {"ratio": 0.2, "calibration": str(text_file), "samples": 5, "seq_len": 24, "multiple_of": 2}
    with pytest.raises(BillhookError, match="uneven widths are measured"):
        estimate(str(model), recipe(layout="per_layer", axes=("ffn", "groups"), **given), tmp_path / "out")


def test_every_rival_says_what_it_cuts_once() -> None:
    assert len({one.name for one in RIVALS}) == len(RIVALS)
    assert all(one.kinds and one.layouts for one in RIVALS)


def in_files(family: str, to: Path) -> Path:
    test_allocation.deep(6, family).save_pretrained(to)
    tiny.tokenizer().save_pretrained(to)
    return to


def test_it_is_the_default(text_file: Path, folder: Path, tmp_path: Path) -> None:
    """What other methods need is refused by the name of the method that has it."""
    given = ["--ratio", 0.2, "--calibration", text_file, "--samples", 8, "--seq-len", 32, "-o", tmp_path / "out"]
    assert recipe(ratio=0.2).method.name == "auto"
    assert "--score belongs to --method fasp" in run("prune", folder, *given, "--score", "wanda")
    assert "leave it out" in run("prune", folder, *given, "--jobs", 2, "--effort", "quick")
    assert not (tmp_path / "out").exists() and "--effort" in page("auto")


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_weights_in_their_files_lose_the_same_layers_and_become_the_same(
    family: str, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without trials, which would copy the model, and with a refinement, if there is room to train a layer."""
    model = in_files(family, tmp_path / "model")
    given = {"ratio": 1 / 3, "calibration": str(text_file), "samples": 5, "seq_len": 24, "probes": 2}
    result = billhook.prune(model, stream_weights=True, quiet=True, **given)
    record, whole = result.record, billhook.prune(model, axes=("layers",), look=False, quiet=True, **given)
    assert record["recipe"]["method"] == "auto" and record["auto"]["tried"] == {}
    assert len(record["dropped_layers"]) == 2 and abs(record["sizes"]["achieved_ratio"] - 1 / 3) < 0.02
    assert record["refined"] == whole.record["refined"]
    result.save(tmp_path / "out")
    whole.save(tmp_path / "whole")
    assert same(tmp_path / "out", tmp_path / "whole")
    monkeypatch.setattr(auto_method, "ROOM", 1000)
    assert "refined" not in billhook.prune(model, stream_weights=True, quiet=True, **given).record
    refused: tuple[tuple[dict[str, Any], str], ...] = (
        ({"minutes": 1}, "weights are streamed"),
        ({"layout": "per_layer", "axes": ("ffn",)}, "measured on the whole model"),
    )
    for more, says in refused:
        with pytest.raises(BillhookError, match=says):
            billhook.prune(model, stream_weights=True, quiet=True, **given, **more)


@pytest.mark.parametrize("streamed", [False, True])
def test_a_killed_prune_of_a_folder_ends_in_the_same_bits(
    streamed: bool, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, work = in_files("llama", tmp_path / "model"), tmp_path / "work"

    def made(name: str) -> Path:
        given = {"ratio": 1 / 3, "calibration": str(text_file), "samples": 5, "seq_len": 24, "probes": 2}
        found = billhook.prune(model, work=work / name, stream_weights=streamed, quiet=True, **given)
        assert found.record["refined"]
        return found.save(tmp_path / name)

    def stop(*_: Any) -> NoReturn:
        raise CutOffError

    whole = made("whole")
    with monkeypatch.context() as patch, pytest.raises(CutOffError):
        patch.setattr("billhook.training.refinement.refine", stop)
        made("again")
    assert not (tmp_path / "again").exists()
    assert same(whole, made("again"))


@pytest.mark.usefixtures("looks")
def test_the_report_tells_what_was_chosen_refined_and_seen(text_file: Path) -> None:
    found = prune(deep(), text_file, ratio=1 / 3)
    rows = dict(cut_rows(found.record))
    assert {"chosen", "why", "trials", "refined", "repetition", "small tasks"} <= set(rows), list(rows)
    shown = render(found.page())
    assert all(name in shown for name in ("chosen", "refined", "small tasks"))
    assert "held-out windows" in rows["chosen"] and "tried: whole layers" in rows["chosen"]
    assert "in closed form" in rows["trials"] and rows["trials"].endswith(" s")


def test_it_is_compared_with_others(text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BILLHOOK_CACHE", str(tmp_path / "cache"))
    model = in_files("llama", tmp_path / "model")
    given = {"calibration": str(text_file), "samples": 5, "seq_len": 24, "probes": 2, "multiple_of": 4}
    found = billhook.compare(
        str(model), ["auto", "fasp"], [1 / 3], text=[str(text_file)], windows=2, quiet=True, **given
    )
    assert [point.series for point in found] == ["unpruned", "auto", "fasp"]
    assert [point.error for point in found] == [None] * 3
