"""The residual dimension: cutting equals zeroing, turning changes nothing, and what comes out is a stock checkpoint."""

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

import billhook
from billhook import cli
from billhook.calibration.gram import gram_of
from billhook.checkpoints import save, verify
from billhook.cuts import slicing_restore as slicegpt_restore
from billhook.cuts.slicing import Settings, _inputs, channel_scores, slice_residual
from billhook.errors import BillhookError
from billhook.models import layout, residual, rotation
from billhook.models.axes import axes
from billhook.models.families import weight_of
from billhook.models.plan import Plan
from billhook.models.sizes import decoder_parameters, saved_by, total_parameters
from billhook.models.surgery import cast, remove
from billhook.planning import plan_lines, residual_budget
from billhook.runtime.run import Run

IDS = tiny.tokens()
SUBTRACT = {
    *("gpt2", "gpt_neox", "gpt_neox_serial", "falcon", "falcon_new", "falcon_alibi", "bloom", "opt", "opt_350m"),
}
CUT = [family for family in tiny.CONFIGS if family not in SUBTRACT | {*tiny.MIXTURES, *tiny.ONLY_FFNS}]
BEHIND = ["gemma2", "gemma3_text", "olmo2"]  # norms behind the writers
TURNED = [family for family in CUT if family not in BEHIND]
GONE = torch.arange(0, 32, 4)
KEPT = torch.tensor([n for n in range(32) if n % 4])


def turnable(family: str, rotate: bool) -> bool:
    return family not in BEHIND or not rotate


def with_eps(family: str, eps: float) -> PreTrainedModel:
    """A model whose eps is no smaller than what it is added to, so that a wrong one shows."""
    model = tiny.model(family)
    model.config.rms_norm_eps = eps
    found = residual.residual(model)
    for name in (*found.norms, *found.inner):
        norm = model.get_submodule(name)
        setattr(norm, residual._eps_name(norm), eps)
    return model


@pytest.mark.covering
@pytest.mark.parametrize("eps", [1e-6, 0.7])
@pytest.mark.parametrize("family", CUT)
def test_cutting_equals_zeroing_what_writes(family: str, eps: float) -> None:
    dense = with_eps(family, eps)
    cut, masked = copy.deepcopy(dense), copy.deepcopy(dense)
    residual.zero(masked, GONE)
    residual.cut(cut, KEPT)
    before, after = masked(IDS).logits, cut(IDS).logits
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)
    assert (before - dense(IDS).logits).abs().max() > 0.02 * before.abs().max()  # the cut was one that shows
    decoder, whole = residual.price(dense)
    assert decoder_parameters(dense) - decoder_parameters(cut) == decoder * len(GONE)
    assert total_parameters(dense) - total_parameters(cut) == whole * len(GONE) > 0
    assert not any(32 in (vars(m).get("hidden_size"), vars(m).get("embedding_dim")) for m in cut.modules())
    assert all(m.weight.shape == (m.out_features, m.in_features) for m in cut.modules() if isinstance(m, nn.Linear))


@pytest.mark.parametrize("family", CUT)
def test_a_cut_can_be_cut_again(family: str) -> None:
    once, twice = tiny.model(family), tiny.model(family)
    residual.cut(once, KEPT[:16])
    residual.cut(twice, KEPT)
    residual.cut(twice, torch.arange(16))
    torch.testing.assert_close(once(IDS).logits, twice(IDS).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.covering
@pytest.mark.parametrize("eps", [1e-6, 0.7])
@pytest.mark.parametrize("family", TURNED)
def test_turning_changes_nothing(family: str, eps: float) -> None:
    dense = with_eps(family, eps)
    turned = copy.deepcopy(dense)
    rotation.fold(turned)
    torch.testing.assert_close(turned(IDS).logits, dense(IDS).logits, rtol=1e-5, atol=1e-5)
    Q = torch.linalg.qr(torch.randn(32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))[0]
    rotation.rotate(turned, Q)
    torch.testing.assert_close(turned(IDS).logits, dense(IDS).logits, rtol=1e-5, atol=1e-5)
    embedding, head = residual.embedding_and_head(turned)
    assert head.weight is not embedding.weight and not turned.config.tie_word_embeddings
    assert (embedding.weight - residual.embedding_and_head(dense)[0].weight).abs().max() > 0.1  # it was turned


@pytest.mark.parametrize("family", TURNED)
def test_the_principal_axes_come_first(family: str) -> None:
    """What enters the readers of a turned model has a diagonal Gram, falling: no other axes hold more in the first
    ones."""
    model = tiny.model(family)
    slice_residual(model, IDS, Plan(rotate=True), Settings(), Run())
    sums = torch.zeros(32, 32, dtype=torch.float64)

    def tap(_: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        sums.add_(gram_of(args[0]))

    for readers in residual.residual(model).readers:
        model.get_submodule(readers[0]).register_forward_pre_hook(tap)
    model(IDS)
    diagonal = sums.diagonal()
    assert (sums - diagonal.diag()).abs().max() < 1e-3 * diagonal.max()
    assert (diagonal[:-1] - diagonal[1:]).min() > -1e-3 * diagonal.max()


@pytest.mark.covering(first=turnable, some={"family": 6})
@pytest.mark.parametrize("rotate", [False, True])
@pytest.mark.parametrize("family", CUT)
def test_a_cut_is_a_stock_checkpoint(family: str, rotate: bool, tmp_path: Path) -> None:
    model = tiny.model(family)
    tied, before, eps = residual.residual(model).tied, total_parameters(model), model.config.rms_norm_eps
    if rotate and family in BEHIND:
        with pytest.raises(BillhookError, match=r"stands between a writer and the residual stream.*--no-rotate"):
            residual_budget.planner(model, 4, rotate)
        return
    plan = residual_budget.planner(model, 4, rotate).make(0.25 * decoder_parameters(model))
    assert plan == Plan(residual=8, rotate=rotate)
    less = saved_by(model, plan)
    line, said = plan_lines.residual_line(model, plan, "ratio 0.25"), residual_budget.record(model, plan)
    assert f"→ {before - less:,} parameters" in line and "24 of 32 channels" in line
    slice_residual(model, IDS, plan, Settings(), Run())
    assert total_parameters(model) == before - less
    assert said and said["untied_parameters"] == (258 * 24 if rotate and tied else 0)
    layout.update_config(model)
    out = tmp_path / "out"
    out.mkdir()
    save.save(model, tiny.tokenizer(), out, None)
    config = json.loads((out / "config.json").read_text())
    assert config["hidden_size"] == 24 and "auto_map" not in config
    assert config["rms_norm_eps"] == eps * 32 / 24
    assert config["tie_word_embeddings"] == (tied and not rotate)
    again = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    assert save.stored_parameters(out) == total_parameters(model)
    assert (again.get_output_embeddings().weight is again.get_input_embeddings().weight) == (tied and not rotate)
    greedy = [again.generate(IDS, max_new_tokens=6, do_sample=False, use_cache=cache) for cache in (True, False)]
    assert torch.equal(*greedy)
    assert verify.verify(out, model)["cache_drift"] < 1e-5


@pytest.mark.parametrize("family", sorted(SUBTRACT))
def test_a_mean_that_is_subtracted_is_refused(family: str) -> None:
    with pytest.raises(BillhookError, match=r"cannot give up 'residual': .*LayerNorm.*fasp, layerchop"):
        residual_budget.planner(tiny.model(family), 4, False)


@pytest.mark.parametrize("family", sorted(tiny.MIXTURES))
def test_mixtures_are_refused(family: str) -> None:
    with pytest.raises(BillhookError, match=r"cannot give up 'residual' yet: its routers.*--method experts"):
        residual_budget.planner(tiny.model(family), 4, False)


def test_a_parameter_of_no_known_place_is_refused() -> None:
    model = tiny.model("llama")
    model.model.layers[1].mlp.router = nn.Parameter(torch.zeros(4, 32))
    with pytest.raises(BillhookError, match=r"model.layers.1.mlp.router may have a part in it"):
        residual.residual(model)


def test_a_size_that_the_own_config_refuses_is_held_by_the_stand_in(tmp_path: Path) -> None:
    """30 channels with 4 heads: LlamaConfig says no, Mistral computes the same; qwen2's has no such check."""
    model = tiny.model("llama")
    plan = residual_budget.planner(model, 2, True).make(0.0625 * decoder_parameters(model))
    assert plan.residual == 2
    slice_residual(model, IDS, plan, Settings(), Run())
    layout.update_config(model)
    save.save(model, tiny.tokenizer(), tmp_path, None)
    assert verify.verify(tmp_path, model)["logits"] == "equal"
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again).__name__ == "MistralForCausalLM" and again.config.hidden_size == 30


def test_only_sizes_that_some_stock_config_takes_are_planned() -> None:
    """Biases have no stand-in, and 4 heads: multiples of 4 alone."""
    planner, decoder = (
        residual_budget.planner(tiny.model("llama_bias"), 2, False),
        decoder_parameters(tiny.model("llama_bias")),
    )
    assert {planner.make(share * decoder).residual % 4 for share in (0.1, 0.15, 0.2, 0.3, 0.34)} == {0}


def test_the_score_is_the_squared_error_that_a_zeroed_channel_makes() -> None:
    model = tiny.model("mistral")
    found, expected = residual.residual(model), torch.zeros(32, dtype=torch.float64)
    seen: dict[str, torch.Tensor] = {}
    for name in (name for group in found.readers for name in group):
        hook: Any = lambda module, args, name=name: seen.update({name: args[0].flatten(0, -2).double()})  # noqa: E731
        model.get_submodule(name).register_forward_pre_hook(hook)
    model(IDS)
    for name, x in seen.items():
        W = weight_of(model, name).double()
        errors = torch.stack([(x[:, j : j + 1] * W[:, j]).square().sum() for j in range(32)])
        expected += errors / errors.sum()
    torch.testing.assert_close(channel_scores(model, IDS, Run()), expected, rtol=1e-5, atol=0)
    cut = copy.deepcopy(model)
    slice_residual(cut, IDS, Plan(residual=8), Settings(restoration=False), Run())
    by_hand = expected.argsort()[8:].sort().values
    assert torch.equal(
        residual.embedding_and_head(cut)[0].weight, residual.embedding_and_head(model)[0].weight[:, by_hand]
    )


@pytest.mark.parametrize("family", CUT)
def test_inputs_layer_by_layer_are_those_of_a_forward_pass(family: str) -> None:
    model, seen = tiny.model(family), {}
    for readers in residual.residual(model).readers:
        hook: Any = lambda module, args, readers=readers: seen.update({readers: args[0].flatten(0, -2)})  # noqa: E731
        model.get_submodule(readers[0]).register_forward_pre_hook(hook)
    model(IDS)
    asked, expected = dict(_inputs(model, IDS, Run())), dict(seen)
    assert asked.keys() == expected.keys()
    for readers, x in asked.items():
        torch.testing.assert_close(x, expected[readers], rtol=1e-5, atol=1e-6)


def test_turning_first_costs_less() -> None:
    """On text whose stream has a few directions that matter, none of them a channel."""
    dense = tiny.model("llama")
    basis = torch.linalg.qr(torch.randn(32, 32, generator=torch.Generator().manual_seed(5)))[0]
    flat = basis[:, :20] @ basis[:, :20].T
    for slot in residual.writes(dense, residual.residual(dense)):
        seen = dense.get_parameter(slot.param).data.movedim(slot.dim, -1)
        seen.copy_(seen @ flat)
    for name in residual.residual(dense).norms:
        dense.get_submodule(name).weight.data.fill_(1)
    found = {}
    for rotate in (False, True):
        model = copy.deepcopy(dense)
        slice_residual(model, IDS, Plan(residual=12, rotate=rotate), Settings(restoration=False), Run())
        found[rotate] = float((model(IDS).logits - dense(IDS).logits).norm() / dense(IDS).logits.norm())
    assert found[True] < 1e-4 < 0.05 < found[False]


@pytest.mark.covering(first=turnable, some={"family": 6})
@pytest.mark.parametrize("rotate", [False, True])
@pytest.mark.parametrize("family", CUT)
def test_restoration_comes_nearer_to_the_unpruned_model(family: str, rotate: bool) -> None:
    if rotate and family in BEHIND:
        return
    dense, ids = tiny.model(family), tiny.tokens(windows=32, length=32)
    found = []
    for settings in (Settings(restoration=False), Settings(), Settings(damping=1e-6, correction=1.0)):
        model = copy.deepcopy(dense)
        slice_residual(model, ids, Plan(residual=8, rotate=rotate), settings, Run())
        found.append(float((model(ids).logits - dense(ids).logits).norm() / dense(ids).logits.norm()))
    assert found[1] < found[0]
    assert found[2] < (1.0 if family in BEHIND else 0.9) * found[0]  # where norms follow them, writers stay as they are


@pytest.mark.parametrize("family", [one for one in TURNED if one not in ("granite",)])
def test_restoration_leaves_what_lost_nothing(family: str) -> None:
    dense, kept = tiny.model(family), torch.arange(32)
    model = copy.deepcopy(dense)
    slicegpt_restore.restore(model, copy.deepcopy(dense), IDS, kept, Settings(damping=1e-6, correction=1.0), Run())
    torch.testing.assert_close(model(IDS).logits, dense(IDS).logits, rtol=1e-3, atol=1e-3)


@pytest.mark.covering
@pytest.mark.parametrize("rotate", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_prune_in_memory_and_save(dtype: torch.dtype, rotate: bool, tmp_path: Path, text_file: Path) -> None:
    model = tiny.model("llama")
    cast(model, dtype)
    settings: dict[str, Any] = dict(calibration=str(text_file), samples=8, seq_len=32, multiple_of=4)
    result = billhook.prune(model, tokenizer=tiny.tokenizer(), method="slicegpt", rotate=rotate, ratio=0.25, **settings)
    found = result.record
    assert found["residual"] == {
        "before": 32,
        "kept": 24,
        "rotated": rotate,
        "untied_parameters": 258 * 24 * rotate,
    }
    assert abs(found["sizes"]["achieved_ratio"] - 0.25) < 0.02
    out = result.save(tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(out)
    assert again.dtype is dtype and torch.equal(again(IDS).logits, model(IDS).logits)
    assert found["verified"]["parameters_on_disk"] == found["sizes"]["after"]["parameters"]


@pytest.mark.parametrize("family", ["gemma2", "qwen3"])
def test_bfloat16_comes_back_bit_for_bit(family: str, tmp_path: Path) -> None:
    model = tiny.model(family)
    cast(model, torch.bfloat16)
    slice_residual(model, IDS, Plan(residual=8, rotate=family not in BEHIND), Settings(), Run())
    assert model(IDS).logits.isfinite().all()
    layout.update_config(model)
    save.save(model, tiny.tokenizer(), tmp_path, None)
    assert verify.verify(tmp_path, model)["logits"] == "equal"


@pytest.mark.parametrize("rotate", [False, True])
@pytest.mark.parametrize("budget", [{"params": 30_000}, {"memory": "100kB"}])
def test_other_budgets(budget: dict[str, Any], rotate: bool, text_file: Path) -> None:
    model, settings = tiny.model("llama"), dict(calibration=str(text_file), samples=4, seq_len=32, multiple_of=2)
    more: dict[str, Any] = {**settings, **budget, "context": 16}
    found = billhook.prune(model, tokenizer=tiny.tokenizer(), method="slicegpt", rotate=rotate, **more).record
    assert 0 < found["residual"]["kept"] < 32
    if "params" in budget:
        step = residual.price(model)[1]
        assert abs(found["sizes"]["after"]["parameters"] - 30_000) <= 2 * step


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int | str | None:
    monkeypatch.setattr("sys.argv", ["billhook", *map(str, arguments)])
    with pytest.raises(SystemExit) as left:
        cli.main()
    return left.value.code


@pytest.fixture
def command(folder: Path, text_file: Path, tmp_path: Path) -> list[object]:
    settings = ["--calibration", text_file, "--samples", 8, "--seq-len", 32, "--multiple-of", 4]
    return ["prune", folder, "-o", tmp_path / "out", "--method=fasp", *settings]


@pytest.mark.parametrize("switch", [[], ["--no-rotate"]])
def test_the_command_line(
    switch: list[str],
    command: list[object],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(monkeypatch, *command, "--method", "slicegpt", "--ratio", 0.2, *switch) == 0
    printed = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "32 → 24 channels" in printed or "32 → 28 channels" in printed
    assert ("rotated first" in printed) == (not switch) == ("no longer tied" in printed)
    stored = json.loads((tmp_path / "out" / "billhook.json").read_text())
    assert stored["recipe"]["rotate"] == (not switch) and stored["layout"] == "uniform"
    made = stored["command"]
    assert ("--no-rotate" in made) == bool(switch) and "--method slicegpt" in made
    again = made.replace("-o OUT", f"-o {tmp_path / 'again'}").split()[1:]
    assert run(monkeypatch, *again) == 0
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


REFUSALS = {
    "--method slicegpt --ratio 0.95": "residual stream can give up at most .* lower the ratio",
    "--method slicegpt --ratio 1e-7": "less than half of the smallest step .*raise the ratio",
    "--method slicegpt --ratio 0.2 --multiple-of 64": "no residual dimension below 32 is a multiple.*lower it",
    "--method slicegpt --ratio 0.2 --layout per_layer": "axis 'residual' is one size for the whole model.*leave out --layout",
    "--method slicegpt --ratio 0.2 --allocation sensitivity": "slicegpt has no allocation",
    "--method slicegpt --speedup 1.2": "--speedup is no budget of slicegpt",
    "--method slicegpt --ratio 0.2 --axes ffn": "slicegpt does not prune 'ffn'.*residual",
    "--method slicegpt": "no budget: give --ratio",
    "--ratio 0.2 --rotate": "--rotate belongs to --method slicegpt",
    "--method wanda --sparsity 0.5 --rotate": "--rotate belongs to --method slicegpt",
    "--ratio 0.2 --axes residual": "fasp does not prune 'residual'",
}


@pytest.mark.parametrize("flags", REFUSALS)
def test_bad_input_ends_in_one_line(
    flags: str,
    command: list[object],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(monkeypatch, *command, *flags.split()) == 2
    said = capsys.readouterr().err
    assert said.startswith("billhook: error: ") and said.count("\n") == 1 and len(said) < 600, said
    assert re.search(REFUSALS[flags], said), said
    assert not (tmp_path / "out").exists()


def test_layers_that_differ_are_refused(text_file: Path) -> None:
    model = tiny.model("llama")
    remove(model, axes(model, ("ffn",))[0], torch.tensor([3]))
    settings: dict[str, Any] = dict(calibration=str(text_file), samples=4, seq_len=32)
    with pytest.raises(BillhookError, match="layers of this model differ"):
        billhook.prune(model, tokenizer=tiny.tokenizer(), method="slicegpt", ratio=0.2, **settings)


def test_what_is_cut_can_be_trained_but_not_by_hidden_states(
    command: list[object],
    folder: Path,
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(monkeypatch, *command, "--method", "slicegpt", "--ratio", 0.2) == 0
    held = tmp_path / "held.txt"
    held.write_text(tiny.text(300, lexicon=30))
    texts = ["--text", text_file, "--held-out", held, "--seq-len", 16, "--batch-tokens", 32, "--tokens", 128]
    heal = ["recover", tmp_path / "out", "-o", tmp_path / "healed", "--teacher", folder, *texts, "--lr", 1e-3]
    assert run(monkeypatch, *heal, "--states", "on") == 2
    assert "has other channels than what it was cut from: leave it out" in capsys.readouterr().err
    assert run(monkeypatch, *heal) == 0
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "healed").config.hidden_size < 32


def test_a_leaderboard_brings_it_to_the_size_of_others(
    folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = ["--calibration", text_file, "--text", text_file, "--windows", 2, "--samples", 4, "--seq-len", 32]
    contenders = ["--methods", "fasp:multiple_of=2", "--methods", "slicegpt:rotate=false,multiple_of=2", "--ratio", 0.2]
    table = tmp_path / "table.json"
    assert run(monkeypatch, "compare", folder, *contenders, *seen, "--json", table) == 0
    points = {one["series"]: one for one in json.loads(table.read_text())["points"]}
    assert not any(one["error"] for one in points.values())
    assert points["slicegpt:rotate=false,multiple_of=2"]["parameters"] < points["unpruned"]["parameters"]
