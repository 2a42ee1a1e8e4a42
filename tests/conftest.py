"""Folders that the tests share: a tiny checkpoint, a text, and a cache that nothing is fetched into."""

import gc
import multiprocessing
import os
import shutil
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest

sys.path.extend(
    str(one) for one in (Path(__file__).parent, *Path(__file__).parent.iterdir()) if one.is_dir()
)  # shared helpers
# `checked` before billhook: what is imported after it is checked as it says.  What takes seconds to import comes later:
# the process that hands tests out to others needs none of it
import checked
import covering

os.environ["OMP_NUM_THREADS"] = "1"  # here and in subprocesses: on tiny tensors threads only wait for one another
SERVED = (  # files whose fresh processes come from a server, which takes as long to start as the tests themselves
    *("test_auto", "test_clients", "test_contest", "test_device", "test_doubles", "test_grams", "test_launched"),
    *("test_laws", "test_masking", "test_own", "test_own_method", "test_processes", "test_recover_command"),
    *("test_resuming", "test_search", "test_trials", "test_workers"),
)
_frozen = [0]  # how many modules there were
gc.disable()  # until all is imported
gc.set_threshold(20_000, 20, 20)  # a small test makes many objects, and few of them in cycles


@pytest.hookimpl(tryfirst=True)  # before `-m` deselects by marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    import processes  # noqa: F401  which says what the server of new processes imports
    import torch

    torch.set_num_threads(1)
    covering.thin(items)
    items.sort(key=lambda item: item.path.stem not in SERVED)  # first, so that one worker has them, and one server
    gc.enable()


@pytest.fixture(autouse=True)
def _collections_are_short() -> None:
    """Collections in the code under test take half a second where they walk all that was imported, here or by a
    test."""
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


def _not_run(path: Path, client: str, python: str | None = None, trust: bool = False) -> dict[str, Any]:
    return {"client": client, "version": "not run"}


@pytest.fixture(autouse=True)
def _no_other_process(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check in a process of its own takes seconds, most of them imports: tests that mean it ask for
    `stock_client`."""
    from billhook.checkpoints.clients import check

    if "stock_client" not in request.fixturenames and "slow" not in request.keywords:
        monkeypatch.setattr(check, "check", _not_run)


@pytest.fixture(autouse=True)
def _probes_are_short(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Token by token through a cache, every output of a test takes longer to verify than to make; windows slide over
    8."""
    from billhook.checkpoints import verify

    whole = verify._probe
    if "slow" not in request.keywords:
        monkeypatch.setattr(verify, "_probe", lambda model: whole(model)[:, :12])


@pytest.fixture(autouse=True)
def _outputs_are_verified_once(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    import verified

    from billhook.checkpoints import result

    if "slow" not in request.keywords:
        monkeypatch.setattr(result, "verify", verified)


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked for by tests that mean the look at the end of a prune; its texts are short."""
    from billhook.evaluation import look

    monkeypatch.setattr(look, "NEW_TOKENS", 8)


@pytest.fixture(autouse=True)
def _prunes_do_not_look(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a tiny random model writes takes longer to see than the model to prune."""
    from billhook.pruning import prune

    if "looks" not in request.fixturenames and "slow" not in request.keywords:
        monkeypatch.setattr(prune, "_look", lambda *_: None)


@pytest.fixture(scope="session", autouse=True)
def _packages_are_looked_for_once() -> None:
    """accelerate looks for a dozen of optional ones on disk whenever a training begins."""
    from accelerate.utils import imports

    imports._is_package_available = cache(imports._is_package_available)


@pytest.fixture(scope="session", autouse=True)
def _forests_are_small() -> None:
    """Which dimension matters takes longer to say than the search that it is of."""
    from billhook.search import samplers

    samplers.TREES = 8


@pytest.fixture(autouse=True)
def _records_are_read_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever record a command writes, by any method, is one that the commands after it take."""
    from billhook.reports import history, page

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


@pytest.fixture(scope="session")
def _llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from folders import written

    return written("llama", tmp_path_factory.mktemp("kept") / "tiny-llama")


@pytest.fixture(scope="session")
def _chopped(_llama: Path) -> Path:
    from billhook.checkpoints.clients import check
    from billhook.pruning import prune

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(check, "check", _not_run)
        return prune.prune(str(_llama), method="layerchop", drop="1").save(_llama.parent / "student")


@pytest.fixture
def folder(_llama: Path, tmp_path: Path) -> Path:
    """A tiny LLaMA checkpoint with tokenizer and tied embeddings: a copy of one."""
    return shutil.copytree(_llama, tmp_path / "tiny-llama")


@pytest.fixture
def student(_chopped: Path, tmp_path: Path) -> Path:
    """The same without its middle layer."""
    return shutil.copytree(_chopped, tmp_path / "student")


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    import tiny

    path = tmp_path / "words.txt"
    path.write_text(tiny.text())
    return path


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A file of more words than `text_file` has, and of a larger lexicon: for what learns from them."""
    import tiny

    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text(tiny.text(6000, 400))
    return str(path)


@pytest.fixture
def command(tmp_path: Path, text_file: Path) -> list[object]:
    from folders import written

    model = written("llama", tmp_path / "model")
    given = ["--calibration", text_file, "--samples", 10, "--seq-len", 32, "--multiple-of", 2]
    return ["prune", model, "-o", tmp_path / "out", "--method=fasp", *given]
