"""Stock clients see what billhook itself imports from, wherever it lies, and no billhook."""

import json
import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest
import test_bad_input
from folders import written
from test_bad_input import Bench

from billhook.checkpoints.clients import check
from billhook.runtime import interpreters

bench = test_bad_input.bench

WAYS = ("PYTHONPATH", "--target", "user site")
PARENT = """
import importlib.util, subprocess, sys
from pathlib import Path
module, script, *more = sys.argv[1:]
sys.path[:0] = more
spec = importlib.util.spec_from_file_location("interpreters", module)
known = importlib.util.module_from_spec(spec)
spec.loader.exec_module(known)
print(known.why_not("torch", "transformers"), flush=True)
subprocess.run(known.command(sys.executable, Path(script), "a folder"), cwd="/", check=True)
"""
CHILD = """
import sys, torch, transformers
try:
    import billhook
    sys.exit("there is a billhook")
except ImportError:
    print(__name__, sys.argv[1:], torch.__file__, sys.modules.get("billhook"))
"""


@pytest.fixture
def bare(tmp_path: Path) -> str:
    """A Python of its own without packages."""
    venv.create(tmp_path / "bare", symlinks=True)
    return str(tmp_path / "bare" / "bin" / "python")


def installed(way: str, packages: Path, bare: str) -> tuple[list[str], dict[str, str]]:
    """A Python, with its arguments in front of a script, and the environment in which it imports what lies in
    `packages`."""
    plain = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONNOUSERSITE")}
    if way == "PYTHONPATH":
        return [bare], plain | {"PYTHONPATH": str(packages)}
    if way == "--target":
        return [bare], plain
    base = str(
        Path(sys.base_prefix) / "bin" / f"python{sysconfig.get_python_version()}"
    )  # an environment has no user site
    site = packages.parent / "user" / "lib" / f"python{sysconfig.get_python_version()}" / "site-packages"
    site.parent.mkdir(parents=True)
    site.symlink_to(packages)
    return [base], plain | {"PYTHONUSERBASE": str(packages.parent / "user")}


@pytest.mark.parametrize("way", WAYS)
def test_a_client_imports_from_where_this_process_does(way: str, bare: str, tmp_path: Path) -> None:
    packages, script = tmp_path / "packages", tmp_path / "child.py"
    for name in ("torch", "transformers", "billhook"):
        (packages / name).mkdir(parents=True)
        (packages / name / "__init__.py").touch()
    script.write_text(CHILD)
    python, environment = installed(way, packages, bare)
    given = ["-c", PARENT, interpreters.__file__, str(script)] + [str(packages)] * (way == "--target")
    done = subprocess.run([*python, *given], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    why, said = done.stdout.splitlines()
    assert why == "" and said.startswith("__main__ ['a folder'] ") and said.endswith("torch/__init__.py None")


@pytest.mark.slow
def test_stock_transformers_may_lie_anywhere(bare: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The client's own code and the real packages: nothing but this process's path leads there."""
    monkeypatch.setattr(sys, "executable", bare)
    assert check.check(folder, "transformers")["tokens"] == "equal"


def test_where_no_client_could_be_asked_no_work_begins(
    bare: str, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused = r"^billhook: error: what is written could not be checked: .*, started anew, has no stock transformers \({}\): install"
    recover = ("recover", bench.model, "--teacher", bench.model, "--tokens", "1k", "-o", bench.tmp / "new" / "out")
    absent = str(bench.tmp / "nowhere")
    monkeypatch.setattr(interpreters, "_path", lambda: [str(bench.tmp)])
    for python, why in ((bare, "No module named 'torch'"), (absent, "No such file or directory"), ("", ".* is empty")):
        monkeypatch.setattr(sys, "executable", python)
        for arguments in (bench.prune(), recover):
            bench.refuses(refused.format(why), *arguments)


def test_another_interpreter_has_a_path_of_its_own(bare: str) -> None:
    assert interpreters.command(bare, Path("client.py"), "x") == [bare, "-I", "client.py", "x"]
    assert interpreters.command(sys.executable, Path("client.py"), "x")[-2:] == ["client.py", "x"]
    assert json.dumps(sys.path[-1]) in interpreters.command(sys.executable, Path("client.py"))[4]


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_a_prune_is_verified_however_it_was_installed(way: str, bare: str, text_file: Path, tmp_path: Path) -> None:
    """All of billhook lies where torch does, as pip lays it."""
    model, packages = written("llama", tmp_path / "model"), tmp_path / "packages"
    packages.mkdir()
    here = [Path(entry) for entry in sys.path if entry.endswith("-packages")]
    for one in (Path(interpreters.__file__).parent, *(one for entry in here for one in entry.iterdir())):
        if one.suffix != ".pth" and not (packages / one.name).exists():
            (packages / one.name).symlink_to(one)
    python, environment = installed(way, packages, bare)
    start = f"import sys; sys.path.insert(0, {str(packages)!r}); " if way == "--target" else ""
    given = ["prune", model, "-o", tmp_path / "out", "--calibration", text_file, "--ratio", 0.2, "--samples", 10]
    given += ["--method", "fasp", "--seq-len", 32, "--multiple-of", 2]
    done = subprocess.run(
        [*python, "-c", f"{start}from billhook.cli import main; main()", *map(str, given)],
        **{"capture_output": True, "text": True, "env": environment},
    )
    assert done.returncode == 0, done.stderr
    (seen,) = json.loads((tmp_path / "out" / "billhook.json").read_text())["loads"]
    assert seen["tokens"] == "equal"
