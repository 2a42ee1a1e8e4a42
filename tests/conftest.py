"""Folders that the tests share: a tiny checkpoint, a text, and a cache that nothing is fetched into."""

import gc
import multiprocessing
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.extend(
    str(one) for one in (Path(__file__).parent, *Path(__file__).parent.iterdir()) if one.is_dir()
)  # shared helpers
# `checked` before billhook: what is imported after it is checked as it says; `processes` says what their server imports
import checked
import covering
import processes  # noqa: F401
import tiny
from folders import written

from billhook.checkpoints.clients import check
from billhook.reports import history, page

os.environ["OMP_NUM_THREADS"] = "1"  # for the subprocesses: on tiny tensors threads only wait for one another
torch.set_num_threads(1)
_frozen = [0]  # how many modules there were


@pytest.hookimpl(tryfirst=True)  # before `-m` deselects by marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    covering.thin(items)


@pytest.fixture(autouse=True)
def _collections_are_short() -> None:
    """Collections in the code under test take half a second where they walk all that was imported, here or by a test."""
    if len(sys.modules) != _frozen[0]:
        _frozen[0] = len(sys.modules)
        gc.collect()
        gc.freeze()


@pytest.fixture(autouse=True)
def _checks_begin_anew() -> None:
    checked.begin()


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("PIP_NO_INDEX", "1")


@pytest.fixture(autouse=True)
def _no_other_process(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check in a process of its own takes seconds, most of them imports: tests that mean it ask for `stock_client`."""
    if "stock_client" not in request.fixturenames and "slow" not in request.keywords:
        monkeypatch.setattr(
            check, "check", lambda path, client, python=None, trust=False: {"client": client, "version": "not run"}
        )


@pytest.fixture(autouse=True)
def _records_are_read_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever record a command writes, by any method, is one that the commands after it take."""
    save = page.save

    def saved(path: Path, *given: Any) -> None:
        save(path, *given)
        history.read(path.parent)

    monkeypatch.setattr(page, "save", saved)


@pytest.fixture(autouse=True)
def _workers_start_sooner(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes that billhook spawns to share work come from a server that has imported it once."""
    context = multiprocessing.get_context
    monkeypatch.setattr(
        multiprocessing, "get_context", lambda method=None: context("forkserver" if method == "spawn" else method)
    )


@pytest.fixture
def stock_client() -> None:
    """Have `prune` check its result in a separate process, as it does outside the tests."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny LLaMA checkpoint with tokenizer and tied embeddings."""
    out = tmp_path / "tiny-llama"
    tiny.model("llama").save_pretrained(out)
    tiny.tokenizer().save_pretrained(out)
    return out


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    path = tmp_path / "words.txt"
    path.write_text(tiny.text())
    return path


@pytest.fixture
def command(tmp_path: Path, text_file: Path) -> list[object]:
    model = written("llama", tmp_path / "model")
    given = ["--calibration", text_file, "--samples", 10, "--seq-len", 32, "--multiple-of", 2]
    return ["prune", model, "-o", tmp_path / "out", *given]
