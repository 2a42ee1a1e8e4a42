"""Mixtures of experts: apart and together, fewer of them, merged ones, and what they cannot do."""

import functools
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from folders import written
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, PreTrainedModel
from typer.testing import CliRunner

import billhook
from billhook.calibration.passage import Route
from billhook.calibration.routers import mixtures
from billhook.checkpoints import load, save, verify
from billhook.choices import WAYS
from billhook.cli import app
from billhook.cuts.experts import Settings, reduce_experts
from billhook.data import Text
from billhook.errors import BillhookError
from billhook.evaluation import side_by_side
from billhook.evaluation.speed import memory, speeds
from billhook.math import merging
from billhook.models import layout, limits, sizes
from billhook.models.axes import axes
from billhook.models.experts import Experts, fuse, is_unfused, unfuse
from billhook.models.families import FAMILIES, layers, mixture, router_path, row_of
from billhook.models.plan import Plan
from billhook.models.surgery import drop_layers, remove
from billhook.pruning import compare
from billhook.runtime.run import Run

MIXED = [name for name, row in FAMILIES.items() if row.experts]
IDS = tiny.tokens(windows=8, length=32)


def opened(family: str) -> PreTrainedModel:
    model = tiny.model(family)
    unfuse(model)
    return model


@pytest.fixture
def mixed_folder(tmp_path: Path) -> Path:
    out = tmp_path / "tiny-mixture"
    tiny.model("qwen3_moe").save_pretrained(out)
    tiny.tokenizer().save_pretrained(out)
    return out


@pytest.mark.parametrize("family", MIXED)
def test_apart_and_together_are_the_same(family: str) -> None:
    model, stock = opened(family), tiny.model(family)
    assert layout.layer_sizes(model) == layout.layer_sizes(stock)
    assert sizes.total_parameters(model) == sizes.total_parameters(stock)
    torch.testing.assert_close(model(IDS).logits, stock(IDS).logits, rtol=1e-5, atol=1e-5)
    fuse(model)
    assert torch.equal(model(IDS).logits, stock(IDS).logits)
    assert not any(isinstance(mixture(model, n), Experts) for n in range(3))


def masked(model: PreTrainedModel, layer: int, drop: torch.Tensor) -> None:
    """Have the router of a layer never choose `drop`."""
    router: Any = model.get_submodule(router_path(model, layer))
    if bias := row_of(model).bias:
        getattr(router, bias)[drop] -= 1e3
        return
    normed = getattr(router, "norm_topk_prob", row_of(model).classes[0] != "DeepseekV2Config")

    def forward(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        logits = F.linear(x.reshape(-1, x.shape[-1]), router.weight)
        logits[:, drop] = -torch.inf
        best, index = logits.softmax(-1).topk(router.top_k, dim=-1)
        return logits, best / best.sum(-1, keepdim=True) if normed else best, index

    router.forward = forward


@pytest.mark.parametrize("family", MIXED)
@pytest.mark.covering(some={"family": 2})
def test_removing_experts_equals_never_choosing_them(family: str, tmp_path: Path) -> None:
    cut, silent = opened(family), opened(family)
    drop, saved = torch.tensor([1, 4]), 0  # one from each half, which are the groups of a router that has them
    before = sizes.total_parameters(cut)
    for axis in axes(cut, ("experts",)):
        masked(silent, axis.layer, drop)
        saved += 2 * axis.price(cut)
        remove(cut, axis, drop)
    assert before - sizes.total_parameters(cut) == saved > 0
    torch.testing.assert_close(cut(IDS).logits, silent(IDS).logits, rtol=1e-4, atol=1e-4)
    fuse(cut)
    layout.update_config(cut)
    save.save(cut, tiny.tokenizer(), tmp_path, None)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert type(again) is type(cut) and torch.equal(again(IDS).logits, cut(IDS).logits)
    left = getattr(tiny.model(family).config, row_of(cut).keys["experts"]) - 2
    assert getattr(again.config, row_of(cut).keys["experts"]) == left
    assert verify.verify(tmp_path, cut)["cache_drift"] < 1e-5


@pytest.mark.parametrize("way", WAYS)
def test_a_router_that_chooses_groups_first_loses_experts_evenly(way: str) -> None:
    model = opened("glm4_moe")
    found = axes(model, ("experts",))
    rows = [model.get_parameter(axis.reader.param).clone() for axis in found]
    assert [limits.allowed_drops(model, axis, 1) for axis in found] == [[0, 2, 4]] * 2  # two of a group are the least
    reduce_experts(model, IDS, Plan({(axis.layer, "experts"): 4 for axis in found}), Settings(way), Run())
    for axis, before in zip(found, rows, strict=True):
        left = model.get_parameter(axis.reader.param)
        assert len(left) == 4 == len(mixture(model, axis.layer))  # type: ignore[arg-type]
        origin = [int((before - row).norm(dim=1).argmin()) for row in left]
        assert way == "uncurl" or [number // 4 for number in origin] == [0, 0, 1, 1]


@pytest.mark.parametrize("family", ["qwen2_moe", "qwen3_moe", "glm4_moe", "deepseek_v3", "glm4_moe_lite", "qwen3_next"])
def test_layers_without_a_mixture_stay_so_when_others_go(family: str, tmp_path: Path) -> None:
    model = opened(family)
    plain = [mixture(model, n) is None for n in range(3)]
    assert any(plain) and not all(plain)
    drop_layers(model, [1])
    save.save(model, tiny.tokenizer(), tmp_path, None)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert [mixture(again, n) is None for n in range(2)] == [plain[0], plain[2]]
    assert torch.equal(again(IDS).logits, model(IDS).logits)


def test_a_token_pays_for_the_experts_it_goes_to() -> None:
    """The same as a dense model would, of the linear weights that one token meets."""
    model = opened("mixtral")
    outside = sum(
        m.weight.numel() for n, m in model.named_modules() if hasattr(m, "in_features") and ".experts." not in n
    )
    inside = 3 * (2 * 3 * 16 * 32 + 6 * 32)  # two experts a layer, and all of the router's rows
    assert sizes.macs_per_token(model, 0) == outside + inside
    for family in MIXED:
        assert sizes.macs_per_token(opened(family), 7) == sizes.macs_per_token(tiny.model(family), 7)


class Operations(TorchDispatchMode):
    """Counts what is computed in the forwards of models, by operation and shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[Any] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found[str(func), *(tuple(one.shape) for one in args if isinstance(one, torch.Tensor))] += 1
        return func(*args, **(kwargs or {}))

    def of(self, model: Any) -> Any:
        own = model.forward

        @functools.wraps(own)
        def forward(*args: Any, **named: Any) -> Any:
            with self:
                return own(*args, **named)

        model.forward = forward
        return model


@pytest.mark.covering(some={"family": 6})
@pytest.mark.parametrize("family", MIXED)
def test_what_is_measured_is_the_stock_forward(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every operation, as often and on the same shapes, as of a model that transformers loads."""
    monkeypatch.setattr(side_by_side, "speeds", functools.partial(speeds, new_tokens=1))
    folder, words = written(family, tmp_path / "mixture"), Text("words", tiny.text())
    asked = side_by_side.Measures(
        texts=[words], seq_len=16, max_windows=2, contexts=(16,), prompts=("Once",), new_tokens=2, repeats=1
    )
    ours = load.open_model(str(folder))
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    stock = replace(ours, model=loaded.requires_grad_(False))  # which torch computes by other operations
    counts, judgements = [], []
    for one in (ours, stock):
        counted = Operations()
        counted.of(one.model)
        found = side_by_side.side_by_side([side_by_side.Subject.of(one)], asked)
        seen = compare.unpruned(one, compare.judged(one, [words], 16, 2, None))
        memory(one.model, 1, 16)
        counts.append(counted.found)
        judgements.append((found[0]["perplexities"], found[0]["macs_per_token"], seen["perplexities"]))
    assert counts[0] == counts[1] and counts[0].total() > 1000
    assert judgements[0] == judgements[1]
    assert is_unfused(ours.model) and not is_unfused(stock.model)


def test_routing_counts_what_the_router_does() -> None:
    model = opened("mixtral")
    found = list(mixtures(model, IDS, Run(), Route(held_out=0.25)))
    assert [one.layer for one in found] == [0, 1, 2]
    routing = found[1].routing
    x = torch.cat([given.read() for given, _, held in found[1].seen if not held]).flatten(0, -2)
    router: Any = model.get_submodule(router_path(model, 1))
    logits, weights, index = router(x)
    assert routing.tokens == len(x) == 6 * 32 and routing.frequency.sum() == 2 * len(x)
    torch.testing.assert_close(routing.logits, logits.double().T @ logits.double())
    listed: Any = mixture(model, 1)
    for number, expert in enumerate(listed):  # REAP, as its paper writes it
        g = (weights * (index == number)).sum(-1)
        norms = g * expert(x).norm(dim=-1)
        mean = norms[g > 0].mean() if (g > 0).any() else torch.zeros(())
        torch.testing.assert_close(routing.saliency[number].float(), mean)


@pytest.mark.covering(some={"family": 2})
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", MIXED)
def test_every_way_leaves_a_stock_model(way: str, family: str, tmp_path: Path) -> None:
    model = opened(family)
    found = axes(model, ("experts",))
    count = next(drop for drop in (3, 4) if drop % found[0].blocks == 0)
    cuts = reduce_experts(model, IDS, Plan({(axis.layer, "experts"): count for axis in found}), Settings(way), Run())
    assert [cut.dropped for cut in cuts] == [count] * len(found)
    assert all(0 < cut.error < 5 for cut in cuts)
    layout.update_config(model)
    save.save(model, tiny.tokenizer(), tmp_path, None)
    assert verify.verify(tmp_path, model)["logits"] == "equal"


def test_twins_merge_without_loss() -> None:
    """Two experts that are one up to the order of their channels, and share the router's row but for nothing."""
    model = opened("mixtral")
    twins: list[Any] = [mixture(model, n) for n in range(3)]
    turn = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    for listed in twins:
        for name in ("gate_proj", "up_proj"):
            getattr(listed[5], name).weight.data = getattr(listed[2], name).weight.data[turn].clone()
        listed[5].down_proj.weight.data = listed[2].down_proj.weight.data[:, turn].clone()
    for n in range(3):
        router: Any = model.get_submodule(router_path(model, n))
        router.weight.data[5] = router.weight.data[2]
    pairs = [(twins[0][2].up_proj.weight, twins[0][5].up_proj.weight)]
    assert torch.equal(turn[merging.aligned(pairs)], torch.arange(16))
    logits = [one.routing.logits for one in mixtures(model, IDS, Run())]
    assert all([2, 5] in merging.groups(gram, 5) for gram in logits)
    x = torch.randn(4, 32)
    before = [listed[2](x) for listed in twins]
    reduce_experts(model, IDS, Plan({(n, "experts"): 1 for n in range(3)}), Settings("uncurl"), Run())
    for listed, one in zip(twins, before, strict=True):
        assert len(listed) == 5 and sum(torch.allclose(expert(x), one, atol=1e-6) for expert in listed) == 1


@pytest.mark.parametrize("count", range(1, 9))
def test_groups_are_as_many_as_asked_for(count: int) -> None:
    logits = torch.randn(50, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    logits[:, 7] = logits[:, 3]
    found = merging.groups(logits.T @ logits, count)
    assert len(found) == count and sorted(n for one in found for n in one) == list(range(8))
    assert count == 8 or any({3, 7} <= set(one) for one in found)


def test_weights_are_averaged_by_how_often_experts_are_chosen() -> None:
    a, b = torch.zeros(2, 2), torch.ones(2, 2)
    assert torch.equal(merging.weighted([a, b], torch.tensor([1.0, 3.0]).double()), torch.full((2, 2), 0.75))
    assert torch.equal(merging.weighted([a, b], torch.zeros(2).double()), torch.full((2, 2), 0.5))


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("experts", {}),
        ("experts", {"experts": "uncurl"}),
        ("fasp", {"axes": ("expert_ffn",), "multiple_of": 8}),
        ("layerchop", {"layers": 2, "ratio": None, "preset": "middle"}),
        ("wanda", {"sparsity": 0.5, "ratio": None}),
        ("admm", {"pattern": "2:4", "ratio": None}),
    ],
)
@pytest.mark.covering(some={"method": 2, "settings": 2})
def test_the_command_ends_in_a_stock_checkpoint(
    method: str, settings: dict[str, Any], mixed_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    given = {"ratio": 0.12, "calibration": str(text_file), "samples": 10, "seq_len": 32, **settings}
    result = billhook.prune(mixed_folder, method=method, **given)
    out = result.save(tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    assert type(again).__name__ == "Qwen3MoeForCausalLM"
    assert sum(p.numel() for p in again.parameters()) == result.record["sizes"]["after"]["parameters"]
    assert torch.equal(again(IDS).logits, result.model(IDS).logits)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--method", "experts", "--ratio", "0.9"], "at most"),
        (["--ratio", "0.2", "--axes", "value", "--layout", "per_layer"], "no per_layer layout"),
        (["--ratio", "0.2", "--axes", "shared"], "no shared expert, to which every token goes"),
        (["--ratio", "0.2", "--axes", "expert_ffn", "--score", "taylor1_vector"], "a --score that needs no gradients"),
        (["--speedup", "1.2", "--axes", "heads"], "those of a mixture of experts are not alike"),
        (["--ratio", "0.2", "--experts", "reap"], "--experts belongs to --method experts"),
        (["--ratio", "0.1", "--axes", "expert_ffn", "--multiple-of", "4"], "widths of experts are multiples of 8"),
        (["--ratio", "0.2", "--method", "experts", "--stream", "dense_target"], "valid: dense, sequential"),
    ],
)
def test_bad_input_of_a_mixture(
    arguments: list[str], says: str, mixed_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    refused(mixed_folder, arguments, says, text_file, tmp_path)


@pytest.mark.parametrize("kind", ["experts", "expert_ffn", "shared"])
def test_a_dense_model_has_no_such_axis(kind: str, folder: Path, text_file: Path, tmp_path: Path) -> None:
    method = ["--method", "experts"] if kind == "experts" else ["--axes", kind]
    refused(folder, [*method, "--ratio", "0.2"], "it is dense", text_file, tmp_path)


def refused(model: Path, arguments: list[str], says: str, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "never"
    given = ["prune", str(model), "-o", str(out), "--calibration", str(text), "--samples", "4", "--seq-len", "32"]
    found = CliRunner().invoke(app, [*given, "--method=fasp", *arguments])
    assert isinstance(found.exception, BillhookError) and says in str(found.exception), found.exception
    assert "\n" not in str(found.exception) and not out.exists()


def test_a_mixture_without_a_plain_ffn_says_what_it_has(text_file: Path) -> None:
    with pytest.raises(BillhookError, match="experts and expert_ffn"):
        given = {"method": "fasp", "ratio": 0.2, "calibration": str(text_file), "seq_len": 32}
        billhook.prune(tiny.model("olmoe"), tokenizer=tiny.tokenizer(), **given)


def test_inspect_counts_experts(mixed_folder: Path) -> None:
    found = limits.anatomy(load.open_skeleton(str(mixed_folder)))
    rows = {row["axis"]: row for row in found["axes"]}
    assert rows["experts"]["units"] == 6 and rows["expert_ffn"]["units"] == 16
    assert rows["experts"]["parameters_per_unit"] == 3 * 16 * 32 + 32
    assert "every token goes" in rows["shared"]["refused"]
    assert json.dumps(found) and len(layers(load.open_model(str(mixed_folder)).model)) == 3
