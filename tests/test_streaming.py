"""A model that stays in its files, and a prune that is killed: the same bits as one in memory that was left alone."""

import gc
import json
import os
import random
import re
import resource
import shutil
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel
from typer.testing import CliRunner

import billhook
from billhook import checkpoint, clients, journal, paging, residual, saving
from billhook.chopping import PRESETS
from billhook.cli import app
from billhook.errors import BillhookError
from billhook.families import layers

IDS = tiny.tokens()
FASP = {"ratio": 0.2, "multiple_of": 2}
CASES: dict[str, dict[str, Any]] = {
    "fasp": FASP,
    "fasp dense": {**FASP, "stream": "dense"},
    "fasp per layer": {**FASP, "layout": "per_layer", "allocation": "skip:1,0"},
    "standardised": {**FASP, "layout": "per_layer", "allocation": "standardised"},
    "layerchop": {"method": "layerchop", "preset": "contiguous", "layers": 2},
    "patched": {"method": "layerchop", "drop": "1", "patch": "linear"},
    "wanda": {"method": "wanda", "sparsity": 0.5},
    "fistapruner": {"method": "fistapruner", "pattern": "2:4"},
    "admm": {"method": "admm", "sparsity": 0.6, "stream": "dense_target"},
    "slicegpt": {"method": "slicegpt", "ratio": 0.2, "multiple_of": 4},
    "slicegpt as it is": {"method": "slicegpt", "ratio": 0.2, "multiple_of": 4, "rotate": False},
    "slicegpt unrestored": {"method": "slicegpt", "ratio": 0.2, "multiple_of": 4, "restoration": False},
}
OTHERS = ("fasp", "fistapruner", "layerchop")
FAMILIES = ("llama", "gpt2", "gemma2", "phi3", "opt")  # tied, transposed, scaled, fused, with biases
SLICED = {  # norms over heads, fused, untied; and scaled, tied, with norms behind writers, which no rotation passes
    "slicegpt": ("qwen3", "phi3", "mistral"),
    "slicegpt as it is": ("qwen3", "phi3", "gemma2", "gemma3_text"),
}


def written(family: str, to: Path, shards: str = "5GB") -> Path:
    tiny.model(family).save_pretrained(to, max_shard_size=shards)
    tiny.tokenizer().save_pretrained(to)
    return to


def pruned(model: Path, text: Path, out: Path, **settings: Any) -> Path:
    return billhook.prune(model, calibration=str(text), samples=10, seq_len=32, **settings).save(out, overwrite=True)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {key: one for file in folder.glob("*.safetensors") for key, one in load_file(file).items()}


def same(a: Path, b: Path) -> bool:
    x, y = tensors(a), tensors(b)
    return x.keys() == y.keys() and all(torch.equal(x[key], y[key]) and x[key].dtype == y[key].dtype for key in x)


@pytest.mark.parametrize(
    ("family", "case"),
    [("llama", case) for case in CASES]
    + [(one, case) for one in FAMILIES[1:] for case in OTHERS]
    + [(one, case) for case, families in SLICED.items() for one in families],
)
def test_streamed_is_as_in_memory(
    family: str, case: str, tmp_path: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saving, "SHARD", 2**13)
    model = written(family, tmp_path / "model")
    a = pruned(model, text_file, tmp_path / "a", **CASES[case])
    b = pruned(model, text_file, tmp_path / "b", stream_weights=True, **CASES[case])
    assert same(a, b)
    configs = [json.loads((one / "config.json").read_text()) for one in (a, b)]
    assert configs[0] == configs[1]
    assert (a / "generation_config.json").read_text() == (b / "generation_config.json").read_text()
    index = json.loads((b / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(tensors(b)) and {
        (b / one).exists() for one in index["weight_map"].values()
    } == {True}
    again = AutoModelForCausalLM.from_pretrained(b, trust_remote_code="auto_map" in configs[1])
    assert torch.equal(again(IDS).logits, billhook.load(a)(IDS).logits)


def test_shards_and_bfloat16_come_in_and_go_out(tmp_path: Path, text_file: Path) -> None:
    tiny.model("llama").to(torch.bfloat16).save_pretrained(tmp_path / "model", max_shard_size="20KB")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 3
    a = pruned(tmp_path / "model", text_file, tmp_path / "a", **FASP)
    b = pruned(tmp_path / "model", text_file, tmp_path / "b", stream_weights=True, **FASP)
    assert same(a, b) and {one.dtype for one in tensors(b).values()} == {torch.bfloat16}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_paged_model_computes_what_it_would_in_memory(family: str, tmp_path: Path) -> None:
    model = written(family, tmp_path / "model", "20KB")
    there, away = (checkpoint.open_model(str(model), stream=stream).model for stream in (False, True))
    assert torch.equal(there(IDS).logits, away(IDS).logits)
    assert {one.device.type for one in away.parameters()} == {"meta"} and away.device.type == "cpu"
    assert sum(p.numel() for p in away.parameters()) == sum(p.numel() for p in there.parameters())
    ends = residual.ends(away)
    assert (ends[0].weight is ends[1].weight) == there.config.tie_word_embeddings
    buffers = dict(there.named_buffers())
    assert all(torch.equal(one, buffers[name]) for name, one in away.named_buffers())
    greedy = [one.generate(IDS, max_new_tokens=8, do_sample=False) for one in (there, away)]
    assert torch.equal(*greedy)


@pytest.mark.parametrize("case", ["fasp", "fistapruner", "layerchop", "slicegpt", "slicegpt as it is"])
def test_one_layer_is_there_at_a_time(
    case: str, tmp_path: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of each model, and where there are two, the same of both."""
    there, most = set[tuple[str, int]](), list[int]()
    bring, leave = paging.Page.bring, paging.Page.leave

    def brought(page: paging.Page) -> None:
        bring(page)
        there.add((page.name, id(page.pager)))
        most.append(len({name for name, _ in there}))
        assert len({pager for _, pager in there}) == len(there)

    def left(page: paging.Page, edited: bool = False) -> None:
        leave(page, edited)
        there.difference_update([(page.name, id(page.pager))] if not page.users else [])

    monkeypatch.setattr(paging.Page, "bring", brought)
    monkeypatch.setattr(paging.Page, "leave", left)
    pruned(written("llama", tmp_path / "model"), text_file, tmp_path / "out", stream_weights=True, **CASES[case])
    assert max(most) == 1 and not there


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: one.clone() for name, one in paging.parameters(model)}


def test_a_twin_keeps_its_weights_and_files_go_once_nobody_reads_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    model = checkpoint.open_model(str(written("llama", tmp_path / "model")), stream=True).model
    source, first, deep = tensors(tmp_path / "model"), layers(model)[0], layers(model)[1]

    def spilled() -> list[str]:
        return sorted(one.name.partition("-")[0] for one in tmp_path.glob("billhook-pages-*/*"))

    def double(module: Any) -> None:
        with paging.held(module):
            module.mlp.up_proj.weight.data.mul_(2)

    double(first)
    double(first)  # whose first file nobody reads any more
    assert spilled() == ["model.layers.0"]
    twin = paging.twin(model)
    before = weights(model)
    assert {name: float((before[name] / one).mean()) for name, one in source.items() if "0.mlp.up" in name} == {
        "model.layers.0.mlp.up_proj.weight": 4.0
    }
    double(first)
    double(deep)
    assert spilled() == ["model.layers.0", "model.layers.0", "model.layers.1"]
    kept = weights(twin)
    assert all(torch.equal(one, kept[name]) for name, one in before.items())
    assert torch.equal(
        weights(model)["model.layers.0.mlp.up_proj.weight"], 2 * kept["model.layers.0.mlp.up_proj.weight"]
    )
    layers(twin)[0] = torch.nn.Identity()
    paging.renumber(twin)
    assert spilled() == ["model.layers.0", "model.layers.1"]
    del model, twin, first, deep
    gc.collect()
    assert not list(tmp_path.glob("billhook-pages-*"))


def test_what_is_tied_stays_so_until_it_is_untied(tmp_path: Path) -> None:
    model = checkpoint.open_model(str(written("llama", tmp_path / "model")), stream=True).model
    embedding, head = residual.ends(model)
    with paging.held(embedding):
        embedding.weight.data.mul_(2)
        embedding.weight = torch.nn.Parameter(embedding.weight.data[:, :16].clone(), False)
    assert head.weight is embedding.weight and head.weight.shape[1] == 16
    with paging.held(head), paging.held(embedding):
        assert torch.equal(head.weight, embedding.weight)
    head.weight = torch.nn.Parameter(embedding.weight.clone(), False)
    with paging.held(embedding):
        embedding.weight.data.zero_()
    with paging.held(head):
        assert head.weight.abs().sum() > 0


@pytest.mark.parametrize("amiss", [False, True])
def test_edited_pages_lie_beside_the_output_and_go(
    amiss: bool, tmp_path: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where there is a folder for what a prune keeps; what a killed one left there goes when the next begins."""
    model, work, spill = written("llama", tmp_path / "model"), tmp_path / "work", paging.Pager.spill
    (work / "pages").mkdir(parents=True)
    (work / "pages" / "left").write_text("x")
    (work / "run.json").write_text("{}")
    most = [0]

    def counted(pager: paging.Pager, page: str, tensors: Any) -> None:
        spill(pager, page, tensors)
        assert not (work / "pages" / "left").exists()
        most.append(sum(one.stat().st_size for one in (work / "pages").iterdir()))
        if amiss and len(most) == 8:
            raise CutOffError

    monkeypatch.setattr(paging.Pager, "spill", counted)
    given: dict[str, Any] = {"calibration": str(text_file), "samples": 10, "seq_len": 32, "stream_weights": True}
    if amiss:
        with pytest.raises(CutOffError):
            billhook.prune(model, work=work, fresh=True, **given, **CASES["slicegpt"])
    else:
        billhook.prune(model, work=work, fresh=True, **given, **CASES["slicegpt"])
        stored = sum(one.nbytes for one in tensors(model).values())
        assert max(most) < 3 * stored
    gc.collect()
    assert not (work / "pages").exists()


class CutOffError(Exception):
    """Stands for the end of the process."""


def cut_off(monkeypatch: pytest.MonkeyPatch, after: int) -> Callable[[], None]:
    """Have the journal's writer fail once it has settled `after` files; undone by what is returned."""
    rename, seen = journal.rename, [0]

    def settled(work: Path, to: Path) -> None:
        if seen[0] == after:
            raise CutOffError
        seen[0] += 1
        rename(work, to)

    monkeypatch.setattr(journal, "rename", settled)
    return lambda: monkeypatch.setattr(journal, "rename", rename)


STREAMS = [
    *({**FASP, "axes": ("ffn", "groups"), "stream": stream} for stream in ("dense", "sequential", "dense_target")),
    {**FASP, "allocation": "skip:1,0", "layout": "per_layer", "axes": ("ffn", "value")},
    *(
        {"method": "sparsegpt", "sparsity": 0.5, "stream": stream}
        for stream in ("dense", "sequential", "true_sequential", "layer_target", "dense_target")
    ),
    {"method": "wanda", "sparsity": 0.5, "targets": ("q", "up")},
]


AMID_A_LAYER = (STREAMS[0], STREAMS[4])  # no stream sees a layer that is not whole: it is done again, cut or masked


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("settings", STREAMS, ids=lambda one: "-".join(map(str, one.values())))
def test_what_was_cut_off_goes_on_to_the_same_bits(
    settings: dict[str, Any], streamed: bool, tmp_path: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, more = written("llama", tmp_path / "model"), {"stream_weights": streamed, **settings}
    whole = billhook.prune(model, calibration=str(text_file), samples=10, seq_len=32, **more)
    whole.save(tmp_path / "whole")
    for after in (1, 4) if settings in AMID_A_LAYER else (4,):  # two files a layer
        work = tmp_path / f"work-{after}"
        undo = cut_off(monkeypatch, after)
        with pytest.raises(CutOffError):
            pruned(model, text_file, tmp_path / "never", work=work, **more)
        undo()
        assert len(list(work.glob("layer-*.json"))) == after // 2 and not (tmp_path / "never").exists()
        again = billhook.prune(model, calibration=str(text_file), samples=10, seq_len=32, work=work, **more)
        assert same(tmp_path / "whole", again.save(tmp_path / f"again-{after}"))
        for part in ("cuts", "zeros"):
            assert again.report[part] == whole.report[part]


@pytest.mark.parametrize("settings", [STREAMS[0], {"method": "fistapruner", "pattern": "2:4"}], ids=["fasp", "zeros"])
def test_what_workers_had_done_is_kept(
    settings: dict[str, Any], tmp_path: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command that spreads the layers is killed itself, and goes on with workers, or alone."""
    model, more = written("llama", tmp_path / "model"), {"hidden_budget": "40KB", **settings}
    whole = billhook.prune(model, calibration=str(text_file), samples=10, seq_len=32, **settings)
    whole.save(tmp_path / "whole")
    for jobs in (1, 2):
        work = tmp_path / f"work-{jobs}"
        undo = cut_off(monkeypatch, 4)
        with pytest.raises(CutOffError):
            pruned(model, text_file, tmp_path / "never", work=work, jobs=2, **more)
        undo()
        assert len(list(work.glob("layer-*.json"))) == 2
        again = billhook.prune(model, calibration=str(text_file), samples=10, seq_len=32, work=work, jobs=jobs, **more)
        assert same(tmp_path / "whole", again.save(tmp_path / f"again-{jobs}"))
        for part in ("cuts", "zeros"):
            assert again.report[part] == whole.report[part]


def test_a_hidden_budget_holds_in_workers(tmp_path: Path, text_file: Path) -> None:
    with pytest.raises(BillhookError, match=r"--hidden-budget 100 bytes: the hidden states of one batch"):
        pruned(
            written("llama", tmp_path / "model"), text_file, tmp_path / "out", jobs=2, hidden_budget=100, **STREAMS[0]
        )


EXPERTS = {"method": "experts", "ratio": 0.3}
MIXED = (
    {"ratio": 0.2, "axes": ("expert_ffn",), "multiple_of": 8},  # a layer has as many axes of one kind as experts
    {**EXPERTS, "experts": "random"},
    {**EXPERTS, "experts": "uncurl", "stream": "sequential"},
)


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("how", MIXED, ids=["fasp", "random", "uncurl"])
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


@pytest.mark.parametrize("preset", [one for one in PRESETS if one not in ("taylor", "contiguous")])
def test_layers_are_chosen_alike_in_their_files(preset: str, tmp_path: Path, text_file: Path) -> None:
    model, settings = written("llama", tmp_path / "model"), {"method": "layerchop", "layers": 2, "preset": preset}
    found = [
        billhook.prune(model, calibration=str(text_file), samples=10, seq_len=32, stream_weights=one, **settings).report
        for one in (False, True)
    ]
    assert found[0]["dropped_layers"] == found[1]["dropped_layers"] != []


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
    monkeypatch.setattr(clients, "check", lambda *_: {"client": "transformers", "version": "not run"})
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


def run(*arguments: object) -> str:
    """What the command says when it refuses."""
    found = CliRunner().invoke(app, [str(one) for one in arguments])
    if found.exception is None:
        return ""
    assert isinstance(found.exception, BillhookError | CutOffError), found.exception
    assert "\n" not in str(found.exception)
    return str(found.exception) or "cut off"


@pytest.fixture
def command(tmp_path: Path, text_file: Path) -> list[object]:
    model = written("llama", tmp_path / "model")
    given = ["--calibration", text_file, "--samples", 10, "--seq-len", 32, "--multiple-of", 2]
    return ["prune", model, "-o", tmp_path / "out", *given]


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


REFUSED = {
    "--ratio 0.2 --allocation sensitivity --layout per_layer": "tries cuts on the whole model",
    "--ratio 0.2 --score taylor1_vector": "needs gradients of the whole model",
    "--speedup 1.2": "times the whole model",
    "--method layerchop --layers 2 --preset taylor": "needs gradients",
}


@pytest.mark.parametrize("flags", REFUSED)
def test_what_needs_all_weights_is_refused(flags: str, command: list[object], tmp_path: Path) -> None:
    given = command if "--method" not in flags else [one for one in command if one not in ("--multiple-of", 2)]
    assert REFUSED[flags] in run(*given, *flags.split(), "--stream-weights")
    assert not (tmp_path / "out").exists()


def cut_short(folder: Path) -> str:
    file = sorted(folder.glob("*.safetensors"))[1]
    os.truncate(file, file.stat().st_size - 100)
    return f"{file.name} is damaged or truncated (model.layers"


def lost(folder: Path) -> str:
    file = sorted(folder.glob("*.safetensors"))[1]
    file.unlink()
    return f"{file.name} is missing, though model.safetensors.index.json names it (for model.layers"


def misplaced(folder: Path) -> str:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    first, last = min(index["weight_map"].values()), max(index["weight_map"].values())
    key = next(key for key, file in index["weight_map"].items() if file == last)
    index["weight_map"][key] = first
    path.write_text(json.dumps(index))
    return f"says that {first} holds {key}, but it is in {last}"


def not_a_number(folder: Path) -> str:
    for file in folder.glob("*.safetensors"):
        held = load_file(file)
        if "model.layers.1.mlp.up_proj.weight" in held:
            held["model.layers.1.mlp.up_proj.weight"][0, 0] = torch.nan
            save_file(held, file, {"format": "pt"})
    return "tensor model.layers.1.mlp.up_proj.weight holds NaN"


@pytest.mark.parametrize("damage", [cut_short, lost, misplaced, not_a_number])
def test_damaged_shards_are_named(damage: Callable[[Path], str], tmp_path: Path, text_file: Path) -> None:
    model = written("llama", tmp_path / "model", "20KB")
    says = damage(model)
    given = ["--calibration", text_file, "--samples", 4, "--seq-len", 32, "--ratio", 0.2, "--multiple-of", 2]
    for streamed in ([], ["--stream-weights"]):
        assert says in run("prune", model, "-o", tmp_path / "out", *given, *streamed)
        assert not (tmp_path / "out").exists()


def test_a_model_that_would_not_fit_is_streamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = str(written("llama", tmp_path / "model"))

    def opened() -> PreTrainedModel:
        return checkpoint.open_model(model, stream=None).model

    assert not paging.is_paged(opened())
    monkeypatch.setattr(checkpoint, "free_bytes", lambda device: 100_000)
    assert paging.is_paged(opened())


@pytest.mark.parametrize("case", CASES)
def test_no_random_number_is_drawn(case: str, tmp_path: Path, text_file: Path) -> None:
    """So there is no generator whose state a layer's record would have to hold: a seed decides the windows, and the claim has them."""
    model = written("llama", tmp_path / "model")
    states = [torch.random.get_rng_state(), numpy.random.get_state()[1]]
    pruned(model, text_file, tmp_path / "out", **CASES[case])
    assert torch.equal(states[0], torch.random.get_rng_state())
    assert numpy.array_equal(states[1], numpy.random.get_state()[1])
