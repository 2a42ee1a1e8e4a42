"""`--patch linear`: what stands before a cut in depth makes up for it, in closed form; and the command, the card and
the page."""

import copy
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers as T
from torch import Tensor

from billhook import cli
from billhook.calibration.passage import Route
from billhook.calibration.walk import walk
from billhook.choices import PATCHES
from billhook.cuts.chopping import Settings, chop
from billhook.cuts.narrowing import Settings as Restoring
from billhook.errors import BillhookError
from billhook.math import layer_presets, restore
from billhook.models.axes import axes, reader_weight
from billhook.models.families import layers
from billhook.models.plan import Cut, Plan
from billhook.models.surgery import cast, drop_layers
from billhook.pruning import prune
from billhook.pruning.recipe import recipe
from billhook.reports import page
from billhook.reports.cut_tables import cut_rows
from billhook.runtime.run import Run

IDS, OTHERS = tiny.tokens(16, 32), tiny.tokens(4, 32, seed=9)
OTHER = ("granite", "falcon", "falcon_new", "falcon_alibi", "bloom")  # scaled sums; layers that return tuples
PRE_NORM = [name for name in tiny.DENSE if name not in (*tiny.POST_NORM, *OTHER)]
WIDE = {"num_hidden_layers": 8}


def deep(seed: int = 0) -> T.PreTrainedModel:
    torch.manual_seed(seed)
    config = tiny.CONFIGS["llama"](**WIDE)
    return T.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)


def linear(damping: float = 1e-3, correction: float = 0.3) -> Settings:
    return Settings("linear", damping, correction)


def without(model: T.PreTrainedModel, gone: tuple[int, ...], settings: Settings) -> tuple[T.PreTrainedModel, list[Cut]]:
    smaller = copy.deepcopy(model)
    return smaller, chop(smaller, IDS, Plan(layers=gone), settings, Run())


def leaving(model: T.PreTrainedModel, layer: int, ids: Tensor = IDS) -> Tensor:
    """(tokens, hidden) after `layer`, of a whole forward."""
    found: list[Tensor] = []
    hook = layers(model)[layer].register_forward_hook(lambda _, __, out: found.append(out))
    model(ids)
    hook.remove()
    return found[0].flatten(0, -2).double()


def moved(model: T.PreTrainedModel, dense: T.PreTrainedModel, at: int, resumed: int) -> float:
    """How far what leaves layer `at` is from what left layer `resumed` of the unpruned model."""
    return float((leaving(model, at) - leaving(dense, resumed)).norm())


def test_cuts_are_runs_of_neighbours() -> None:
    assert layer_presets.runs_of([5, 1, 2, 7, 6]) == [[1, 2], [5, 6, 7]]
    assert layer_presets.layers_before([0, 1, 4, 6, 7]) == [3, 5]
    assert layer_presets.layers_before([0, 1]) == layer_presets.runs_of([]) == []


@pytest.mark.parametrize("family", ["llama", "opt", "llama_bias"])
def test_what_is_linear_in_the_activations_is_made_up_for_whole(family: str) -> None:
    """On text that no patch saw: the layer that goes adds M X^T, X what enters the projection before it."""
    dense, entered = tiny.model(family), []
    axis = axes(dense, ("ffn",))[0]
    M = torch.randn(axis.units, 32, generator=torch.Generator().manual_seed(5))

    class Linear(type(layers(dense)[1])):
        def forward(self, state: Tensor, **_: Any) -> Tensor:
            return state + entered[-1].view(*state.shape[:-1], -1) @ M

    layers(dense)[1].__class__ = Linear
    reader = dense.get_submodule(axis.reader_module)
    hook = reader.register_forward_pre_hook(lambda _, given: entered.append(given[0]))
    expected = dense(OTHERS).logits
    (cut,) = chop(dense, IDS, Plan(layers=(1,)), linear(damping=1e-12), Run())
    hook.remove()
    assert len(layers(dense)) == 2 and (cut.layer, cut.kind, cut.dropped) == (0, "ffn", 0)
    assert cut.error_held_out is not None  # squares of float32 sums: half the digits
    assert max(cut.error, cut.error_held_out) < 1e-3 * cut.error_without
    torch.testing.assert_close(dense(OTHERS).logits, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("family", PRE_NORM)
@pytest.mark.covering(some={"family": 6})
def test_a_patch_brings_its_layer_nearer_by_what_it_says(family: str) -> None:
    dense = tiny.model(family)
    plain, _ = without(dense, (1,), Settings())
    patched, (cut,) = without(dense, (1,), linear())
    before, after = moved(plain, dense, 0, 1), moved(patched, dense, 0, 1)
    assert after < before and cut.error < cut.error_without and cut.damping == 1e-3
    assert after / before == pytest.approx(cut.error / cut.error_without, rel=1e-4)
    axis = axes(dense, ("ffn",))[0]
    changed = {name for name, p in patched.named_parameters() if not torch.equal(p, plain.get_parameter(name))}
    assert changed == {axis.reader.param}  # no parameter is new, and no other one is touched


@pytest.mark.parametrize("family", PRE_NORM)
@pytest.mark.covering(some={"family": 6})
def test_a_patch_in_bfloat16_helps_too(family: str) -> None:
    model = tiny.model(family)
    cast(model, torch.bfloat16)
    _, (cut,) = without(model, (1,), linear())
    assert cut.error < cut.error_without  # of the weights as they were rounded


@pytest.mark.parametrize("family", PRE_NORM)
@pytest.mark.covering(some={"family": 6})
def test_the_held_out_error_is_that_of_a_fit_which_did_not_see_them(family: str) -> None:
    dense, held = tiny.model(family), IDS[-1:]  # a tenth of 16 windows
    fitted, (cut,) = copy.deepcopy(dense), without(dense, (1,), linear())[1]
    axis = axes(fitted, ("ffn",))[0]
    (layer,) = walk(
        fitted, IDS[:-1], ("ffn",), Run(), Route(stream="dense_target", dropped=(1,), only=(0,), held_out=0.0)
    )
    (seen,), W = layer.fit.values(), reader_weight(fitted, axis)
    W.copy_(restore.least_squares(W, seen.gram, torch.arange(48), 1e-3, seen.cross)[0])
    entered: list[Tensor] = []
    hook = dense.get_submodule(axis.reader_module).register_forward_pre_hook(lambda _, given: entered.append(given[0]))
    off, reader = leaving(fitted, 0, held) - leaving(dense, 1, held), reader_weight(dense, axis)
    hook.remove()
    whole = entered[0].flatten(0, -2) @ reader.T
    assert cut.error_held_out == pytest.approx(float(off.norm() / whole.norm()), rel=1e-3)


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_a_boundless_ridge_leaves_the_model_unpatched(family: str) -> None:
    plain, _ = without(tiny.model(family), (1,), Settings())
    patched, (cut,) = without(tiny.model(family), (1,), linear(damping=1e12))
    for p, q in zip(plain.parameters(), patched.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-7)
    assert cut.error == pytest.approx(cut.error_without)


@pytest.mark.parametrize("damping", [1e-6, 1e-3, 0.1, 1.0])
@pytest.mark.parametrize("gone", [(1,), (2, 3, 4), (0, 2, 5, 6), (1, 3, 5)])
@pytest.mark.covering
def test_no_patch_raises_the_error_it_was_fitted_to(gone: tuple[int, ...], damping: float) -> None:
    _, cuts = without(deep(), gone, linear(damping=damping))
    assert [cut.layer for cut in cuts] == layer_presets.layers_before(gone)
    assert all(cut.error <= cut.error_without * (1 + 1e-9) for cut in cuts)


def test_each_patch_sees_what_those_before_it_have_become() -> None:
    """With the whole correction, the last patch aims at what the unpruned model has there, cuts before it included."""
    dense, gone = deep(), (1, 4)
    patched, (_, cut) = without(dense, gone, linear(correction=1.0))
    once, _ = without(dense, (1,), linear(correction=1.0))
    before, after = moved(once, dense, 2, 4), moved(patched, dense, 2, 4)  # layer 3 is the third that is left
    assert after / before == pytest.approx(cut.error / cut.error_without, rel=1e-4)


@pytest.mark.parametrize("stream", ["dense_target", "sequential", "dense"])
def test_a_walk_stops_where_it_is_asked_to(stream: str) -> None:
    model, gone = deep(), (2, 3, 5)
    every = {layer.number: layer for layer in walk(model, IDS, ("ffn",), Run(), Route(stream=stream, dropped=gone))}
    some = list(walk(model, IDS, ("ffn",), Run(), Route(stream=stream, dropped=gone, only=(1, 4))))
    assert [layer.number for layer in some] == [1, 4]
    for layer in some:
        for found, expected in ((layer.fit, every[layer.number].fit), (layer.held_out, every[layer.number].held_out)):
            for name, evidence in found.items():
                assert torch.equal(evidence.gram, expected[name].gram) and evidence.energy == expected[name].energy
                if stream == "dense_target":
                    assert evidence.cross is not None and torch.equal(evidence.cross, expected[name].cross)
    assert list(walk(model, IDS, ("ffn",), Run(), Route(only=()))) == []


def test_layers_after_the_last_cut_are_not_run() -> None:
    model = deep()
    layers(model)[6].mlp.register_forward_pre_hook(lambda *_: pytest.fail("run in vain"))
    list(walk(model, IDS, ("ffn",), Run(), Route(stream="dense_target", dropped=(3, 4, 5), only=(2,))))


def test_no_patch_is_the_default_and_changes_nothing() -> None:
    chopped, plain = copy.deepcopy(deep()), deep()
    assert chop(chopped, IDS, Plan(layers=(2, 3)), Settings(), Run()) == []
    drop_layers(plain, (2, 3))
    assert all(torch.equal(p, q) for p, q in zip(chopped.parameters(), plain.parameters(), strict=True))
    assert next(iter(PATCHES)) == recipe(ratio=0.2, method="layerchop").settings.patch == Settings().patch == "none"


def test_each_method_has_a_damping_of_its_own() -> None:
    patched = recipe(ratio=0.2, method="layerchop", patch="linear")
    assert patched.settings.cut == Settings("linear") == linear(Settings.damping)
    assert recipe(method="fasp", ratio=0.2).settings.cut == Restoring()
    assert recipe(ratio=0.2, method="layerchop", damping=0.02).settings.cut.damping == 0.02


def test_norms_after_the_sums_are_refused() -> None:
    model = tiny.model("opt_350m")
    with pytest.raises(BillhookError, match="use --patch none"):
        chop(model, IDS, Plan(layers=(1,)), linear(), Run())
    assert len(layers(model)) == 3


@pytest.fixture
def parent(tmp_path: Path) -> Path:
    deep().save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def patch(parent: Path, text_file: Path) -> Callable[..., prune.Result]:
    settings = dict(method="layerchop", patch="linear", calibration=str(text_file), samples=12, seq_len=32, probes=2)
    return lambda **more: prune.prune(str(parent), **{**settings, **more})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("given", [{"drop": "2-3,5"}, {"ratio": 0.3}, {"layers": 5, "preset": "max-gap"}])
@pytest.mark.covering
def test_a_patched_model_is_written_whole(
    given: dict[str, Any], dtype: torch.dtype, tmp_path: Path, text_file: Path
) -> None:
    model = deep()
    cast(model, dtype)
    settings = dict(method="layerchop", patch="linear", calibration=str(text_file), samples=12, seq_len=32, probes=2)
    result = prune.prune(model, tokenizer=tiny.tokenizer(), **settings, **given)
    out = result.save(tmp_path / "out")
    again, told = T.AutoModelForCausalLM.from_pretrained(out), json.loads((out / "billhook.json").read_text())
    assert again.dtype is dtype and torch.equal(again(IDS).logits, model(IDS).logits)
    assert [cut["layer"] for cut in told["cuts"]] == layer_presets.layers_before(told["dropped_layers"])
    assert all(cut["error"] < cut["error_without"] for cut in told["cuts"])
    assert told["calibration"]["windows"] == 12 and told["calibration"]["probes"] == (2 if "ratio" in given else 0)
    assert told["recipe"]["patch"] == "linear" and told["seconds"]["patch"] >= 0


def test_the_card_says_what_a_patch_achieved(patch: Callable[..., prune.Result], tmp_path: Path) -> None:
    found = patch(drop="0,2-3,5", damping=0.01, correction=0.5)
    rows = dict(cut_rows(found.record))
    one, two = found.record["cuts"]
    assert (
        f"layer 1: error {one['error_without']:.2f} → {one['error']:.2f}, {one['error_held_out']:.2f} held out"
        in rows["patched"]
    )
    assert f"layer 4: error {two['error_without']:.2f}" in rows["patched"]
    assert rows["patched"].endswith("nothing stands before layer 0 to patch")
    assert not {"FFN channels", "widths fit"} & set(rows) and rows["calibration"].startswith("12 windows")
    out = found.save(tmp_path / "out")
    assert rows["patched"] in (out / "README.md").read_text()
    assert "Layer by layer" not in page.render(found.page()) and "patched" in page.render(found.page())


def test_a_few_windows_hold_none_out(patch: Callable[..., prune.Result]) -> None:
    assert "held out" not in dict(cut_rows(patch(drop="2", samples=4).record))["patched"]


def test_many_patches_are_said_as_their_mean(patch: Callable[..., prune.Result]) -> None:
    made = patch(drop="2").record
    made["cuts"] = [made["cuts"][0] | {"layer": n} for n in range(9)]
    assert dict(cut_rows(made))["patched"].startswith("layers 0-8: error ")


@pytest.mark.parametrize("given", [{"drop": "2-3"}, {"ratio": 0.3}, {"ratio": 0.3, "preset": "both"}])
def test_the_command_makes_the_same_cut(
    given: dict[str, Any], patch: Callable[..., prune.Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = patch(damping=0.02, correction=0.4, **given)
    said = found.record["command"]
    assert "--patch linear" in said and "--damping 0.02" in said and "--correction 0.4" in said
    monkeypatch.setattr(sys, "argv", said.replace("OUT", str(tmp_path / "out")).split())
    with pytest.raises(SystemExit, match="0"):
        cli.main()
    again = T.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert all(torch.equal(p, q) for p, q in zip(again.parameters(), found.model.parameters(), strict=True))


def test_a_command_without_a_patch_does_not_speak_of_one(patch: Callable[..., prune.Result]) -> None:
    said = patch(patch="none", drop="2").record["command"]
    assert "--patch" not in said and "--damping" not in said


def test_what_will_be_patched_is_announced(parent: Path, text_file: Path) -> None:
    lines: list[str] = []
    settings = dict(method="layerchop", calibration=str(text_file), samples=4, seq_len=32, announce=lines.append)
    prune.prune(str(parent), drop="0-1,3-4", patch="linear", **settings)
    assert lines[0].endswith("; nothing stands before 0-1, the FFN of layer 2 makes up for 3-4")
    prune.prune(str(parent), drop="0-1,3-4", **settings)
    assert "stands" not in lines[1]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--drop", "2", "--patch", "linaer"], "patch 'linaer'.*linear"),
        (["--ratio", 0.2, "--patch", "linear", "--method", "fasp"], "--patch belongs to --method layerchop"),
        (["--drop", "0-1", "--patch", "linear"], "nothing stands before layer 0 .*use --patch none"),
        (["--vocab-from", "TEXT", "--patch", "linear"], "name them, or give a budget"),
        (["--drop", "2", "--patch", "linear", "--damping", 0], "damping 0"),
        (["--drop", "2", "--patch", "linear", "--samples", 9999], "fewer than the 9999 asked for"),
    ],
)
def test_bad_commands_end_in_one_line(
    given: list[Any],
    said: str,
    parent: Path,
    text_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = parent.parent / "out"
    words = ["billhook", "prune", parent, "-o", out, "--method", "layerchop", "--calibration", text_file]
    words += ["--samples", 4, "--seq-len", 32, *(text_file if one == "TEXT" else one for one in given)]
    monkeypatch.setattr(sys, "argv", list(map(str, words)))
    with pytest.raises(SystemExit) as ended:
        cli.main()
    told = capsys.readouterr()
    assert ended.value.code == 2 and told.out == "" and not out.exists()
    assert len(told.err.strip().splitlines()) == 1, told.err
    assert re.search(said, told.err), told.err
