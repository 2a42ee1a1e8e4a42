"""Which layers go: presets by position, what is measured against models that have lost the layers, and the command."""

import json
import math
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import tiny
import torch
import transformers as T

from billhook.calibration import layer_importance
from billhook.checkpoints import load
from billhook.choices import DATA_FREE_PRESETS, MEASURED_PRESETS, PRESETS
from billhook.errors import BillhookError
from billhook.math import layer_presets
from billhook.methods import minutes
from billhook.models.experts import unfuse
from billhook.models.families import layers
from billhook.models.surgery import drop_layers
from billhook.pruning import prune
from billhook.reports.formatting import ranges
from billhook.runtime import offload
from billhook.runtime.run import Run
from billhook.training.refinement import Refining

ROUTERS = ("mlp.gate.weight", "mlp.router.weight", "block_sparse_moe.gate.weight", "mlp.shared_expert_gate.weight")


def deep(count: int = 6, seed: int = 0) -> T.PreTrainedModel:
    torch.manual_seed(seed)
    config = tiny.CONFIGS["llama"](num_hidden_layers=count)
    model = T.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    for n, layer in enumerate(layers(model)):
        for param in layer.parameters():
            param.data *= 1 + (n * 7 % 5)  # layers that differ in what they do
    return model


def loss_of(model: T.PreTrainedModel, tokens: torch.Tensor) -> float:
    logits = model(tokens, use_cache=False).logits[:, :-1]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).item()


@pytest.mark.parametrize(
    ("preset", "half", "few"),
    [
        ("input", [1, 2, 3, 4], [1]),
        ("output", [3, 4, 5, 6], [6]),
        ("reverse", [3, 4, 5, 6], [6]),
        ("middle", [2, 3, 4, 5], [4]),
        ("both", [1, 2, 5, 6], [1]),
        ("max-gap", [1, 3, 4, 6], [4]),
    ],
)
def test_presets_by_hand(preset: str, half: list[int], few: list[int]) -> None:
    assert layer_presets.POSITIONS[preset](8, 4) == half and layer_presets.POSITIONS[preset](8, 1) == few


@pytest.mark.parametrize("preset", layer_presets.POSITIONS)
@pytest.mark.parametrize("total", [3, 8, 30, 33])
def test_presets_leave_the_first_and_the_last(preset: str, total: int) -> None:
    for count in range(1, total - 1):
        found = layer_presets.POSITIONS[preset](total, count)
        assert len(set(found)) == count and found == sorted(found) and found[0] > 0 and found[-1] < total - 1
        assert set(layer_presets.random_layers(total, count, 3)) <= set(range(1, total - 1))


def test_every_other_layer_goes_at_a_half() -> None:
    found = layer_presets.max_gap(32, 15)
    assert all(b - a == 2 for a, b in pairwise(found))


def test_layers_are_named_in_ranges() -> None:
    assert layer_presets.parse_layers("10-12, 20,3", 30) == [3, 10, 11, 12, 20]
    assert ranges([3, 10, 11, 12, 20]) == "3, 10-12, 20"


@pytest.mark.parametrize("text", ["12-10", "1,1", "1-3,2", "30", "-1", "a", "", "1-", "1--2"])
def test_wrong_names_are_refused(text: str) -> None:
    with pytest.raises(BillhookError, match="layers "):
        layer_presets.parse_layers(text, 30)


def test_the_losses_are_those_of_models_without_the_layers() -> None:
    model, tokens = deep(), tiny.tokens(3, 24)
    each, blocks = (
        layer_importance.losses_without_each(model, tokens, [2]),
        layer_importance.losses_without_blocks(model, tokens, 3),
    )
    assert len(each) == 6 and len(blocks) == 2
    for gone, found in [({n, 2}, each[n]) for n in range(6)] + [({1, 2, 3}, blocks[0]), ({2, 3, 4}, blocks[1])]:
        without = deep()
        drop_layers(without, sorted(gone))
        assert found == pytest.approx(loss_of(without, tokens), rel=1e-5)


def test_block_influence_by_hand() -> None:
    model, tokens = deep(), tiny.tokens(3, 24)
    states = model(tokens, output_hidden_states=True).hidden_states[:-1]  # the last one is after the final norm
    for n, (x, y) in enumerate(pairwise(states)):
        cosine = torch.cosine_similarity(x[:, 1:].double(), y[:, 1:].double(), dim=-1).mean().item()
        assert layer_importance.block_influence(model, tokens)[n] == pytest.approx(1 - cosine, abs=1e-5)


def test_angles_by_hand() -> None:
    model, tokens = deep(), tiny.tokens(3, 24)
    states = model(tokens, output_hidden_states=True).hidden_states[:-1]
    found = layer_importance.angular_distances(model, tokens)
    cosine = torch.cosine_similarity(states[1][:, -1].double(), states[4][:, -1].double(), dim=-1)
    assert found[1][4] == pytest.approx((cosine.arccos() / math.pi).mean().item(), abs=1e-4)
    assert len(found) == 7 and all(found[n][n] == pytest.approx(0, abs=1e-4) for n in range(7))


@pytest.mark.parametrize("quiet_one", [2, 4])
@pytest.mark.parametrize("preset", ["block-influence", "angular"])
def test_a_layer_that_does_nothing_goes_first(preset: str, quiet_one: int) -> None:
    model, tokens = deep(), tiny.tokens(4, 24)
    for param in (layers(model)[quiet_one].mlp.down_proj.weight, layers(model)[quiet_one].self_attn.o_proj.weight):
        param.data *= 0
    assert layer_importance.chosen(model, preset, 1, tokens, tokens, Run()) == [quiet_one]
    assert layer_importance.losses_without_each(model, tokens)[quiet_one] == pytest.approx(
        loss_of(model, tokens), rel=1e-5
    )


def test_greedy_is_a_search_of_models() -> None:
    model, tokens = deep(), tiny.tokens(3, 24)
    gone: list[int] = []
    for _ in range(2):
        losses = {}
        for n in set(range(1, 5)) - set(gone):
            without = deep()
            drop_layers(without, sorted([*gone, n]))
            losses[n] = loss_of(without, tokens)
        gone.append(min(losses, key=lambda n: losses[n]))
    assert layer_importance.chosen(model, "greedy", 2, tokens, tokens, Run()) == sorted(gone)


def test_taylor_keeps_the_first_four_and_the_last_two() -> None:
    tokens = tiny.tokens(2, 24)
    assert set(layer_importance.chosen(deep(9), "taylor", 2, tokens, tokens, Run())) <= {4, 5, 6}


@pytest.mark.parametrize("total", [1, 2, 3, 6, 8])
def test_taylor_keeps_them_where_few_layers_are(total: int, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens, most = tiny.tokens(1, 16), max(total - 6, 0)
    if most:
        assert layer_importance.chosen(deep(total), "taylor", most, tokens, tokens, Run()) == list(range(4, 4 + most))
    monkeypatch.setattr(layer_importance, "element_sums", None)  # refused before anything is measured
    with pytest.raises(BillhookError, match=f"first 4 and the last 2 of {total} layers: at most {most} can go"):
        layer_importance.chosen(deep(total), "taylor", most + 1, tokens, tokens, Run())


@pytest.mark.parametrize("family", [family for family in tiny.CONFIGS if family not in tiny.ONLY_FFNS])
@pytest.mark.covering(some={"family": 6})
def test_taylor_sums_over_every_linear_weight(family: str) -> None:
    """Whatever has two dimensions in a layer, by autograd over the loss of all windows, but for routers and their
    like."""
    model, tokens = tiny.model(family), tiny.tokens(2, 12)
    unfuse(model)
    found = layer_importance.taylor_scores(model, tokens)
    assert not any(param.requires_grad or param.grad is not None for param in model.parameters())
    logits = model.requires_grad_(True)(tokens, use_cache=False).logits[:, :-1].float()
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
    for n, layer in enumerate(layers(model)):
        expected = 0.0
        for name, param in layer.named_parameters():
            if param.ndim > 1 and name not in ROUTERS:
                assert param.ndim == 2
                expected += 0.0 if param.grad is None else (param * param.grad).abs().sum().item()
        assert found[n] == pytest.approx(len(tokens) * expected, rel=1e-3)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("total", [1, 2])
@pytest.mark.covering(some={"preset": 3})
def test_a_model_without_inner_layers_has_none_to_give(total: int, preset: str, tmp_path: Path) -> None:
    deep(total).save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "text").write_text(tiny.text())
    given = dict(method="layerchop", preset=preset, calibration=str(tmp_path / "text"), samples=4, seq_len=32, probes=2)
    for wanted in ({"ratio": 0.3}, {"ratio": 0.01}, {"params": "20K"}, {"layers": 1}, {"memory": "60KB"}):
        with pytest.raises(BillhookError, match=r"first and the last (layer )?stay|a model may have") as caught:
            prune.prune(str(tmp_path / "model"), **given, **wanted)
        assert "\n" not in str(caught.value)


def test_what_was_measured_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens = deep(9), tiny.tokens(3, 24)
    once = [layer_importance.chosen(model, p, 2, tokens, tokens, Run(statistics=tmp_path)) for p in MEASURED_PRESETS]
    monkeypatch.setattr(layer_importance, "run_layer", None)
    monkeypatch.setattr(layer_importance, "element_sums", None)
    assert once == [
        layer_importance.chosen(model, p, 2, tokens, tokens, Run(statistics=tmp_path)) for p in MEASURED_PRESETS
    ]


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.covering(some={"preset": 3})
def test_a_chopped_model_is_written_whole(preset: str, tmp_path: Path, text_file: Path) -> None:
    deep(8).save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    given = dict(method="layerchop", preset=preset, calibration=str(text_file), samples=4, seq_len=32, probes=2)
    result = prune.prune(str(tmp_path / "model"), ratio=0.25, **given)
    out = result.save(tmp_path / "out")
    told = json.loads((out / "billhook.json").read_text())
    gone, kept = told["dropped_layers"], told["kept_layers"]
    assert len(gone) == 2 and sorted(gone + kept) == list(range(8)) and {0, 7} <= set(kept)
    again = T.AutoModelForCausalLM.from_pretrained(out)
    assert again.config.num_hidden_layers == len(layers(again)) == 6
    assert (told["calibration"]["windows"] == 0) == (preset in DATA_FREE_PRESETS)


def test_presets_by_position_need_no_text(tmp_path: Path) -> None:
    deep().save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    for given in (
        {"preset": "input", "ratio": 0.34},
        {"drop": "0,2-3"},
        {"keep": "0,4,5"},
        {"preset": "both", "layers": 4},
    ):
        result = prune.prune(
            str(tmp_path / "model"), method="layerchop", calibration=str(tmp_path / "nowhere.txt"), **given
        )
        assert len(layers(result.model)) in (3, 4)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"ratio": 0.9}, "the first and the last stay"),
        ({"ratio": 0.01}, "at least one goes"),
        ({"layers": 6}, "0 of 6 layers would go"),
        ({"layers": 9}, "-3 of 6 layers would go"),
        ({"drop": "0-5"}, "all 6 layers would go"),
        ({"drop": "4-9"}, "there is no layer 9"),
        ({"drop": "4-2"}, "the range 4-2 is reversed"),
        ({"drop": "1-3,2"}, "layer 2 is named twice"),
        ({"keep": "0-5"}, "none would go"),
        ({"drop": "1", "ratio": 0.2}, "--ratio and --drop are two budgets"),
        ({"ratio": 0.2, "preset": "inputs"}, "preset 'inputs'.*input"),
        ({"ratio": 0.2, "allocation": "global"}, "layerchop has no allocation"),
        ({"ratio": 0.2, "axes": ("ffn",)}, "layerchop does not prune 'ffn'"),
        ({"drop": "1", "method": "fasp"}, "--drop belongs to --method layerchop"),
    ],
)
def test_bad_input(given: dict[str, object], said: str, tmp_path: Path, text_file: Path) -> None:
    deep().save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    settings = {"method": "layerchop", "calibration": str(text_file), "samples": 4, "seq_len": 32, "probes": 2, **given}
    with pytest.raises(BillhookError, match=said):
        prune.prune(str(tmp_path / "model"), **settings)


@pytest.mark.parametrize("windows", [1, 6])
@pytest.mark.parametrize("start", [1, 3, 6])
def test_a_block_that_adds_nothing_is_missed_least(start: int, windows: int) -> None:
    model = tiny.model("llama", num_hidden_layers=9)
    for n, module in enumerate(layers(model)):
        for param in module.mlp.down_proj.parameters() if n not in (start, start + 1) else module.parameters():
            param.data *= 30 if n not in (start, start + 1) else 0
    probe = torch.randint(0, 258, (windows, 16), generator=torch.Generator().manual_seed(1))
    assert layer_importance.missed_least(model, 2, probe, Run()) == [start, start + 1]


def test_a_short_list_is_tried_on_all_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """A block that the first window likes may lose by the others."""
    model, probe = deep(9), torch.randint(0, 258, (6, 16), generator=torch.Generator().manual_seed(1))
    tried: list[tuple[int, list[list[int]]]] = []
    found = {2: 0.3, 3: 0.1, 4: 0.2}  # by the first layer, on the first window; on the others 2 is best

    def divergences(_: object, windows: torch.Tensor, without: list[set[int]], __: object) -> list[float]:
        tried.append((len(windows), [sorted(gone) for gone in without]))
        return [found.get(min(gone), 1.0) if len(windows) == 1 else min(gone) / 10 for gone in without]

    monkeypatch.setattr(layer_importance, "_divergences", divergences)
    monkeypatch.setattr(layer_importance, "SHORTLIST", 3)
    assert layer_importance.missed_least(model, 2, probe, Run()) == [2, 3]
    assert [(count, len(blocks)) for count, blocks in tried] == [(1, 6), (5, 3)]


def test_of_weights_in_their_files_each_is_read_once_for_all_windows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deep(6).save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    whole, streamed = (load.open_model(str(tmp_path), stream=stream).model for stream in (False, True))
    probe, read = torch.randint(0, 258, (3, 16), generator=torch.Generator().manual_seed(1)), list[str]()
    stored = offload.WeightStore.read

    def reading(store: offload.WeightStore, names: list[str]) -> Iterator[tuple[str, torch.Tensor]]:
        read.extend(names)
        return stored(store, names)

    monkeypatch.setattr(offload.WeightStore, "read", reading)
    for measure in (
        lambda model: layer_importance.losses_without_blocks(model, probe, 2),
        lambda model: layer_importance.block_influence(model, probe),
        lambda model: layer_importance.angular_distances(model, probe),
    ):
        read.clear()
        assert measure(streamed) == measure(whole)
        assert read and all(read.count(name) == 1 for name in read if ".layers." in name)


def test_costs_are_told_by_the_numbers_that_the_work_goes_by() -> None:
    assert minutes.SHORTLIST == layer_importance.SHORTLIST and minutes.COMPARED == layer_importance.EVERY
    assert Refining.length == minutes.SPAN
