"""A method in a package of its own, installed as any other: it is there wherever methods are."""

import json
import os
import sys
from pathlib import Path
from zipfile import ZipFile

import pytest
import torch
from processes import Child, forget_billhook
from transformers import AutoModelForCausalLM

PACKAGE = Path(__file__).parents[1] / "examples" / "own_method"


def where_it_is_installed(source: Path, site: Path, commands: list[list[str]]) -> None:
    """In a fresh process, and in one for all: as pip installs it, and as an interpreter starts that finds it there."""
    from setuptools import build_meta

    os.chdir(source)
    with ZipFile(site / build_meta.build_wheel(str(site))) as wheel:
        wheel.extractall(site)
    forget_billhook()
    sys.path.insert(0, str(site))
    os.environ["COLUMNS"] = "200"
    from billhook.cli import app

    for command in commands:
        app(command, standalone_mode=False)
        sys.stdout.write("\f")
    del sys.modules[__name__]  # the name of its own test as well
    own = [PACKAGE / "test_own_method.py", "-c", PACKAGE / "pyproject.toml", "-q"]
    sys.exit(pytest.main([*map(str, own), "-p", "no:cacheprovider", "-p", "no:xdist"]))


def test_it_is_there_wherever_methods_are(folder: Path, text_file: Path, tmp_path: Path) -> None:
    out, sizes = tmp_path / "out", ("--ratio", 0.2, "--multiple-of", 4)
    common = ("--calibration", text_file, "--samples", 4, "--seq-len", 32, "--text", text_file, "--windows", 2)
    ways = ("--methods", "own:multiple_of=4", "--methods", "fasp:multiple_of=4", "--ratio", 0.2)
    prune = ("prune", folder, "--method", "own", *sizes)
    commands = [
        ("methods",),
        ("methods", "own"),
        ("prune", "--help"),
        (*prune, "--power", 1, "--no-look", "-o", out),
        (*prune, "-o", tmp_path / "no", "--dry-run"),
        ("compare", folder, *ways, *common, "--json", "-"),
    ]
    given = [[str(word) for word in command] for command in commands]
    source, site = tmp_path / "source", tmp_path / "site"  # an installation writes beside its source
    for place in (source, site):
        place.mkdir()
    for name in ("own_method.py", "pyproject.toml"):
        (source / name).write_text((PACKAGE / name).read_text())
    code, said, errors = Child(where_it_is_installed, source, site, given, fresh=True).ended()
    assert code == 0, said + errors
    listed, own, options, _, foretold, compared, its_test = said.split("\f")
    assert "own          ffn: Channels by the size of their weights" in listed
    assert "--power" in own and "--method own:" in options
    small, wide = (AutoModelForCausalLM.from_pretrained(path) for path in (out, folder))
    kept, whole = (model.model.layers[0].mlp.down_proj.weight for model in (small, wide))
    assert torch.equal(kept, whole[:, whole.abs().sum(0).topk(kept.shape[1]).indices.sort().values])
    assert json.loads((out / "billhook.json").read_text())["recipe"]["power"] == 1
    assert "an estimate" in foretold
    points = json.loads(compared)["points"]
    assert [point["settings"] for point in points[1:]] == ["own:multiple_of=4", "fasp:multiple_of=4"]
    assert not any(point["error"] for point in points)
    assert "[100%]" in its_test
