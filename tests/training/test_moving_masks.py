"""Masks that move while a model trains: the pattern, where masks go, and what a cut-off run goes on with."""

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch.nn.utils import parametrize

from billhook.checkpoints import load
from billhook.checkpoints.result import Result
from billhook.checkpoints.save import save
from billhook.errors import BillhookError
from billhook.math import sr_ste
from billhook.math.pattern import parse
from billhook.models.families import weight_of
from billhook.recovery.recover import recover
from billhook.recovery.settings import recovery
from billhook.reports.card import model_card
from billhook.training import moving_masks, schedule, trainables, trainer
from billhook.training.keep_zeros import ZeroKeeper

LENGTH = 16
TWO = parse("2:4")


@pytest.fixture
def bench(tmp_path: Path) -> dict[str, Any]:
    words = tiny.text(1200)
    (tmp_path / "train.txt").write_text(words[:3000])
    (tmp_path / "held.txt").write_text(words[3000:4000])
    (tmp_path / "model").mkdir()
    save(tiny.model("llama"), tiny.tokenizer(), tmp_path / "model", None)
    texts = {"text": (str(tmp_path / "train.txt"),), "held_out": (str(tmp_path / "held.txt"),)}
    few = {"seq_len": LENGTH, "lr": 1e-2, "device": "cpu", "precision": "float32", "guard": False}
    return {"teacher": str(tmp_path / "model"), **texts, **few}


def trained(bench: dict[str, Any], steps: int, **more: Any) -> Result:
    how = {"masks": "ast", "pattern": "2:4", "objective": "both", "tokens": steps * LENGTH, **more}
    return recover(bench["teacher"], **{**bench, **how})


def test_a_run_that_was_cut_off_ends_in_the_same_bits_and_masks(
    bench: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the pattern holds at the end, masks move, and ever fewer entries with the rate."""
    whole = trained(bench, 23, mask_score="wanda")
    assert [move["step"] for move in whole.healing["flips"]] == [10, 20]
    flips = [move["flips"] for move in whole.healing["flips"]]
    assert flips[0] > flips[1] > 0
    whole.save(tmp_path / "out")
    for name in moving_masks._names(again := load.load(tmp_path / "out")):
        assert ((weight_of(again, name).unflatten(-1, (-1, 4)) == 0).sum(-1) == 2).all(), name
    card = model_card({**whole.record, "license": None})
    assert "under masks of 2:4 that move, by wanda" in card and f"{sum(flips):,} entries changed in 2 moves" in card
    assert "--objective both" in card and "--pattern 2:4 --masks ast --mask-score wanda --mask-decay 0.0001" in card
    done = trainer.Watch.on_step_end

    def cut_off(watch: Any, args: Any, state: Any, control: Any, **rest: Any) -> None:
        if state.global_step == 16:  # between two moves
            raise KeyboardInterrupt
        done(watch, args, state, control, **rest)

    monkeypatch.setattr(trainer.Watch, "on_step_end", cut_off)
    with pytest.raises(KeyboardInterrupt):
        trained(bench, 23, mask_score="wanda", work=tmp_path / "work")
    assert 10 < schedule.step_of(schedule.checkpoints(tmp_path / "work")[-1]) < 16
    monkeypatch.undo()
    again = trained(bench, 23, mask_score="wanda", work=tmp_path / "work")
    ours, theirs = whole.model.state_dict(), again.model.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert all(whole.healing[key] == again.healing[key] for key in ("losses", "flips"))


def test_without_decay_and_moves_it_trains_under_fixed_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    """As Adam does, once the first moment is the gradient: for then the second one is of gradients as well."""
    monkeypatch.setattr(sr_ste, "BETAS", (0.0, 0.95))
    sparse = tiny.model("llama")
    for name in moving_masks._names(sparse):
        weight_of(sparse, name).mul_(sr_ste.largest(weight_of(sparse, name), TWO))
    fixed, moving = tiny.model("llama"), tiny.model("llama")
    fixed.load_state_dict(sparse.state_dict())
    moving.load_state_dict(sparse.state_dict())
    keeper = ZeroKeeper(fixed.requires_grad_(True))
    moving_masks.train_with_moving_masks(moving.requires_grad_(True), TWO)
    adam = torch.optim.Adam(fixed.parameters(), lr=1e-3, betas=(0.0, 0.95))
    beside = moving_masks.AdamBesideDecay(moving, 1e-3, lambda step: 0.0)
    for _ in range(3):
        for model, optimizer in ((fixed, adam), (moving, beside)):
            model(tiny.tokens(), labels=tiny.tokens()).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        keeper.reapply()
    dense = moving.get_parameter("model.layers.0.mlp.up_proj.parametrizations.weight.original")
    assert (dense != 0).float().mean() > 0.9  # masked weights have learned, too
    for name, weight in trainables.merged(moving).named_parameters():
        torch.testing.assert_close(weight, fixed.get_parameter(name), rtol=1e-5, atol=1e-6)


def test_a_step_is_the_papers() -> None:
    linear = torch.nn.Linear(8, 3, bias=False)
    form = moving_masks.MovingMask(linear.weight, TWO, False)
    parametrize.register_parametrization(linear, "weight", form)
    optimizer = moving_masks.AdamBesideDecay(linear, 0.01, lambda step: 0.5 * step)
    dense = linear.get_parameter("parametrizations.weight.original")
    weight, mask = dense.detach().double().clone(), form.mask
    m = v = torch.zeros_like(weight)
    for t in (1, 2, 3):
        dense.grad = torch.randn(3, 8)
        g = dense.grad.double()
        m = 0.9 * m + 0.1 * g
        u = m + 0.5 * (t - 1) * weight * ~mask
        v = 0.95 * v + 0.05 * u**2
        weight = weight - 0.01 / (1 - 0.9**t) * u / ((v / (1 - 0.95**t)).sqrt() + 1e-8)
        optimizer.step()
    torch.testing.assert_close(dense.detach().double(), weight, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", ["gpt2", "mixtral"])
def test_what_is_merged_computes_the_same_in_the_pattern(family: str) -> None:
    model, ids = moving_masks.train_with_moving_masks(tiny.model(family), TWO), tiny.tokens()
    with torch.no_grad():
        before = model(ids).logits
        merged = trainables.merged(model)
        assert torch.equal(merged(ids).logits, before)
    assert not moving_masks.broken(merged, TWO) and "parametriz" not in " ".join(merged.state_dict())
    *_, last = moving_masks._names(merged)
    weight_of(merged, last)[0, :3] = 1.0
    assert moving_masks.broken(merged, TWO) == last


def test_norms_are_of_what_enters_a_weight() -> None:
    model, ids = tiny.model("llama"), tiny.tokens()
    norms = moving_masks.input_norms(model, ids)
    seen: list[torch.Tensor] = []
    name = "model.layers.1.mlp.down_proj"
    model.get_submodule(name).register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    model(ids)
    torch.testing.assert_close(norms[name], seen[0].flatten(0, 1).norm(dim=0), rtol=1e-4, atol=1e-6)
    form = moving_masks.train_with_moving_masks(model, TWO, norms).get_submodule(f"{name}.parametrizations.weight.0")
    scores = norms[name] * model.get_parameter(f"{name}.parametrizations.weight.original").abs()
    assert torch.equal(form.get_buffer("mask"), sr_ste.largest(scores, TWO))


def test_the_text_has_a_third_of_both(bench: dict[str, Any]) -> None:
    """At the first step of a student that is its own teacher only the text's share is left."""
    first = {
        objective: recover(bench["teacher"], **bench, tokens=LENGTH, objective=objective).healing["losses"][0]
        for objective in ("ce", "both")
    }
    assert first["both"] == pytest.approx(0.33 * first["ce"], rel=1e-3)


REFUSED = [
    ({"masks": "ast"}, "how many zeros"),
    ({"pattern": "2:4"}, "--pattern is of masks that move"),
    ({"mask_decay": 0.1}, "--mask-decay is of masks that move"),
    ({"mask_score": "wanda"}, "--mask-score is of masks that move"),
    ({"masks": "ast", "pattern": "block16"}, "'block16' is not N:M"),
    ({"masks": "ast", "pattern": "4:2"}, "pattern 4:2"),
    ({"masks": "ast", "pattern": "half"}, "is not N:M"),
    ({"masks": "ats", "pattern": "2:4"}, "did you mean 'ast'"),
    ({"masks": "ast", "pattern": "2:4", "trainable": "spp"}, "use --trainable decoder or all"),
    ({"masks": "ast", "pattern": "2:4", "keep_zeros": True}, "--keep-zeros says what becomes of zeros"),
    ({"masks": "ast", "pattern": "2:4", "keep_zeros": False}, "--no-keep-zeros says what becomes of zeros"),
    ({"masks": "ast", "pattern": "2:4", "bits": "4"}, "give one of them"),
    ({"objective": "both", "teacher": ""}, "--objective both learns from the unpruned model"),
]


@pytest.mark.parametrize(("settings", "said"), REFUSED)
def test_what_cannot_go_together_is_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(BillhookError, match=said):
        recovery(**{"teacher": "demo", "tokens": 100, **settings})


def test_what_would_not_work_is_refused(bench: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BillhookError, match=r"q_proj has 32 inputs, which groups of 5 \(3:5\) do not divide"):
        trained(bench, 34, pattern="3:5")
    with pytest.raises(BillhookError, match="masks move every 10 steps, and there are 9"):
        trained(bench, 9)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(BillhookError, match="launch without --use_fsdp"):
        trained(bench, 34)
