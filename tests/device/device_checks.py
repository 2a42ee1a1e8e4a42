"""What `test_device` asks of a pretended accelerator that has float64, each in a process of its own."""

import functools
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pretended
import pytest
import tiny
import torch
from accelerate.state import AcceleratorState

import billhook
from billhook.calibration import layer_importance, passage
from billhook.data import Text
from billhook.data import windows as windows_of
from billhook.evaluation import look as looking
from billhook.evaluation import side_by_side
from billhook.evaluation.perplexity import perplexities
from billhook.math.layerwise import Settings, Target
from billhook.math.pattern import Pattern
from billhook.math.solvers import SOLVERS
from billhook.runtime.run import Run
from billhook.search import evaluator
from billhook.training import refinement
from billhook.training.early_stopping import EarlyStopping
from billhook.training.schedule import Schedule
from billhook.training.teacher import Lesson, fill_cache
from billhook.training.trainer import RecoveryTrainer

SMALL: dict[str, Any] = dict(method="fasp", seq_len=16, samples=4, multiple_of=2, ratio=0.2, look=False, quiet=True)
ROUNDS = 8  # of FISTAPruner
FORWARD = "calibration/forward.py enter"
CPU = torch.device("cpu")


def pruned(case: tuple[str, dict[str, Any]], text: Path, device: torch.device) -> dict[str, torch.Tensor]:
    """The weights of a pruned model; attention is the same arithmetic on both devices."""
    family, how = case
    model = tiny.model(family, **(dict(num_hidden_layers=5) if how.get("method") == "layerchop" else {}))
    model.set_attn_implementation("eager")
    how = {**SMALL, **how, "tokenizer": tiny.tokenizer(), "calibration": str(text), "device": str(device)}
    return billhook.prune(model.to(device), **how).model.state_dict()


def every_method_prunes_as_on_the_cpu(case: tuple[str, dict[str, Any]], text: Path) -> None:
    known = pruned(case, text, CPU)
    with pretended.device(float64=True):
        found = {key: one.cpu() for key, one in pruned(case, text, pretended.DEVICE).items()}
    assert found.keys() == known.keys()
    for key, one in known.items():
        torch.testing.assert_close(found[key], one)


def waits(case: tuple[str, dict[str, Any]], text: Path, windows: int) -> Counter[str]:
    with pretended.device(float64=True) as counted:
        pruned((case[0], {**case[1], "samples": windows}), text, pretended.DEVICE)
        return Counter(counted)


def waits_do_not_grow_with_the_text(case: tuple[str, dict[str, Any]], text: Path) -> None:
    """Twice as many batches: every function waits as often, but for the whole model's forward, where transformers
    looks at its masks."""
    passage.BATCH_TOKENS = 16
    few, many = (waits(case, text, windows) for windows in (10, 20))
    more = {place: (few[place], count) for place, count in many.items() if count > few[place]}
    assert few and more.keys() <= {FORWARD}, more


def perplexity_is_as_on_the_cpu_whatever_the_windows() -> None:
    text = Text("here", tiny.text(900))
    found, counts = [], []
    for device in (CPU, pretended.DEVICE):
        for windows in (4, 8):
            model = tiny.model("llama")
            model.set_attn_implementation("eager")
            with pretended.device(float64=True) as counted:
                two = [model.to(device), tiny.model("llama", seed=1).to(device)]
                given = windows_of(text, tiny.tokenizer(), 16, windows)
                found.append(perplexities(two, given, reference=True)[1])
                counts.append({line: n for line, n in counted.items() if line.startswith("evaluation/")})
    assert [one.perplexity for one in found[:2]] == pytest.approx([one.perplexity for one in found[2:]], rel=1e-5)
    assert counts[:2] == [{}, {}] and counts[2] == counts[3]


def a_trial_waits_as_often_for_more_windows() -> None:
    model, tokens = tiny.model("llama"), tiny.tokens(8, 16)
    with pretended.device(float64=True) as counted:
        model = model.to(pretended.DEVICE)
        seen = []
        for windows in (4, 8):
            counted.clear()
            evaluator.masked_losses(model, {}, tokens[:windows], None, None, None)
            seen.append(sum(n for line, n in counted.items() if line.startswith("search/")))
    assert seen == [2, 2]  # transformers waits, too, once in a forward


def layers_are_judged_without_waiting() -> None:
    with pretended.device(float64=True) as counted:
        model = tiny.model("llama", num_hidden_layers=5).to(pretended.DEVICE)
        for windows in (2, 4):
            for judge in (layer_importance.losses_without_each, layer_importance.block_influence):
                counted.clear()
                judge(model, tiny.tokens(windows, 16))
                assert {line: n for line, n in counted.items() if "layer_importance" in line} == {
                    "calibration/layer_importance.py _sums": 1
                }


def a_solver_waits_for_no_column() -> None:
    seen: dict[str, list[int]] = {}
    for columns in (16, 64):
        for name, solve in SOLVERS.items():
            X, W = (torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)) for rows in (100, 8))
            with pretended.device(float64=True) as counted:
                gram = (X.T @ X).double().to(pretended.DEVICE)
                solve(W.to(pretended.DEVICE), Target(gram), Pattern(zeros=2, group=4), Settings(rounds=ROUNDS))
                seen.setdefault(name, []).append(sum(counted.values()))
    fista = seen.pop("fistapruner")
    assert all(few == many <= 8 for few, many in seen.values()), seen
    assert max(fista) <= 10 + 2 * ROUNDS, fista  # as many rounds as help: each is judged before and after rounding


def refined(device: torch.device, windows: int) -> tuple[list[refinement.Refined], dict[str, torch.Tensor]]:
    """Two layers moved by gradient towards what they put out before they were spoilt."""
    model = tiny.model("llama").to(device)
    how = refinement.Refining(passes=1, rate=1e-3, length=2, rows=2, precision="float32")
    given = tiny.tokens(windows, 16)
    aimed = refinement.aims(model, given, [refinement.Span(0, 1, 2)], how, Run())
    model.model.layers[1].mlp.down_proj.weight.data.mul_(0.5)
    return refinement.refine(model, given, aimed, how, Run()), model.cpu().state_dict()


def refinement_is_as_on_the_cpu_whatever_the_windows() -> None:
    (one,), weights = refined(CPU, 8)
    counts = []
    for windows in (8, 16):
        with pretended.device(float64=True) as counted:
            (other,), moved = refined(pretended.DEVICE, windows)
            counts.append({line: n for line, n in counted.items() if line.startswith("training/")})
        if windows == 8:
            assert (other.before, other.after) == pytest.approx((one.before, one.after), rel=1e-4)
            for key, weight in weights.items():
                torch.testing.assert_close(moved[key], weight, rtol=1e-3, atol=1e-5)
    assert one.kept and counts[0] == counts[1] == {"training/refinement.py held_out": 2}


def a_look_is_as_on_the_cpu() -> None:
    found = []
    looking.NEW_TOKENS = 8
    for device in (CPU, pretended.DEVICE):
        model = tiny.model("llama", max_position_embeddings=64)
        model.set_attn_implementation("eager")
        with pretended.device(float64=True):
            found.append(looking.look(model.to(device), tiny.tokenizer()))
    one, other = found
    assert one.losses == pytest.approx(other.losses, rel=1e-5) and one.tasks == other.tasks
    assert one.repetition["greedy"] == other.repetition["greedy"]
    torch.testing.assert_close(one.log_probabilities, other.log_probabilities, rtol=1e-4, atol=1e-4)


def models_are_measured_side_by_side_as_on_the_cpu() -> None:
    side_by_side.speeds = functools.partial(side_by_side.speeds, new_tokens=2)
    text = Text("here", tiny.text(200))
    measures = side_by_side.Measures((text,), 16, 4, contexts=(8,), new_tokens=4, repeats=1)
    found = []
    for device in (CPU, pretended.DEVICE):
        models = [tiny.model("llama", seed=seed) for seed in (0, 1)]
        for model in models:
            model.set_attn_implementation("eager")
        with pretended.device(float64=True):
            subjects = [side_by_side.Subject("one", model.to(device), tiny.tokenizer()) for model in models]
            found.append(side_by_side.side_by_side(subjects, measures, reference=True))
    for one, other in zip(*found, strict=True):
        assert one["continuations"] == other["continuations"] and one["sizes"] == other["sizes"]
        (a,), (b,) = one["perplexities"], other["perplexities"]
        assert a["perplexity"] == pytest.approx(b["perplexity"], rel=1e-5)
        assert bool(a["against"]) == bool(b["against"])


def trained(device: torch.device, work: Path, float64: bool) -> tuple[dict[str, torch.Tensor], list[float]]:
    """Three steps of distillation, with hidden states, judged before."""
    teacher, student = tiny.model("llama"), tiny.model("llama", seed=1).requires_grad_(True)
    for model in (teacher, student):
        model.set_attn_implementation("eager")
    windows = tiny.tokens(6, 16)
    held = windows_of(Text("held", tiny.text(200)), tiny.tokenizer(), 16, 2)
    schedule = Schedule(windows, range(6), 2, 1e-3, 2, states=True, cpu=device == CPU)  # no checkpoint is written
    with pretended.device(float64=float64):
        lessons = fill_cache(teacher.to(device), windows, work / "lessons", Lesson(8, states=True))
        trainer = RecoveryTrainer(student.to(device), schedule, lessons, EarlyStopping((held,)), work / "work")
        trainer.train_or_resume(lambda line: None)
        assert {param.device for param in student.parameters()} == {device}
        return {key: one.cpu() for key, one in student.state_dict().items()}, trainer.losses


def recovery_is_as_on_the_cpu(work: Path, float64: bool) -> None:
    weights, losses = trained(CPU, work / "cpu", float64)
    AcceleratorState._reset_state(reset_partial_state=True)
    os.environ["ACCELERATE_TORCH_DEVICE"] = str(pretended.DEVICE)
    moved, others = trained(pretended.DEVICE, work / "device", float64)
    assert len(losses) == 3 and others == pytest.approx(losses, rel=1e-4)
    for key, weight in weights.items():
        torch.testing.assert_close(moved[key], weight, rtol=1e-3, atol=1e-4)


def waits_are_counted() -> None:
    with pretended.device(float64=True) as counted:
        x = torch.arange(4.0).to(pretended.DEVICE)
        x.double() @ x.double() + 1
        assert not counted
        for ask in (
            lambda: x.sum().item(),
            lambda: x.tolist(),
            lambda: x.cpu(),
            lambda: bool((x > 5).any()),
            lambda: x.nonzero(),
            lambda: x[x > 1],
            lambda: float(x[0]),
        ):
            before = sum(counted.values())
            ask()
            assert sum(counted.values()) == before + 1
