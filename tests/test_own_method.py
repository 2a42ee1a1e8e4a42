"""A method in a package of its own, installed as any other: it is there wherever methods are."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

PACKAGE = Path(__file__).parents[1] / "examples" / "own_method"
SEVERAL = """
import json, sys
from billhook.cli import app
for command in json.loads(sys.argv[1]):
    app(command, standalone_mode=False)
    print(chr(12))
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """Runs Python where the package is installed; what it printed."""
    site = tmp_path_factory.mktemp("site")
    how = [
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "--disable-pip-version-check",
        "--target",
        site,
    ]
    source = tmp_path_factory.mktemp("source")  # an installation writes beside its source
    for file in PACKAGE.glob("own_method.py"), PACKAGE.glob("pyproject.toml"):
        for path in file:
            (source / path.name).write_text(path.read_text())
    subprocess.run([sys.executable, "-m", "pip", "install", *how, source], check=True)

    def ran(*words: object) -> str:
        done = subprocess.run(
            [sys.executable, *map(str, words)],
            env=os.environ | {"PYTHONPATH": str(site), "COLUMNS": "200"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return ran


def commands(run: Callable[..., str], *each: tuple[object, ...]) -> list[str]:
    """What commands of billhook print, all in one process: to start one takes longer than the command."""
    given = json.dumps([[str(word) for word in command] for command in each])
    return run("-c", SEVERAL, given).split("\f")[: len(each)]


def test_it_is_told_of(run: Callable[..., str]) -> None:
    all_of_them, own, prune = commands(run, ("methods",), ("methods", "own"), ("prune", "--help"))
    assert "own          ffn: Channels by the size of their weights" in all_of_them
    assert "--power" in own and "--method own:" in prune


def test_it_prunes_is_compared_and_foretold(
    run: Callable[..., str], folder: Path, text_file: Path, tmp_path: Path
) -> None:
    out, sizes = tmp_path / "out", ("--ratio", 0.2, "--multiple-of", 4)
    common = ("--calibration", text_file, "--samples", 4, "--seq-len", 32, "--text", text_file, "--windows", 2)
    ways = ("--methods", "own:multiple_of=4", "--methods", "fasp:multiple_of=4", "--ratio", 0.2)
    prune = ("prune", folder, "--method", "own", *sizes)
    _, foretold, compared = commands(
        run,
        (*prune, "--power", 1, "--no-look", "-o", out),
        (*prune, "-o", tmp_path / "no", "--dry-run"),
        ("compare", folder, *ways, *common, "--json", "-"),
    )
    small, wide = (AutoModelForCausalLM.from_pretrained(path) for path in (out, folder))
    kept, whole = (model.model.layers[0].mlp.down_proj.weight for model in (small, wide))
    assert torch.equal(kept, whole[:, whole.abs().sum(0).topk(kept.shape[1]).indices.sort().values])
    assert json.loads((out / "billhook.json").read_text())["recipe"]["power"] == 1
    assert "an estimate" in foretold
    points = json.loads(compared)["points"]
    assert [point["settings"] for point in points[1:]] == ["own:multiple_of=4", "fasp:multiple_of=4"]
    assert not any(point["error"] for point in points)


def test_its_own_test_passes(run: Callable[..., str]) -> None:
    assert "[100%]" in run("-m", "pytest", PACKAGE / "test_own_method.py", "-p", "no:cacheprovider", "-p", "no:xdist")
