"""Every benchmark starts and says how it is run; every table of results is whole, and says where its rows come from."""

import ast
import csv
import importlib
import inspect
import os
import re
import runpy
import sys
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import pytest
import yaml
from test_docs import anchors
from typer.testing import CliRunner

from billhook.cli import app
from billhook.evaluation import expected
from billhook.pruning.recipe import read_recipe

ROOT = Path(__file__).parents[1]
BENCHMARKS = ROOT / "benchmarks"
sys.path.append(str(BENCHMARKS))
results = importlib.import_module("results")
GPU = ("bare", "floors", "rows", "shapes")
# what benchmarks import; clients run in environments of their own
SHARED = [BENCHMARKS / f"{name}.py" for name in ("results", "scoring", *(f"gpu/{one}" for one in GPU))]
SCRIPTS = [p for p in sorted(BENCHMARKS.rglob("*.py")) if p not in SHARED and not p.stem.endswith("_client")]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
TABLES = ("ROWS", "THEIRS")  # of rows, by name
KEPT = sorted(results.FOLDER.glob("*.csv"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_help(script: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", [str(script), "--help"])
    monkeypatch.setattr(sys, "path", [str(script.parent), *sys.path])  # as Python itself does
    with mock.patch.dict(os.environ), pytest.raises(SystemExit) as left:
        runpy.run_path(str(script), run_name="__main__")
    assert left.value.code == 0 and f"usage: {script.name}" in capsys.readouterr().out


def imported(tree: ast.AST) -> dict[str, Any]:
    """What a source file imports of billhook, and of what benchmarks share, by the name that it has there."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {one.asname or one.name: importlib.import_module(one.name) for one in node.names if ours(one.name)}
        elif isinstance(node, ast.ImportFrom) and ours(node.module or ""):
            home = importlib.import_module(node.module or "")
            for one in node.names:
                inside = f"{node.module}.{one.name}"
                found[one.asname or one.name] = getattr(home, one.name, None) or importlib.import_module(inside)
    return found


def ours(module: str) -> bool:
    return module.split(".")[0] in ("billhook", "results", "scoring")


def stale(source: str) -> list[str]:
    """What is asked of billhook's modules, and given to its functions by name, that they do not have."""
    tree = ast.parse(source)
    names, wrong = imported(tree), []
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            owner = names.get(node.value.id)
            if isinstance(owner, ModuleType) and not hasattr(owner, node.attr):
                wrong.append(f"{node.value.id}.{node.attr}")
        elif isinstance(node, ast.Call):
            takes = accepted(node.func, names)
            wrong += [f"{ast.unparse(node.func)}({word.arg}=)" for word in node.keywords if word.arg not in takes]
    return wrong


class Anything:
    def __contains__(self, name: object) -> bool:
        return True


def accepted(func: ast.expr, names: dict[str, Any]) -> Any:
    """The names of what a function takes; anything, where that is not known."""
    known: Any = names.get(func.id) if isinstance(func, ast.Name) else None
    if isinstance(func, ast.Attribute) and isinstance(func.value, ast.Name):
        owner = names.get(func.value.id)
        known = getattr(owner, func.attr, None) if isinstance(owner, ModuleType) else None
    if not callable(known) or (
        isinstance(known, type) and issubclass(known, Exception)
    ):  # Python's own have no signature
        return Anything()
    parameters = inspect.signature(known).parameters
    if any(one.kind is inspect.Parameter.VAR_KEYWORD for one in parameters.values()):
        return Anything()
    return {None, *parameters}


@pytest.mark.parametrize("script", [*SCRIPTS, *SHARED, *EXAMPLES], ids=lambda path: path.stem)
def test_what_it_uses_is_there(script: Path) -> None:
    assert stale(script.read_text(encoding="utf-8")) == []


def test_what_is_not_there_is_seen() -> None:
    source = """
import billhook
from billhook.evaluation import perplexity
from billhook.models.plan import Plan
perplexity.nothing(1)
billhook.prune("demo", **settings)
Plan({}, layer=1)
local.nothing(a=1)
"""
    assert sorted(stale(source)) == ["Plan(layer=)", "perplexity.nothing"]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_the_list_has_it(script: Path) -> None:
    lines = (BENCHMARKS / "README.md").read_text(encoding="utf-8").splitlines()
    name = script.relative_to(BENCHMARKS)
    assert sum(line.startswith(f"| [{name}]({name}) |") for line in lines) == 1


@pytest.mark.parametrize("table", KEPT, ids=lambda path: path.stem)
def test_a_table_is_whole(table: Path) -> None:
    with table.open(newline="", encoding="utf-8") as file:
        header, *rows = csv.reader(file)
    settings = len(results.TABLES[table.stem][0].split())
    assert header == results.columns(table.stem) and rows
    assert {len(row) for row in rows} == {len(header)}
    assert len({tuple(row[:settings]) for row in rows}) == len(rows)  # no configuration twice


@pytest.mark.parametrize("table", KEPT, ids=lambda path: path.stem)
def test_a_row_says_where_it_comes_from(table: Path) -> None:
    rows = results.read(table.stem)
    assert all(row["command"] and row["date"] and (row["source"] or row["versions"]) for row in rows)
    for source in {row["source"] for row in rows} - {""}:
        page, _, anchor = source.partition("#")
        assert anchor in anchors(ROOT / page), source


def test_columns_are_told_apart() -> None:
    for name in results.TABLES:
        columns = results.columns(name)
        assert len(set(columns)) == len(columns)


def test_a_run_replaces_its_own_rows_and_adds_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = tmp_path / "some" / "text.txt"
    text.parent.mkdir()
    text.touch()
    monkeypatch.setattr(sys, "argv", [str(BENCHMARKS / "search_cost.py"), str(text), "--repeats", "3"])
    first = [{"model": "demo", "what": what, "seconds": 1 / 3, "least": None} for what in ("a trial", "a pass")]
    results.write("search_cost", first, tmp_path)
    results.write("search_cost", [{**first[0], "seconds": 2}, {**first[0], "model": text}], tmp_path)
    rows = results.read("search_cost", tmp_path)
    assert [(row["model"], row["what"], row["seconds"]) for row in rows] == [
        ("demo", "a trial", "2"),
        ("demo", "a pass", "0.333333"),
        ("text.txt", "a trial", "0.333333"),
    ]
    assert {row["least"] for row in rows} == {""}
    assert {row["command"] for row in rows} == {"python benchmarks/search_cost.py text.txt --repeats 3"}
    with pytest.raises(KeyError, match="no column pace"):
        results.write("search_cost", [{"pace": 1}], tmp_path)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_says_what_it_gives(path: Path) -> None:
    file = read_recipe(path)
    assert file.expect["tolerance"] > 0
    assert file.expect["numbers"].keys() == {"parameters", "perplexity on news", "perplexity on lee"}
    assert f"billhook run recipes/{path.name} -o OUT --check" in path.read_text(encoding="utf-8")
    assert f"| [{path.name}]({path.name}) |" in (path.parent / "README.md").read_text(encoding="utf-8")


def test_what_a_recipe_gives_is_read_from_what_run_prints(
    folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    numbers = {"parameters": 112_949_568.0, "perplexity on news": 38.625, "perplexity on lee": 0.5}
    monkeypatch.setattr(expected, "measure", lambda *given: numbers)
    expect = {"tolerance": 0.1, "numbers": {**numbers, "perplexity on lee": 44.45}}
    settings = {"ratio": 0.2, "calibration": str(text_file), "samples": 10, "seq_len": 32, "multiple_of": 2}
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({"model": str(folder), **settings, "expect": expect}))
    done = CliRunner().invoke(app, ["run", str(recipe), "-o", str(tmp_path / "out"), "--check"])
    assert importlib.import_module("recipes").measured(done.stdout) == numbers
    assert "not within 10.0% of what is expected: perplexity on lee" in str(done.exception)


def rows_of(script: str) -> set[str]:
    """The names of a benchmark's rows, where it has a table of them."""
    tree = ast.parse((BENCHMARKS / script).read_text(encoding="utf-8"))
    tables = [node for node in tree.body if isinstance(node, ast.Assign | ast.AnnAssign) and named(node) in TABLES]
    keys = [key for node in tables if isinstance(node.value, ast.Dict) for key in node.value.keys]
    return {key.value for key in keys if isinstance(key, ast.Constant)}


def named(node: ast.Assign | ast.AnnAssign) -> str:
    target = node.target if isinstance(node, ast.AnnAssign) else node.targets[0]
    return target.id if isinstance(target, ast.Name) else ""


def test_rows_that_pages_ask_for_are_there() -> None:
    asked = []
    for page in [ROOT / "README.md", BENCHMARKS / "README.md", *(ROOT / "docs").rglob("*.md")]:
        text = page.read_text(encoding="utf-8").replace("\\\n", " ")
        asked += re.findall(r"benchmarks/(\w+\.py)[^\n`]*? --rows\s+([\"'])(.*?)\2", text)
        asked += re.findall(r"`(\w+\.py) [^\n`]*? --rows\s+([\"'])(.*?)\2", text)
    checked = 0
    for script, _, rows in asked:
        there = rows_of(script)
        for row in rows.split(";" if ";" in rows else ",") if there else ():
            assert row.strip() in there, (script, row)
            checked += 1
    assert checked > 5
