"""Zeros in a model's weights: exactly as many as asked for, where asked for, kept on disk, and refused in one line
otherwise."""

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file

import billhook
from billhook import cli
from billhook.calibration.forward import enter, run_layer
from billhook.calibration.gram import gram_of
from billhook.calibration.linears import WITH_TARGET, operators
from billhook.calibration.passage import Route
from billhook.choices import INDEPENDENT_STREAMS, OPERATOR_STREAMS, ROLES
from billhook.cuts import masking, parallel
from billhook.errors import BillhookError
from billhook.math import layerwise, sparsity
from billhook.math.pattern import Pattern
from billhook.models.experts import unfuse
from billhook.models.families import layers, linears
from billhook.pruning.recipe import recipe
from billhook.reports.cut_tables import zero_rows
from billhook.runtime.run import Run

SMALL: dict[str, Any] = dict(samples=10, seq_len=48)
ALL = tiny.ONE_EACH


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text(tiny.text(2000, 300))
    return str(path)


def masked(text: str, name: str = "llama", half: bool = False, **other: Any) -> billhook.Result:
    given = {"method": "wanda", "calibration": text, **SMALL, **other}
    if given["method"] == "optishear":
        given.setdefault("metric", "both,sqrt,none,sqrt")
    if not {"sparsity", "pattern"} & set(given):
        given["sparsity"] = 0.5
    model = tiny.model(name)
    return billhook.prune(model.bfloat16() if half else model, tokenizer=tiny.tokenizer(), **given)


def weights(model: Any, roles: tuple[str, ...] = ROLES) -> dict[str, torch.Tensor]:
    return {path: masking.weight_of(model, path) for _, _, path in masking.every(model, roles)}


@pytest.mark.parametrize(
    ("name", "method"),
    [(name, method) for name in ALL for method in tiny.ZEROS if name in tiny.STRUCTURES or method == "wanda"],
)
@pytest.mark.covering(some={"name": 5})
def test_every_family_has_exactly_the_zeros_that_were_asked_for(text: str, name: str, method: str) -> None:
    half, groups = masked(text, name, method=method), masked(text, name, method=method, pattern="2:4", half=True)
    dense = tiny.model(name)
    for model in (dense, half.model, groups.model):
        unfuse(model)
    for weight in weights(half.model).values():
        assert int((weight == 0).sum()) == weight.numel() // 2
    for weight in weights(groups.model).values():
        assert ((weight.reshape(-1, 4) == 0).sum(1) == 2).all()
    before = dict(dense.named_parameters())
    touched = {f"{path}.weight" for path in weights(half.model)}
    for path, param in half.model.named_parameters():
        assert torch.equal(param, before[path]) == (path not in touched)
    zeros = half.record["zeros"]
    assert zeros["zeros"] * 2 == zeros["weights"] == sum(w.numel() for w in weights(half.model).values())


def test_zeros_fill_blocks_and_the_record_says_so(text: str) -> None:
    found = masked(text, sparsity=0.5, pattern="block4", layer_sparsity={0: 0.25}, targets=("gate", "down"))
    for n, _, path in masking.every(found.model, ("gate", "down")):
        zeros = masking.weight_of(found.model, path) == 0
        blocks = sparsity.whole_blocks(zeros, 4)
        assert torch.equal(zeros, sparsity.spread(blocks, 4))
        assert blocks.double().mean() == (0.25 if n == 0 else 0.5)
    assert found.record["zeros"]["pattern"] == "50% block4" and found.record["zeros"]["sparsity"] == pytest.approx(
        5 / 12
    )
    assert "--sparsity 0.5 --pattern block4" in found.record["command"]
    ((_, words), *_) = zero_rows(found.record["zeros"])
    assert "(41.67 %, 50% block4; gate, down)" in words


@pytest.mark.parametrize("method", tiny.ZEROS)
@pytest.mark.parametrize("stream", OPERATOR_STREAMS)
@pytest.mark.covering
def test_every_method_runs_in_every_stream_and_repairs_help(text: str, method: str, stream: str) -> None:
    plain, refit = (masked(text, method=method, stream=stream, refit=each).record["zeros"] for each in (False, True))
    for bare, better in zip(plain["operators"], refit["operators"], strict=True):
        assert min(bare["error"], better["error"]) > 0
        assert bare["error_held_out"] is not None
    first = [
        (one["error"], other["error"]) for one, other in zip(plain["operators"][:3], refit["operators"], strict=False)
    ]
    assert all(better <= bare * (1 + 1e-9) for bare, better in first)  # q, k, v of the first layer: the same inputs


@torch.no_grad()
def sums(model: Any, dense: Any, tokens: torch.Tensor, layer: int, path: str) -> tuple[torch.Tensor, ...]:
    """By a plain run of both models: Grams of what enters an operator."""
    found = []
    for one in (model, dense):
        seen: list[torch.Tensor] = []
        hook = one.get_submodule(path).register_forward_pre_hook(lambda _, given, seen=seen: seen.append(given[0]))
        one(tokens, use_cache=False)
        hook.remove()
        found.append(torch.cat(seen).flatten(0, -2).float())
    return gram_of(found[0]), (found[1].T @ found[0]).double(), gram_of(found[1])


def zero_half(model: Any, names: dict[str, str]) -> None:
    for path in names.values():
        weight = masking.weight_of(model, path)
        weight[:, ::2] = 0


@pytest.mark.parametrize("stream", OPERATOR_STREAMS)
def test_the_sums_are_what_the_stream_says(stream: str) -> None:
    dense, model, tokens = tiny.model("llama"), tiny.model("llama"), tiny.tokens(6, 16)
    for group in operators(model, tokens, ROLES, Run(), Route(stream=stream, held_out=0.0)):
        first = next(iter(group.names.values()))
        reference = {
            "dense": dense,
            "sequential": only(model, dense, list(range(group.layer))),
            "layer_target": only(model, dense, [group.layer]),
        }.get(stream, model)
        gram, cross, unpruned = sums(reference, dense, tokens, group.layer, first)
        assert torch.allclose(group.fit.gram, gram, rtol=1e-4, atol=1e-5)
        if group.fit.cross is not None and group.fit.dense is not None:
            assert stream in WITH_TARGET
            assert torch.allclose(group.fit.cross, cross, rtol=1e-3, atol=1e-4)
            assert torch.allclose(group.fit.dense, unpruned, rtol=1e-4, atol=1e-5)
        else:
            assert stream not in WITH_TARGET or torch.allclose(gram, unpruned, rtol=1e-4, atol=1e-5)
        zero_half(model, dict(group.names))


def only(model: Any, dense: Any, edited: list[int]) -> Any:
    """The unpruned model with some layers of the other."""
    found = copy.deepcopy(dense)
    for n in edited:
        layers(found)[n] = copy.deepcopy(layers(model)[n])
    return found


def test_held_out_windows_are_kept_apart() -> None:
    model, tokens = tiny.model("llama"), tiny.tokens(10, 16)
    group = next(iter(operators(model, tokens, ROLES, Run(), Route(stream="dense", held_out=0.3))))
    whole = next(iter(operators(model, tokens, ROLES, Run(), Route(stream="dense", held_out=0.0))))
    assert group.held_out is not None and whole.held_out is None
    assert torch.allclose(
        (group.fit + group.held_out).gram, whole.fit.gram, rtol=1e-5, atol=1e-4
    )  # of about 100, in float32 products
    states, calls = enter(model, [tokens[7:]])
    module = layers(model)[0]
    assert run_layer(module, states[0], calls[0][0]).shape[0] == 3
    assert group.held_out.gram.trace() < group.fit.gram.trace()


def test_targets_and_layers_may_differ(text: str) -> None:
    found = masked(text, targets=("up", "down"), layer_sparsity={0: 0.25, 2: 0.0})
    for n in range(3):
        share = {0: 0.25, 1: 0.5, 2: 0.0}[n]
        for one in linears(found.model, n):
            for role, path in one.items():
                zeros = int((masking.weight_of(found.model, path) == 0).sum())
                expected = round(share * masking.weight_of(found.model, path).numel()) if role in ("up", "down") else 0
                assert zeros == expected


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_zeros_are_exact_after_saving(text: str, tmp_path: Path, dtype: str) -> None:
    source, out = tmp_path / "model", tmp_path / "out"
    tiny.model("llama").to(getattr(torch, dtype)).save_pretrained(source)
    tiny.tokenizer().save_pretrained(source)
    result = billhook.prune(source, method="sparsegpt", pattern="2:4", calibration=text, **SMALL)
    result.save(out)
    stored = load_file(out / "model.safetensors")
    for path, weight in weights(result.model).items():
        assert torch.equal(stored[f"{path}.weight"], weight) and stored[f"{path}.weight"].dtype == getattr(torch, dtype)
        assert ((stored[f"{path}.weight"].view(-1, 4) == 0).sum(1) == 2).all()
    kept = json.loads((out / "billhook.json").read_text())
    assert kept["zeros"]["pattern"] == "2:4" and kept["sizes"]["achieved_ratio"] == 0
    assert "--pattern 2:4" in kept["command"] and "nothing smaller or faster" in (out / "README.md").read_text()


def test_zeros_that_were_there_stay_unless_told_otherwise(text: str) -> None:
    model = masked(text, sparsity=0.5, method="magnitude").model
    there = {path: weight == 0 for path, weight in weights(model).items()}
    given = {"calibration": text, "tokenizer": tiny.tokenizer(), "method": "sparsegpt", "pattern": "2:4", **SMALL}
    kept = billhook.prune(copy.deepcopy(model), **given)
    free = billhook.prune(copy.deepcopy(model), **given, keep_zeros=False)
    assert all((weight[there[path]] == 0).all() for path, weight in weights(kept.model).items())
    assert any((weight[there[path]] != 0).any() for path, weight in weights(free.model).items())
    assert kept.record["zeros"]["sparsity_before"] == 0.5 < kept.record["zeros"]["sparsity"]
    lines: list[str] = []
    billhook.prune(model, announce=lines.append, **given)
    assert "50.0% are zero already, and stay so" in lines[0]


@pytest.mark.parametrize("stream", INDEPENDENT_STREAMS)
def test_processes_that_share_the_layers_make_the_same_bits(folder: Path, text: str, stream: str) -> None:
    given = {"method": "fistapruner", "pattern": "2:4", "calibration": text, "stream": stream, **SMALL}
    one, two = (billhook.prune(folder, jobs=jobs, **given) for jobs in (1, 2))
    alone, shared = weights(one.model), weights(two.model)
    assert all(torch.equal(alone[path], shared[path]) for path in alone)
    assert one.record["zeros"] == two.record["zeros"]


def test_layers_that_see_one_another_are_not_shared(folder: Path, text: str) -> None:
    given = {"calibration": text, **SMALL}
    with pytest.raises(BillhookError, match=r"in the stream sequential a layer sees what became of those before"):
        billhook.prune(folder, method="wanda", sparsity=0.5, jobs=2, **given)
    with pytest.raises(BillhookError, match="in the stream dense_target a layer sees"):
        billhook.prune(folder, method="fasp", ratio=0.3, jobs=2, **given)


def test_a_process_that_comes_to_do_several_parts_starts_each_from_the_unpruned_model(folder: Path, text: str) -> None:
    how = masking.Masking("wanda", Pattern(0.5), ROLES, "dense", layerwise.Settings())
    found = []
    for parts in ([range(1, 3)], [range(0, 1), range(1, 3)]):
        opens = {"name": str(folder), "device": "cpu", "dtype": "auto", "stream": False}
        what = opens, math.inf, masking._packed, (tiny.tokens(8, 32), how), None
        found.append([list(parallel._work(what, list(part))) for part in parts][-1])
    assert [n for n, *_ in found[0]] == [1, 2] and found[0] == found[1]


def test_what_will_be_done_is_said_before(text: str) -> None:
    lines: list[str] = []
    given = {"calibration": text, "tokenizer": tiny.tokenizer(), "method": "wanda", "sparsity": 0.5}
    billhook.prune(tiny.model("llama"), announce=lines.append, samples=1, seq_len=32, **given)
    assert "nothing gets smaller or faster by zeros alone" in lines[0]
    assert "32 tokens of calibration text are fewer than the 48 inputs" in lines[0]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"sparsity": 0.0}, "sparsity 0.0"),
        ({"sparsity": 1.0}, "sparsity 1.0"),
        ({"sparsity": None}, "no budget: give sparsity 0.5 or pattern 2:4"),
        ({"pattern": "2:4"}, "sparsity and pattern are two budgets"),
        ({"sparsity": None, "pattern": "4:4"}, "N is below M"),
        ({"sparsity": None, "pattern": "2/4"}, "is not N:M"),
        ({"sparsity": None, "pattern": "2:5"}, r"q_proj has 32 inputs, which groups of 5 \(2:5\) do not divide"),
        ({"sparsity": None, "pattern": "block16"}, "pattern block16 says where zeros lie: give sparsity too"),
        ({"pattern": "block0"}, "sparsity and pattern are two budgets"),
        ({"pattern": "block10"}, "outputs and 32 inputs, which 10 weights of a block do not divide"),
        ({"method": "fasp", "sparsity": None, "ratio": 0.2, "pattern": "block16"}, "pattern is no budget of fasp"),
        ({"targets": ("w1",)}, "unknown target 'w1'"),
        ({"ratio": 0.2}, "ratio is no budget of wanda: give sparsity"),
        ({"axes": ("ffn",)}, "cuts no axis"),
        ({"init": "wanda"}, "init belongs to method fistapruner or admm"),
        ({"init": "ours", "method": "admm"}, "unknown init 'ours'"),
        ({"normalised": True}, "normalised belongs to method fistapruner"),
        ({"stream": "backwards"}, "unknown stream"),
        ({"layer_sparsity": {9: 0.5}}, "names layer 9: the model has 3"),
        ({"layer_sparsity": "0=0.5"}, "write LAYER:SHARE with commas"),
        ({"layer_sparsity": {0: 1.5}}, "no share from 0 to below 1"),
        ({"method": "fasp", "sparsity": 0.5}, "sparsity is no budget of fasp"),
        ({"method": "fasp", "sparsity": None, "ratio": 0.2, "stream": "layer_target"}, "unknown stream 'layer_target'"),
    ],
)
def test_bad_input_is_refused(text: str, wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(BillhookError, match=message):
        masked(text, **{"sparsity": 0.5, **wrong})


def test_every_method_has_the_stream_of_its_paper_unless_told_otherwise() -> None:
    assert recipe(method="fistapruner", sparsity=0.5).settings.stream == "layer_target"
    assert recipe(method="wanda", sparsity=0.5).settings.stream == "sequential"
    assert recipe(method="wanda", sparsity=0.5, stream="dense").settings.stream == "dense"
    assert (
        recipe(method="fasp", ratio=0.2).settings.stream
        == "dense_target"
        == recipe(method="fasp", ratio=0.2, stream="").settings.stream
    )


def test_the_command_writes_a_checkpoint(
    folder: Path, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    line = f"billhook prune {folder} --method fistapruner --sparsity 0.5 --init wanda --targets gate,up --calibration {text}"
    monkeypatch.setattr("sys.argv", [*line.split(), "--samples", "6", "--seq-len", "48", "-o", str(out)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    said = capsys.readouterr().out
    assert end.value.code == 0 and "zeros" in said and "50.00%" in said.replace(" ", "")
    again = json.loads((out / "billhook.json").read_text())["command"]
    assert (
        again
        == f"billhook prune {folder} --method fistapruner --targets gate,up --init wanda --sparsity 0.5 --calibration {text} --samples 6 --seq-len 48 -o OUT"
    )
