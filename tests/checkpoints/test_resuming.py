"""A prune that is cut off, killed, or out of disk: the same command goes on to the same bits."""

import importlib
import itertools
import json
import os
import random
import re
import resource
import shutil
import signal
import time
from collections.abc import Callable, Iterable
from hashlib import sha256 as digest
from pathlib import Path
from typing import Any

import pytest
import tiny
from folders import FASP, CutOffError, pruned, run, same, written
from safetensors.torch import load_file, save_file

import billhook
from billhook.checkpoints import resume
from billhook.checkpoints.clients import check
from billhook.choices import AXIS_STREAMS, INDEPENDENT_STREAMS, OPERATOR_STREAMS
from billhook.errors import BillhookError
from billhook.models.families import layers


def cut_off(monkeypatch: pytest.MonkeyPatch, after: int) -> Callable[[], None]:
    """Have the writer of finished layers fail once it has settled `after` files; undone by what is returned."""
    rename, seen = resume.rename, [0]

    def settled(work: Path, to: Path) -> None:
        if seen[0] == after:
            raise CutOffError
        seen[0] += 1
        rename(work, to)

    monkeypatch.setattr(resume, "rename", settled)
    return lambda: monkeypatch.setattr(resume, "rename", rename)


STREAMS = [
    *({**FASP, "axes": ("ffn", "groups"), "stream": stream} for stream in ("dense", "sequential", "dense_target")),
    {**FASP, "allocation": "skip:1,0", "layout": "per_layer", "axes": ("ffn", "value")},
    {**FASP, "method": "goa", "axes": ("ffn", "groups"), "ratio": 0.35},
    *(
        {"method": "sparsegpt", "sparsity": 0.5, "stream": stream}
        for stream in ("dense", "sequential", "true_sequential", "layer_target", "dense_target")
    ),
    {"method": "wanda", "sparsity": 0.5, "targets": ("q", "up")},
]


FACTORED = {"method": "rom", "ratio": 0.3, "last": 3, "layout": "per_layer"}  # whose weights have to be in memory
AMID_A_LAYER = (STREAMS[0], STREAMS[5])  # no stream sees a layer that is not whole: it is done again, cut or masked


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("settings", STREAMS, ids=lambda one: "-".join(map(str, one.values())))
@pytest.mark.covering(some={"settings": 3})
def test_what_was_cut_off_goes_on_to_the_same_bits(
    settings: dict[str, Any], streamed: bool, tmp_path: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, more = written("llama", tmp_path / "model"), {"stream_weights": streamed, **settings}
    whole = billhook.prune(model, calibration=str(text_file), samples=10, seq_len=32, **{"method": "fasp", **more})
    whole.save(tmp_path / "whole")
    for after in (1, 4) if settings in AMID_A_LAYER else (4,):  # two files a layer
        work = tmp_path / f"work-{after}"
        undo = cut_off(monkeypatch, after)
        with pytest.raises(CutOffError):
            pruned(model, text_file, tmp_path / "never", work=work, **more)
        undo()
        assert len(list(work.glob("layer-*.json"))) == after // 2 and not (tmp_path / "never").exists()
        again = billhook.prune(
            model, calibration=str(text_file), samples=10, seq_len=32, work=work, **{"method": "fasp", **more}
        )
        assert same(tmp_path / "whole", again.save(tmp_path / f"again-{after}"))
        for part in ("cuts", "zeros", "approximated"):
            assert again.record.get(part) == whole.record.get(part)


def test_so_do_weights_that_became_two(tmp_path: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    test_what_was_cut_off_goes_on_to_the_same_bits(FACTORED, False, tmp_path, text_file, monkeypatch)


@pytest.mark.parametrize("jobs", [1, 2])
@pytest.mark.parametrize("settings", [STREAMS[0], {"method": "fistapruner", "pattern": "2:4"}], ids=["fasp", "zeros"])
@pytest.mark.covering
def test_what_workers_had_done_is_kept(
    settings: dict[str, Any], jobs: int, tmp_path: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command that spreads the layers is killed itself, and goes on with workers, or alone."""
    model, more = written("llama", tmp_path / "model"), {"hidden_budget": "40KB", **settings}
    whole, work = pruned(model, text_file, tmp_path / "whole", **settings), tmp_path / "work"
    undo = cut_off(monkeypatch, 4)
    with pytest.raises(CutOffError):
        pruned(model, text_file, tmp_path / "never", work=work, jobs=2, **more)
    undo()
    assert len(list(work.glob("layer-*.json"))) == 2
    again = pruned(model, text_file, tmp_path / "again", work=work, jobs=jobs, **more)
    assert same(whole, again)
    kept = [json.loads((one / "billhook.json").read_text()) for one in (whole, again)]
    assert all(kept[0].get(part) == kept[1].get(part) for part in ("cuts", "zeros"))


MASKS = [
    {"method": method, "sparsity": 0.5, "stream": stream}
    for method in tiny.ZEROS
    for stream in OPERATOR_STREAMS
    if method != "optishear"  # whose search comes before, and then it is wanda
]
ALL = [{**FASP, "axes": ("ffn", "groups"), "stream": stream} for stream in AXIS_STREAMS] + MASKS
SLOW = [one for one in ALL if one.get("method", "wanda") != "wanda"]
APART = [
    {**FASP, "ratio": 0.1, "stream": "dense", "allocation": "skip:1,0", "layout": "per_layer"},
    {"method": "wanda", "sparsity": 0.5, "stream": "dense", "targets": ("q", "up")},
    {"method": "wanda", "sparsity": 0.5, "stream": "layer_target", "targets": ("down",)},
]


def left_by(whole: Path, done: Iterable[int], work: Path) -> Path:
    """A folder in which those layers alone are done."""
    shutil.copytree(whole, work, ignore=lambda _, names: [one for one in names if one.startswith("layer-")])
    for file in (file for n in done for file in whole.glob(f"layer-{n}.*")):
        shutil.copy(file, work)
    return work


@pytest.mark.parametrize(
    "settings",
    [pytest.param(one, marks=pytest.mark.slow) if one in SLOW else one for one in [*ALL, *APART]],
    ids=lambda one: "-".join(map(str, one.values())),
)
@pytest.mark.covering(some={"settings": 2})
def test_whichever_layers_are_done_the_others_end_in_the_same_bits(
    settings: dict[str, Any], tmp_path: Path, text_file: Path
) -> None:
    """Processes that share the layers finish them in any order; who works alone goes on from there, and the other way
    round."""
    model = written("llama", tmp_path / "model")

    def made(work: Path, jobs: int = 1) -> billhook.Result:
        return billhook.prune(
            model,
            calibration=str(text_file),
            samples=10,
            seq_len=32,
            work=work,
            jobs=jobs,
            **{"method": "fasp", **settings},
        )

    whole = made(tmp_path / "all")
    there = sorted(int(one.stem.partition("-")[2]) for one in (tmp_path / "all").glob("layer-*.json"))
    alone = settings["stream"] in INDEPENDENT_STREAMS
    sizes = range(len(there)) if settings in SLOW else (1,)
    parts = [done for size in sizes for done in itertools.combinations(there, size)]
    for done in parts if alone else [done for done in parts if list(done) == there[: len(done)]]:
        again = made(left_by(tmp_path / "all", done, tmp_path / f"alone-{done}"))
        assert states(again) == states(whole), done
        for part in ("cuts", "zeros"):
            assert again.record[part] == whole.record[part], done
    if alone and settings in SLOW:
        for done in parts:
            assert states(made(left_by(tmp_path / "all", done, tmp_path / f"shared-{done}"), 2)) == states(whole), done


def states(result: billhook.Result) -> dict[str, str]:
    """Every tensor of the model that came out, as the digest of its bits."""
    return {name: digest(one.numpy().tobytes()).hexdigest() for name, one in result.model.state_dict().items()}


def test_a_hidden_budget_holds_in_workers(tmp_path: Path, text_file: Path) -> None:
    with pytest.raises(BillhookError, match=r"hidden_budget 100 bytes: the hidden states of one batch"):
        pruned(
            written("llama", tmp_path / "model"), text_file, tmp_path / "out", jobs=2, hidden_budget=100, **STREAMS[0]
        )


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize("after", [1, 4])
@pytest.mark.covering
def test_a_narrowed_stream_goes_on_as_it_was_turned(
    after: int, rotated: bool, streamed: bool, tmp_path: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One file says how, and two are of each layer that was restored; nothing is computed twice that these were made
    by."""
    model, settings = written("llama", tmp_path / "model"), {"method": "slicegpt", "ratio": 0.3, "multiple_of": 8}
    settings |= {"rotate": rotated, "stream_weights": streamed}
    whole, work = pruned(model, text_file, tmp_path / "whole", **settings), tmp_path / "work"
    undo = cut_off(monkeypatch, after)
    with pytest.raises(CutOffError):
        pruned(model, text_file, tmp_path / "never", work=work, **settings)
    undo()
    assert len(list(work.glob("layer-*.json"))) == after // 3
    with monkeypatch.context() as patch:
        for name in ("_gram", "channel_scores"):
            patch.delattr(importlib.import_module("billhook.cuts.slicing"), name)
        assert same(whole, pruned(model, text_file, tmp_path / "again", work=work, **settings))


EXPERTS = {"method": "experts", "ratio": 0.3}
MIXED = (
    {"ratio": 0.2, "axes": ("expert_ffn",), "multiple_of": 8},  # a layer has as many axes of one kind as experts
    {**EXPERTS, "experts": "random"},
    {**EXPERTS, "experts": "uncurl", "stream": "sequential"},
)


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("how", MIXED, ids=["fasp", "random", "uncurl"])
@pytest.mark.covering(some={"how": 3})
def test_a_mixture_goes_on(
    streamed: bool, how: dict[str, Any], tmp_path: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, settings = written("mixtral", tmp_path / "model"), {**how, "stream_weights": streamed}
    whole, work = pruned(model, text_file, tmp_path / "whole", **settings), tmp_path / "work"
    undo = cut_off(monkeypatch, 4)
    with pytest.raises(CutOffError):
        pruned(model, text_file, tmp_path / "never", work=work, **settings)
    undo()
    assert same(whole, pruned(model, text_file, tmp_path / "again", work=work, **settings))


def in_child(work: Callable[[], object], kill_after: float | None = None, largest_file: int | None = None) -> int:
    """Run in a forked process, killed after so many seconds if it still runs; what it ended with."""
    child = os.fork()
    if not child:
        code = 1
        try:
            if largest_file:
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
            work()
            code = 0
        except BillhookError as error:
            code = 2 if "\n" not in str(error) else 3
        finally:
            os._exit(code)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def killed_at_random(moments: int, tmp_path: Path, text_file: Path, **settings: Any) -> None:
    model, draw = written("llama", tmp_path / "model"), random.Random(0)
    whole = pruned(model, text_file, tmp_path / "whole", work=tmp_path / "work-whole", **settings)
    started = time.perf_counter()
    in_child(lambda: pruned(model, text_file, tmp_path / "timed", work=tmp_path / "work-timed", **settings))
    took, died, went_on = time.perf_counter() - started, 0, 0
    for n in range(moments):
        work, out = tmp_path / f"work-{n}", tmp_path / f"out-{n}"
        died += in_child(lambda: pruned(model, text_file, out, work=work, **settings), draw.random() * took) < 0  # noqa: B023
        went_on += any(work.glob("layer-*.json"))
        if not out.exists():
            pruned(model, text_file, out, work=work, **settings)
        assert same(whole, out), f"killed at moment {n}"
        assert not list(out.glob("*.partial"))
    assert died > moments // 2 and went_on > moments // 5


def test_killed_at_some_moments(tmp_path: Path, text_file: Path) -> None:
    killed_at_random(6, tmp_path, text_file, stream_weights=True, **FASP)


@pytest.mark.slow
@pytest.mark.parametrize("streamed", [False, True])
def test_killed_at_fifty_moments(
    streamed: bool, tmp_path: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the stock client, a process of its own, whose imports would be what nearly every kill meets."""
    monkeypatch.setattr(check, "check", lambda *_: {"client": "transformers", "version": "not run"})
    killed_at_random(50, tmp_path, text_file, stream_weights=streamed, **FASP)


def test_a_full_disk_loses_nothing(tmp_path: Path, text_file: Path) -> None:
    """Files may not grow beyond what a layer takes: the layers are kept, the shard of the result is not."""
    model, settings = written("llama", tmp_path / "model"), {**FASP, "stream_weights": True}
    whole, work = pruned(model, text_file, tmp_path / "whole", **settings), tmp_path / "work"
    largest = 4 * sum(p.numel() for p in layers(tiny.model("llama"))[0].parameters()) + 4096
    assert in_child(lambda: pruned(model, text_file, tmp_path / "out", work=work, **settings), None, largest) == 2
    assert len(list(work.glob("layer-*.json"))) == 3 and not (tmp_path / "out").exists()
    assert same(whole, pruned(model, text_file, tmp_path / "out", work=work, **settings))
    assert in_child(lambda: pruned(model, text_file, tmp_path / "b", work=tmp_path / "w", **settings), None, 9000) == 2
    assert not list((tmp_path / "w").glob("layer-*.json"))


def test_the_command_goes_on_and_cleans_up(
    command: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    undo, left = cut_off(monkeypatch, 2), tmp_path / "out.unfinished"
    assert run(*command, "--ratio", 0.2, "--stream-weights") == "cut off"
    undo()
    assert (left / "layer-0.json").exists()
    assert "differs in plan, ratio" in run(*command, "--ratio", 0.3, "--stream-weights")
    assert (left / "layer-0.json").exists()
    assert not run(*command, "--ratio", 0.2, "--stream-weights")
    assert not left.exists() and (tmp_path / "out" / "billhook.json").exists()


def test_a_model_that_has_changed_is_another(
    command: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    undo = cut_off(monkeypatch, 2)
    assert run(*command, "--ratio", 0.2) == "cut off"
    undo()
    file = tmp_path / "model" / "model.safetensors"
    held = load_file(file)
    held["model.norm.weight"] += 1
    save_file(held, file, {"format": "pt"})
    assert "differs in model" in run(*command, "--ratio", 0.2)
    assert not run(*command, "--ratio", 0.2, "--fresh")
    assert not (tmp_path / "out.unfinished").exists()


def test_another_run_s_folder_is_left_alone(command: list[object], tmp_path: Path) -> None:
    other = tmp_path / "out.unfinished"
    other.mkdir()
    (other / "mine").write_text("x")
    assert "is not a run's folder" in run(*command, "--ratio", 0.2)
    assert (other / "mine").read_text() == "x"


def test_nothing_is_left_where_nothing_was_done(command: list[object], tmp_path: Path) -> None:
    assert "at most" in run(*command, "--ratio", 0.99)
    assert sorted(one.name for one in tmp_path.iterdir() if "out" in one.name) == []


@pytest.mark.parametrize(
    ("flags", "free"),
    {"": 100_000, "--method slicegpt --stream-weights": 400_000, "--method slicegpt": 100_000}.items(),
)
def test_a_disk_too_small_is_refused_before_the_work(
    flags: str, free: int, command: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=free))
    assert re.search(
        r"has 0.00 GB free, and this takes up to 0.00.*choose another output",
        run(*command, "--ratio", 0.2, *flags.split()),
    )
    assert not (tmp_path / "out.unfinished").exists()
