"""Training with few bits: what was trained is what is packed, from the first step to both containers."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from billhook import data
from billhook.checkpoints import load
from billhook.checkpoints.result import Result
from billhook.checkpoints.save import save
from billhook.errors import BillhookError
from billhook.math import grids
from billhook.math.grids import GRIDS
from billhook.planning.few_bits import Wanted
from billhook.pruning.quantize import FILE, quantize
from billhook.recovery.recover import recover
from billhook.recovery.settings import recovery
from billhook.reports.card import model_card
from billhook.runtime.run import Run
from billhook.training import on_levels, schedule, trainer

PACKS = find_spec("compressed_tensors") is not None
LENGTH = 16
IDS = torch.arange(40)[None]


@pytest.fixture
def bench(tmp_path: Path) -> dict[str, Any]:
    words = tiny.text(1200)
    (tmp_path / "train.txt").write_text(words[:3000])
    (tmp_path / "held.txt").write_text(words[3000:4000])
    (tmp_path / "model").mkdir()
    save(tiny.model("llama"), tiny.tokenizer(), tmp_path / "model", None)
    texts = {"text": (str(tmp_path / "train.txt"),), "held_out": (str(tmp_path / "held.txt"),)}
    few = {"seq_len": LENGTH, "tokens": 6 * LENGTH, "lr": 1e-3, "device": "cpu", "precision": "float32"}
    return {"teacher": str(tmp_path / "model"), **texts, **few}


def trained(bench: dict[str, Any], student: Path | str = "", **more: Any) -> Result:
    return recover(student or bench["teacher"], **{**bench, "bits": "4", **more})


def divided(model: Any) -> dict[str, torch.Tensor]:
    """The linear weights of the layers whose rows are whole blocks."""
    return {name: linear.weight for name, linear in linears(model) if grids.divides(linear.weight.shape[1])}


def linears(model: Any) -> list[tuple[str, torch.nn.Linear]]:
    return [(name, one) for name, one in model.model.layers.named_modules() if isinstance(one, torch.nn.Linear)]


@pytest.mark.skipif(not PACKS, reason="the extra quantize is not installed")
@pytest.mark.parametrize(("bits", "scales"), [("4", "block"), ("2", "module")])
def test_what_was_trained_is_what_is_packed(bench: dict[str, Any], bits: str, scales: str, tmp_path: Path) -> None:
    found = trained(bench, bits=bits, scales=scales, contrast=0.1)
    dense = load.load(bench["teacher"])
    assert not any(torch.equal(W, divided(dense)[name]) for name, W in divided(found.model).items())
    assert found.model.dtype == torch.float32 and not hasattr(found.model, on_levels.PROJECTION)
    found.save(tmp_path / "out")
    format = "both" if bits == "4" else "compressed-tensors"
    packed = quantize(str(tmp_path / "out"), Wanted(bits=bits, format=format), Run())
    assert packed.wanted.method == "kept" and packed.record["quantized"]["operators"][0]["error"] is None
    for name, W in divided(found.model).items():
        assert torch.equal(W, packed.codes[f"model.layers.{name}"].values())
    if scales == "module":
        assert all(len(W.abs().unique()) <= 2 for W in divided(found.model).values())
    (tmp_path / "few").mkdir()
    packed.write(tmp_path / "few")
    for where in (tmp_path / "few", tmp_path / "few" / FILE)[: 2 if format == "both" else 1]:
        again = load.open_model(str(where), device="cpu", dtype="float32", packed=True).model
        assert all(torch.equal(W, divided(again)[name]) for name, W in divided(found.model).items())


def test_training_brings_the_levels_nearer_to_the_teacher(bench: dict[str, Any]) -> None:
    rounded = quantize(bench["teacher"], Wanted(bits="4", method="rtn"), Run()).model
    found = trained(bench, tokens=40 * LENGTH, lr=2e-4, guard=False).model
    dense, (text,) = load.load(bench["teacher"]), data.evaluation_texts(bench["held_out"])
    ids = data.windows(text, tiny.tokenizer(), LENGTH).tokens
    with torch.no_grad():
        wanted = dense(ids).logits.log_softmax(-1)
        apart = [float((wanted.exp() * (wanted - one(ids).logits.log_softmax(-1))).sum()) for one in (found, rounded)]
    assert apart[0] < 0.7 * apart[1]


@pytest.mark.skipif(not PACKS, reason="the extra quantize is not installed")
def test_a_quantised_student_starts_from_its_own_codes(bench: dict[str, Any], tmp_path: Path) -> None:
    packed = quantize(bench["teacher"], Wanted(bits="4", method="rtn", format="compressed-tensors"), Run())
    (tmp_path / "few").mkdir()
    packed.write(tmp_path / "few")
    model = load.open_model(str(tmp_path / "few"), device="cpu", dtype="float32", packed=True).model
    with torch.no_grad():
        before = model(IDS).logits
        on_levels.train_on_levels(model, GRIDS["Q4_0"], False)
        assert torch.equal(model(IDS).logits, before)
    found = trained(bench, tmp_path / "few")
    assert all(grids.exact(W, GRIDS["Q4_0"]) for W in divided(found.model).values())
    assert "quantized" not in found.record
    with pytest.raises(BillhookError, match="is quantised"):
        recover(tmp_path / "few", **bench)


def test_zeros_stay_on_the_levels(bench: dict[str, Any], tmp_path: Path) -> None:
    model = tiny.model("llama")
    for _, linear in linears(model):
        linear.weight.data[:, ::2] = 0.0
    (tmp_path / "sparse").mkdir()
    save(model, tiny.tokenizer(), tmp_path / "sparse", None)
    found = trained(bench, tmp_path / "sparse", keep_zeros=True)
    assert all(bool((linear.weight[:, ::2] == 0).all()) for _, linear in linears(found.model))


def test_a_run_that_was_cut_off_ends_in_the_same_bits(
    bench: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = {"contrast": 0.1, "tokens": 8 * LENGTH, "guard": False}
    whole = trained(bench, **more)
    done = trainer.Watch.on_step_end

    def cut_off(watch: Any, args: Any, state: Any, control: Any, **rest: Any) -> None:
        done(watch, args, state, control, **rest)
        if state.global_step == 6:
            raise KeyboardInterrupt

    monkeypatch.setattr(trainer.Watch, "on_step_end", cut_off)
    with pytest.raises(KeyboardInterrupt):
        trained(bench, work=tmp_path / "work", **more)
    assert schedule.checkpoints(tmp_path / "work")
    monkeypatch.undo()
    again = trained(bench, work=tmp_path / "work", **more)
    ours, theirs = whole.model.state_dict(), again.model.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_the_card_says_how_it_was_trained(bench: dict[str, Any], tmp_path: Path) -> None:
    found = trained(bench, contrast=0.5)
    card = model_card({**found.record, "license": None})
    assert "weights on the levels of 4 bits, a scale for each block" in card
    assert "--bits 4 --scales block --contrast 0.5" in card


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"bits": "3"}, "bits"),
        ({"bits": "4", "trainable": "lora"}, "use --trainable decoder or all"),
        ({"scales": "module"}, "give --bits too"),
        ({"contrast": 0.1}, "give --bits too"),
        ({"bits": "4", "contrast": 0.1, "objective": "ce"}, "--objective distill"),
    ],
)
def test_what_cannot_go_together_is_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(BillhookError, match=said):
        recovery(teacher="demo", tokens=100, **settings)


@pytest.mark.parametrize(("name", "said"), [("mixtral", "mixture of experts"), ("gpt2", "Conv1D")])
def test_what_would_not_be_packed_is_refused(name: str, said: str) -> None:
    with pytest.raises(BillhookError, match=said):
        on_levels.check(tiny.model(name))
