"""A method in a package of its own, installed as any other: it is there wherever methods are."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

PACKAGE = Path(__file__).parents[1] / "examples" / "own_method"
ALL = """
import json, sys
import pytest
from billhook.cli import app
for command in json.loads(sys.argv[1]):
    app(command, standalone_mode=False)
    print(chr(12))
sys.exit(pytest.main([sys.argv[2], "-c", sys.argv[3], "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]))
"""  # in one process: to start one takes longer than a command


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the package is installed."""
    site = tmp_path_factory.mktemp("site")
    quiet = ("--quiet", "--disable-pip-version-check")
    how = ["--no-deps", "--no-build-isolation", "--no-index", "--target", site]
    source = tmp_path_factory.mktemp("source")  # an installation writes beside its source
    for name in ("own_method.py", "pyproject.toml"):
        (source / name).write_text((PACKAGE / name).read_text())
    subprocess.run([sys.executable, "-m", "pip", "install", *quiet, *how, source], check=True)
    return site


def test_it_is_there_wherever_methods_are(site: Path, folder: Path, text_file: Path, tmp_path: Path) -> None:
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
    given = json.dumps([[str(word) for word in command] for command in commands])
    environment = os.environ | {"PYTHONPATH": str(site), "COLUMNS": "200"}
    run = [sys.executable, "-c", ALL, given, PACKAGE / "test_own_method.py", PACKAGE / "pyproject.toml"]
    done = subprocess.run(run, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    listed, own, options, _, foretold, compared, its_test = done.stdout.split("\f")
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
