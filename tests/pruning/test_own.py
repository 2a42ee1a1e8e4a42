"""Methods that are not billhook's own, in this process: they sweep, stand in recipe files, go on after a kill, and
share their layers where these are independent."""

import runpy
from pathlib import Path
from typing import Any

import pytest
import yaml
from folders import CutOffError, run, same
from transformers import AutoModelForCausalLM

import billhook
from billhook.cuts.narrowing import narrow
from billhook.cuts.parallel import shared
from billhook.cuts.settings import Narrowing
from billhook.errors import BillhookError
from billhook.methods import METHODS
from billhook.models import surgery
from billhook.models.axes import axes, reader_weight
from billhook.planning.command import command
from billhook.planning.method import Method, Opened, Planned, Run, Texts
from billhook.planning.recipe import Recipe
from billhook.pruning.recipe import read_recipe, recipe

EXAMPLE = Path(__file__).parents[2] / "examples" / "own_method" / "own_method.py"
SIZES: dict[str, Any] = {"ratio": 0.2, "multiple_of": 4}


class Scored(Method):
    """Units go by the norm of the columns that read them; each layer is cut as if it were alone."""

    name, title, paper, does, needs, costs, example = ("scored",) * 7
    kinds = default_kinds = ("ffn",)

    def why_alone(self, recipe: Recipe) -> str:
        return ""

    def plan(self, opened: Opened, recipe: Recipe, texts: Texts, run: Run) -> Planned:
        from billhook.planning.axis_plan import axis_plan

        model, settings = opened.model, Narrowing(restoration=False, stream="dense")
        scores = {
            (axis.layer, axis.kind): axis.pool(reader_weight(model, axis).double().norm(dim=0))
            for axis in axes(model, recipe.kinds)
        }
        return Planned(axis_plan(opened, recipe, settings, texts, scores, run), settings, scores)

    def carry_out(self, model: Any, texts: Texts, planned: Planned, run: Run) -> dict[str, Any]:
        cut = shared if run.workers.many else narrow
        return {"cuts": cut(model, texts.calibration, planned.plan, planned.settings, run, planned.scores)}


@pytest.fixture(params=["own", "scored"])
def method(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Method:
    """A method that is there as those of other packages are: the example's, and one that shares its layers."""
    made = Scored() if request.param == "scored" else runpy.run_path(str(EXAMPLE))["METHOD"]
    monkeypatch.setitem(METHODS, made.name, made)
    return made


@pytest.fixture
def common(text_file: Path) -> dict[str, Any]:
    return {"calibration": str(text_file), "samples": 6, "seq_len": 32}


def test_it_sweeps(method: Method, folder: Path, common: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BILLHOOK_CACHE", str(folder.parent / "cache"))
    how = {"text": [common["calibration"]], "windows": 2, "quiet": True, **common}
    whole, *points = billhook.sweep(folder, [0.2, 0.4], method=f"{method.name}:multiple_of=4", **how)
    assert not any(point["error"] for point in points)
    for point in points:
        alone = billhook.prune(str(folder), method=method, quiet=True, **common, **SIZES | {"ratio": point["ratio"]})
        assert point["parameters"] == alone.model.num_parameters() < whole["parameters"]


def test_it_stands_in_a_recipe_file(
    method: Method, folder: Path, common: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own: dict[str, Any] = {"power": 1.5} if "power" in method.Settings.model_fields else {}
    chosen, path = recipe(method.name, **common, **SIZES, **own), tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({"model": str(folder), **chosen.nested()}))
    assert read_recipe(path).recipe == chosen and f"--method {method.name} " in command(chosen, "demo")
    assert all(f"--{name} {value}" in command(chosen, "demo") for name, value in own.items())
    assert run("run", path, "-o", tmp_path / "by-file") == ""
    alone = billhook.prune(str(folder), method=method, quiet=True, **common, **SIZES, **own)
    assert same(tmp_path / "by-file", alone.save(tmp_path / "alone"))
    path.write_text(yaml.safe_dump({"model": str(folder), "method": {"name": method.name, "stream": "dense"}}))
    assert "--stream belongs to --method fasp" in run("run", path, "-o", tmp_path / "no")


def test_it_goes_on_after_a_kill(
    method: Method, folder: Path, common: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = billhook.prune(str(folder), method=method, quiet=True, **common, **SIZES).save(tmp_path / "whole")
    remove, seen = surgery.remove, list[int]()

    def cut_off(model: Any, axis: Any, units: Any) -> None:
        if len(seen) == 2:
            raise CutOffError
        seen.append(axis.layer)
        remove(model, axis, units)

    given = {"method": method, "work": tmp_path / "work", "quiet": True, **common}
    with monkeypatch.context() as patch, pytest.raises(CutOffError):
        for module in ("billhook.models.surgery", "billhook.cuts.narrowing"):
            patch.setattr(f"{module}.remove", cut_off)
        billhook.prune(str(folder), **given, **SIZES)
    assert len(list((tmp_path / "work").glob("layer-*.json"))) == (2 if method.name == "scored" else 0)
    with pytest.raises(BillhookError, match="fresh"):
        billhook.prune(str(folder), **given, **SIZES | {"ratio": 0.4})
    assert same(whole, billhook.prune(str(folder), **given, **SIZES).save(tmp_path / "again"))


def test_its_layers_are_shared_or_it_says_why_not(
    method: Method, folder: Path, common: dict[str, Any], tmp_path: Path
) -> None:
    given = {"method": method, "quiet": True, **common, **SIZES}
    if method.name == "own":
        with pytest.raises(BillhookError, match=r"^jobs: own works in one process: leave it out$"):
            billhook.prune(str(folder), jobs=2, **given)
        return
    alone, many = (billhook.prune(str(folder), jobs=jobs, **given) for jobs in (1, 2))
    assert same(alone.save(tmp_path / "alone"), many.save(tmp_path / "many"))
    assert many.record["cuts"] == alone.record["cuts"]
    size = AutoModelForCausalLM.from_pretrained(tmp_path / "many").num_parameters()
    assert size == alone.model.num_parameters()
