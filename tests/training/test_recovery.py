"""What is trained, on what, and from what: the losses, the teacher's answers, the trained parameters, and the command's
laws."""

import json
import math
import random
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
import transformers as T
from safetensors.torch import load_file

from billhook import data
from billhook.checkpoints import load
from billhook.checkpoints.result import Result
from billhook.errors import BillhookError
from billhook.math import losses
from billhook.models import rotary, surgery
from billhook.models.axes import axes
from billhook.models.experts import unfuse
from billhook.models.families import layers, row_of
from billhook.pruning import prune
from billhook.recovery import budget, setup
from billhook.recovery import recover as recover_module
from billhook.recovery.settings import OBJECTIVES, recovery
from billhook.runtime.precision import autocast_dtype
from billhook.training import teacher, text_windows, throughput, trainables, trainer
from billhook.training.early_stopping import EarlyStopping
from billhook.training.schedule import Schedule
from billhook.training.trainables import Seam

LENGTH = 16
SETTINGS: dict[str, Any] = {"seq_len": LENGTH, "device": "cpu", "precision": "float32", "lr": 1e-3}


def recover(model: Path, work: Path, **settings: Any) -> Result:
    return recover_module.recover(model, work=work, **{**SETTINGS, **settings})


@pytest.fixture
def texts(tmp_path: Path) -> tuple[Path, Path]:
    """One to train on and one to judge by."""
    words = tiny.text(1200)
    train, held = tmp_path / "train.txt", tmp_path / "held.txt"
    train.write_text(words[:3000])
    held.write_text(words[3000:4000])
    return train, held


def given(texts: tuple[Path, Path], folder: Path, **more: Any) -> dict[str, Any]:
    return {
        "text": (str(texts[0]),),
        "held_out": (str(texts[1]),),
        "teacher": str(folder),
        "tokens": 6 * LENGTH,
        **more,
    }


def some_logits(seed: int = 0, size: int = 50) -> torch.Tensor:
    return 3 * torch.randn(2, 7, size, generator=torch.Generator().manual_seed(seed))


# ---- losses


def test_the_divergence_is_the_whole_one_where_all_tokens_are_kept() -> None:
    ours, theirs = some_logits(0).requires_grad_(True), some_logits(1)
    found = losses.divergence(ours, *losses.most_likely(theirs, 50)).mean()
    expected = torch.nn.functional.kl_div(
        ours.log_softmax(-1).flatten(0, 1), theirs.log_softmax(-1).flatten(0, 1), log_target=True, reduction="batchmean"
    )
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    (own,) = torch.autograd.grad(found, ours, retain_graph=True)
    (true,) = torch.autograd.grad(expected, ours)
    torch.testing.assert_close(own, true, atol=1e-6, rtol=1e-4)


def test_a_tail_counts_as_one_token_and_only_lowers_the_divergence() -> None:
    ours, theirs = some_logits(0), some_logits(1)
    by_k = [losses.divergence(ours, *losses.most_likely(theirs, k)).mean().item() for k in (1, 5, 20, 50)]
    assert all(a < b for a, b in pairwise(by_k))
    ids, chances, tail = losses.most_likely(theirs, 5)
    p = torch.cat([chances.exp(), tail.unsqueeze(-1)], -1)
    q = ours.softmax(-1).gather(-1, ids)
    q = torch.cat([q, 1 - q.sum(-1, keepdim=True)], -1)
    assert by_k[1] == pytest.approx((p * (p / q).log()).sum(-1).mean().item(), rel=1e-4)


def test_a_student_that_says_the_same_loses_nothing_even_after_half_precision() -> None:
    logits = some_logits()
    ids, chances, tail = losses.most_likely(logits, 20)
    assert abs(losses.divergence(logits, ids, chances, tail).mean().item()) < 1e-6
    assert abs(losses.divergence(logits, ids, chances.half(), tail).mean().item()) < 1e-4


def test_the_divergence_survives_certainty() -> None:
    sure = torch.full((1, 1, 9), -200.0)
    sure[0, 0, 3] = 200.0
    wrong = sure.roll(1, -1).requires_grad_(True)
    found = losses.divergence(wrong, *losses.most_likely(sure, 4)).mean()
    (slope,) = torch.autograd.grad(found, wrong)
    assert found.item() == pytest.approx(400, rel=1e-3) and slope.isfinite().all()


def test_next_token_is_transformers_own_loss() -> None:
    model, tokens = tiny.model("llama"), tiny.tokens()
    out = model(tokens, labels=tokens)
    assert losses.next_token(out.logits, tokens).item() == pytest.approx(out.loss.item(), rel=1e-6)


def test_misalignment_sees_directions_alone() -> None:
    states = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))
    assert losses.misalignment(states, 5 * states).mean().item() == pytest.approx(0, abs=1e-6)
    assert losses.misalignment(states, -states).mean().item() == pytest.approx(2, abs=1e-6)


# ---- the teacher


@pytest.mark.parametrize("states", [False, True])
def test_lessons_are_what_the_teacher_says(tmp_path: Path, states: bool) -> None:
    model, windows = tiny.model("llama"), tiny.tokens(40, LENGTH)
    found = teacher.fill_cache(model, windows, tmp_path, teacher.Lesson(8, states))
    assert len(found.files) == 2
    with torch.no_grad():
        out = model(windows[37:38], output_hidden_states=True)
    ids, chances, tail = losses.most_likely(out.logits[:, :-1], 8)
    lesson = found.of(37)
    assert torch.equal(lesson["ids"], ids[0])
    torch.testing.assert_close(lesson["chances"].float(), chances[0], atol=1e-2, rtol=1e-3)
    torch.testing.assert_close(lesson["tail"], tail[0], atol=1e-6, rtol=0)
    assert ("hidden" in lesson) == states
    if states:  # what enters the last layer of three but one
        torch.testing.assert_close(lesson["hidden"].float(), out.hidden_states[1][0], atol=0.05, rtol=0.01)
        torch.testing.assert_close(lesson["embedded"].float(), out.hidden_states[0][0], atol=0.05, rtol=0.01)


def test_lessons_are_asked_for_once_and_shared_by_longer_runs(tmp_path: Path) -> None:
    model, windows, asked = tiny.model("llama"), tiny.tokens(70, LENGTH), []
    model.register_forward_hook(lambda *_: asked.append(1))
    first = teacher.fill_cache(model, windows[:32], tmp_path, teacher.Lesson(4))
    before = len(asked)
    longer = teacher.fill_cache(model, windows, tmp_path, teacher.Lesson(4))
    assert longer.files[0] == first.files[0] and 0 < before < len(asked) <= 3 * before
    count = len(asked)
    teacher.fill_cache(model, windows, tmp_path, teacher.Lesson(4))
    assert len(asked) == count
    teacher.fill_cache(model, windows, tmp_path, teacher.Lesson(5))
    assert len(asked) > count


def test_processes_share_the_asking(tmp_path: Path) -> None:
    model, windows = tiny.model("llama"), tiny.tokens(70, LENGTH)
    for n in range(2):
        found = teacher.fill_cache(model, windows, tmp_path, teacher.Lesson(4), share=(n, 2))
        assert [path.exists() for path in found.files] == [True, n == 1, True]


def test_a_damaged_lesson_is_named(tmp_path: Path) -> None:
    found = teacher.fill_cache(tiny.model("llama"), tiny.tokens(2, LENGTH), tmp_path, teacher.Lesson(4))
    found.files[0].write_bytes(found.files[0].read_bytes()[:-20])
    with pytest.raises(BillhookError, match=r"is damaged .* delete it"):
        found.of(0)


# ---- what trains


@pytest.mark.parametrize(
    ("kept", "total", "beside"),
    [
        ([0, 1, 4, 5], 6, [1, 2]),
        ([0, 2, 4, 5], 6, [0, 1, 2]),
        ([1, 2], 3, [0]),
        ([0, 1], 4, [1]),
        ([0, 1, 2], 3, []),
    ],
)
def test_the_layers_beside_a_cut(kept: list[int], total: int, beside: list[int]) -> None:
    assert Seam(kept, total).beside == beside


def named(model: Any) -> set[str]:
    return {name for name, param in model.named_parameters() if param.requires_grad}


def opened(family: str) -> T.PreTrainedModel:
    model = tiny.model(family)
    unfuse(model)
    return model


@pytest.mark.parametrize("family", tiny.CONFIGS)
@pytest.mark.covering(some={"family": 3})
def test_what_each_set_trains(family: str) -> None:
    cut = Seam([0, 2, 3], 4)
    everything = {name for name, _ in opened(family).named_parameters()}
    assert named(trainables.train_all(opened(family), cut, 4)) == everything
    end, seam = (make(opened(family), cut, 4) for make in (trainables.train_end, trainables.train_seam))
    at = row_of(opened(family)).layers
    inside = {name for name in everything if name.startswith(f"{at}.")}
    assert named(seam) == {name for name in inside if name.startswith((f"{at}.0.", f"{at}.1."))}
    decoder = trainables.train_decoder(opened(family), cut, 4)
    assert inside <= named(decoder) and not decoder.get_input_embeddings().weight.requires_grad
    assert not decoder.get_output_embeddings().weight.requires_grad
    assert inside <= named(end)  # three layers are all it has
    assert end.get_output_embeddings().weight.requires_grad
    adapters = named(trainables.train_adapters(opened(family), cut, 4))
    assert adapters and all(("lora_" in name or "parametrizations" in name) and f"{at}." in name for name in adapters)


def test_a_tied_head_learns_as_a_head_alone() -> None:
    model = trainables.train_end(tiny.model("llama"), None, 4)
    ids = tiny.tokens(1, LENGTH)
    losses.next_token(model(ids).logits, ids).backward()
    whole = model.get_input_embeddings().weight.grad.clone()
    free = tiny.model("llama")
    embedded = free.get_input_embeddings()(ids).detach()
    free.requires_grad_(True)
    losses.next_token(free(inputs_embeds=embedded).logits, ids).backward()
    torch.testing.assert_close(whole, free.get_output_embeddings().weight.grad)
    assert not trainables.merged(model).get_input_embeddings()._forward_hooks


def test_adapters_of_narrow_heads_add_nothing_at_first_and_learn() -> None:
    model = tiny.model("llama")
    for axis in axes(model, ("value",)):
        surgery.remove(model, axis, torch.tensor([0, 9]))
    rotary.narrow_keys(model, {1: ((0, 2), (1, 3))})
    before = model(tiny.tokens(2, LENGTH)).logits
    made = trainables.train_adapters(model, None, 4)
    assert torch.allclose(made(tiny.tokens(2, LENGTH)).logits, before, atol=1e-5)
    made(tiny.tokens(2, LENGTH)).logits.square().mean().backward()
    learning = {name for name, param in made.named_parameters() if param.grad is not None and param.grad.any()}
    assert {part for part in "qkvo" if any(f"layers.1.self_attn.{part}_proj" in name for name in learning)} == set(
        "qkvo"
    )


def test_merged_adapters_compute_the_same() -> None:
    model = trainables.train_adapters(tiny.model("llama"), None, 4)
    for name, param in model.named_parameters():
        if "lora_B" in name:
            param.data = torch.randn_like(param) * 0.1
    ids = tiny.tokens()
    with torch.no_grad():
        before = model(ids).logits
        plain = trainables.merged(model)
        torch.testing.assert_close(plain(ids).logits, before, atol=1e-3, rtol=1e-4)
    assert type(plain) is T.LlamaForCausalLM
    assert {type(m) for m in plain.modules() if "lora" in type(m).__module__} == set()


def test_a_seam_needs_a_cut() -> None:
    for cut in (None, Seam([0, 1, 2], 3)):
        with pytest.raises(BillhookError, match="--trainable seam trains the layers beside dropped ones"):
            trainables.train_seam(tiny.model("llama"), cut, 4)


# ---- the order of the windows, the points, the verdict


def test_every_pass_sees_every_window_once() -> None:
    order = text_windows.order_of(7, 20, 0)
    assert order[:7] == list(range(7)) and sorted(order[7:14]) == list(range(7)) != order[7:14] and len(order) == 20
    assert text_windows.order_of(7, 10, 0) == order[:10]


def test_what_a_prune_was_calibrated_on_is_not_held_out(texts: tuple[Path, Path]) -> None:
    drawn = data.windows(data.calibration_text(str(texts[0])), tiny.tokenizer(), LENGTH, 64, seed=3).tokens
    found = text_windows.read((str(texts[0]),), (str(texts[1]),), tiny.tokenizer(), text_windows.Draw(LENGTH, 3))
    held, other = found.held_out
    assert len(held.tokens) == len(other.tokens) == text_windows.HELD_OUT and found.guards == ("held",)
    calibrated, first = {tuple(row) for row in drawn.tolist()}, found.train[:64].tolist()
    assert not calibrated & {tuple(row) for row in held.tokens.tolist()} and tuple(first[0]) not in calibrated
    assert not {tuple(row) for row in found.train.tolist()} & {tuple(row) for row in held.tokens.tolist()}


@pytest.mark.parametrize("steps", [1, 2, 50, 1000])
def test_a_run_is_judged_at_its_end_and_not_too_often(steps: int) -> None:
    points = budget.evaluation_steps(steps * 2, steps, 24)
    assert points[-1] == steps and points == tuple(sorted(set(points))) and points[0] >= 1
    assert len(points) <= 10


@pytest.mark.parametrize("steps", [1, 2, 3, 20, 1000])
@pytest.mark.parametrize("warmup", [0.0, 0.05, 0.5, 0.99])
def test_every_step_has_a_rate_and_one_has_all_of_it(steps: int, warmup: float) -> None:
    schedule = Schedule(tiny.tokens(1, LENGTH), [0] * steps, 1, 1e-3, warmup=warmup)
    shares = [schedule.lr_factor(n) for n in range(steps)]
    peak = shares.index(1.0)
    assert peak == min(round(warmup * steps), steps - 1)
    assert all(a < b for a, b in pairwise(shares[: peak + 1])) and all(a > b for a, b in pairwise(shares[peak:]))
    assert all(0 < share <= 1 for share in shares)


def judged(*values: tuple[float, ...]) -> list[dict[str, Any]]:
    return [{"step": n, "losses": {"other": list(one)}} for n, one in enumerate(values)]


@pytest.mark.parametrize(
    ("values", "stops"),
    [
        ([(2.0, 3.0)], False),
        ([(2.0, 3.0), (1.9, 2.9)], False),
        ([(2.0, 3.0), (2.005, 3.005)], False),  # half a percent
        ([(2.0, 3.0), (2.1, 3.1)], True),
        ([(2.0, 3.0), (1.5, 2.5), (1.6, 2.6)], True),  # worse than its best
        ([(2.0, 3.0), (1.5, 3.6)], False),  # one better, one worse: within two standard errors
        ([(2.0, 3.0), (math.nan, 3.0)], True),
    ],
)
def test_the_guard(values: list[tuple[float, ...]], stops: bool) -> None:
    assert bool(EarlyStopping((), ("other",)).stopped_by(judged(*values))) == stops
    assert not EarlyStopping((), ()).stopped_by(judged(*values))


def test_the_best_is_kept() -> None:
    assert EarlyStopping((), ("other",)).best(judged((2.0,), (1.5,), (1.6,)))["step"] == 1
    assert EarlyStopping((), ("other",)).best(judged((2.0,), (math.nan,)))["step"] == 0


def test_precision_follows_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True, "avx2": True})
    assert autocast_dtype("auto", cpu) is torch.bfloat16 and autocast_dtype("float32", cpu) is None
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True})
    assert autocast_dtype("auto", cpu) is None and autocast_dtype("bfloat16", cpu) is torch.bfloat16


@pytest.mark.parametrize(("generation", "fast"), [(7, False), (8, True), (9, True)])
def test_emulated_bfloat16_is_not_fast(generation: int, fast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """By torch's own rule, of a GPU that is pretended: those of generation 7 multiply bfloat16, in software."""
    gpu, given = torch.device("cuda"), SimpleNamespace(major=generation)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: given)
    monkeypatch.setattr(torch.cuda, "_check_bf16_tensor_supported", lambda _: True)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert (autocast_dtype("auto", gpu) is torch.bfloat16) == fast and autocast_dtype("float32", gpu) is None


def test_pace_changes_no_weight() -> None:
    model = trainables.train_all(tiny.model("llama"), None, 4)
    before = {name: param.clone() for name, param in model.named_parameters()}
    assert throughput.training_pace(model, LENGTH, 1, None, 0.01) > 0
    assert all(torch.equal(before[name], param) for name, param in model.named_parameters())


@pytest.mark.parametrize(
    ("tokens", "batch", "processes", "rows"),
    [(50_000, None, 1, 1), (50_000, None, 2, 2), (400_000, None, 1, 4), (10**9, None, 1, 128), (50_000, 2048, 1, 4)],
)
def test_windows_in_a_step(tokens: int, batch: int | None, processes: int, rows: int) -> None:
    assert recovery(objective="ce", tokens=tokens, batch_tokens=batch).rows(tokens, processes) == rows


# ---- a whole run


def test_distillation_brings_a_student_towards_its_teacher(
    student: Path, folder: Path, texts: tuple[Path, Path], tmp_path: Path
) -> None:
    found = recover(student, tmp_path / "work", **given(texts, folder, tokens=1600, lr=3e-3))
    healing = found.healing
    first, last = healing["evaluations"][0], healing["evaluations"][-1]
    assert first["tokens"] == 0 and last["tokens"] == healing["tokens"] == healing["kept_tokens"] == 1600
    assert sum(healing["losses"][-20:]) < 0.8 * sum(healing["losses"][:20])
    assert len(healing["losses"]) == healing["steps"] == 100
    assert set(last["perplexities"]) == {"train, held out", "held"}
    out = tmp_path / "healed"
    out.mkdir()
    found.write(out)
    record = json.loads((out / "billhook.json").read_text())
    assert record["recovery"][0]["objective"] == "distill" and record["dropped_layers"] == [1]
    assert record["verified"]["logits"] == "equal"
    page = json.loads((out / "report.json").read_text())
    assert page["kind"] == "recover" and page["healing"]["tokens"] == 1600
    again = recover(out, tmp_path / "again", **given(texts, folder))
    assert len(again.record["recovery"]) == 2


def test_a_student_that_is_its_teacher_has_nothing_to_learn(
    folder: Path, texts: tuple[Path, Path], tmp_path: Path
) -> None:
    healing = recover(folder, tmp_path / "work", **given(texts, folder, top_k=258)).healing
    assert abs(healing["losses"][0]) < 1e-5  # Adam then walks, whatever the gradient's size


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("warmup", [0.0, 0.9])
@pytest.mark.covering
def test_a_run_of_one_step_trains_at_the_full_rate(
    objective: str, warmup: float, student: Path, folder: Path, texts: tuple[Path, Path], tmp_path: Path
) -> None:
    asked = given(texts, folder, objective=objective, tokens=2 * LENGTH, batch_tokens=2 * LENGTH, lr=1e-2, guard=False)
    found = recover(student, tmp_path / "work", **asked, warmup=warmup)
    before, after = load_file(student / "model.safetensors"), found.model.state_dict()
    moved = max((after[name] - value).abs().max().item() for name, value in before.items())
    assert found.healing["steps"] == 1 and moved == pytest.approx(1e-2, rel=1e-3)  # Adam's first step is its rate


@pytest.mark.parametrize(
    ("objective", "states", "counts"), [("distill", "off", (4, 1)), ("distill", "on", (4, 2)), ("ce", "off", (1, 2))]
)
def test_windows_in_a_forward_decide_nothing(
    objective: str,
    states: str,
    counts: tuple[int, int],
    student: Path,
    folder: Path,
    texts: tuple[Path, Path],
    tmp_path: Path,
) -> None:
    asked = given(texts, folder, objective=objective, states=states, tokens=3 * 4 * LENGTH, batch_tokens=4 * LENGTH)
    asked |= {"top_k": 258, "guard": False, "lr": 1e-2}
    first, second = (
        recover(student, tmp_path / str(n), **asked, lessons=tmp_path / "lessons", micro_batch=n) for n in counts
    )
    assert second.healing["losses"] == pytest.approx(first.healing["losses"], rel=1e-4)
    for one, same in zip(first.model.parameters(), second.model.parameters(), strict=True):
        torch.testing.assert_close(one, same, atol=1e-4, rtol=0)
    windows = text_windows.read(asked["text"], asked["held_out"], tiny.tokenizer(), text_windows.Draw(LENGTH)).train[:4]
    before, dense = load.load(student), load.load(folder)
    with torch.no_grad():  # what is printed is the loss by its name, whatever is aligned besides
        own = before(windows).logits
        theirs = losses.most_likely(dense(windows).logits[:, :-1], 258)
        true = losses.next_token(own, windows) if objective == "ce" else losses.divergence(own[:, :-1], *theirs).mean()
    assert first.healing["losses"][0] == pytest.approx(true.item(), rel=1e-3)


def test_what_is_aligned_pulls_as_hard_as_the_divergence_and_is_not_in_the_loss() -> None:
    x = torch.tensor([0.5, 2.0, 3.0], requires_grad=True)
    found = losses.beside(x**2, 7 * x)
    (slope,) = torch.autograd.grad(found, x)
    assert found.item() == pytest.approx((x**2).mean().item())
    torch.testing.assert_close(slope, (2 * x + x).detach() / 3)  # x^2 / 7x of 7, of each row


@pytest.mark.parametrize("trainable", trainables.TRAINERS)
@pytest.mark.covering(some={"trainable": 2})
def test_only_what_is_trained_changes(
    trainable: str, student: Path, folder: Path, texts: tuple[Path, Path], tmp_path: Path
) -> None:
    found = recover(student, tmp_path / "work", **given(texts, folder, trainable=trainable, rank=4, lr=1e-2))
    before, after = load_file(student / "model.safetensors"), found.model.state_dict()
    changed = {name for name, value in before.items() if not torch.equal(value, after[name])}
    inside = {name for name in before if ".layers." in name}
    expected = {
        "all": set(before),
        "decoder": {name for name in before if "embed_tokens" not in name and "lm_head" not in name},
        "lora": {name for name in inside if "proj" in name},
        "spp": {name for name in inside if "proj" in name},
        "head+last3": set(before),  # two layers are left
        "seam": inside,
    }[trainable]
    assert changed == expected
    assert not any(param.requires_grad for param in found.model.parameters())


def test_continued_pretraining_needs_no_teacher(student: Path, texts: tuple[Path, Path], tmp_path: Path) -> None:
    found = recover(
        student, tmp_path / "work", **given(texts, student, objective="ce", teacher="", tokens=640, lr=1e-2)
    )
    curve = [one["perplexities"]["held"] for one in found.healing["evaluations"]]
    assert curve[-1] < 0.8 * curve[0] and found.healing["teacher_perplexities"] is None


def test_hidden_states_are_aligned_where_depth_was_halved(
    folder: Path, texts: tuple[Path, Path], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    deep = tmp_path / "deep"
    T.AutoModelForCausalLM.from_config(tiny.CONFIGS["llama"](num_hidden_layers=6)).save_pretrained(deep)
    tiny.tokenizer().save_pretrained(deep)
    cut = prune.prune(str(deep), method="layerchop", drop="1-3")
    cut.save(tmp_path / "half")
    for states, expected in (("auto", True), ("off", False)):
        found = recover(tmp_path / "half", tmp_path / states, **given(texts, deep, states=states, tokens=LENGTH))
        assert found.healing["states"] is expected
    prune.prune(str(deep), method="layerchop", drop="2").save(tmp_path / "most")
    assert recover(tmp_path / "most", tmp_path / "w", **given(texts, deep, tokens=LENGTH)).healing["states"] is False


def test_the_guard_stops_a_run_and_keeps_the_best(student: Path, folder: Path, tmp_path: Path) -> None:
    letters, digits = tmp_path / "letters.txt", tmp_path / "digits.txt"
    letters.write_text("abcdefgh " * 400)
    draw = random.Random(0)
    digits.write_text("".join(draw.choice("0123456789") for _ in range(800)))
    ask = given((letters, digits), folder, objective="ce", tokens=640, lr=1e-2)
    found = recover(student, tmp_path / "work", **ask)
    healing = found.healing
    assert "digits got worse" in healing["stopped"] and healing["kept_tokens"] < 640
    assert len(healing["losses"]) < healing["steps"]
    if not healing["kept_tokens"]:  # right after the cut was best
        assert all(
            torch.equal(v, found.model.state_dict()[k]) for k, v in load_file(student / "model.safetensors").items()
        )
    unguarded = recover(student, tmp_path / "free", **{**ask, "guard": False}).healing
    assert unguarded["stopped"] is None and len(unguarded["losses"]) == unguarded["steps"]


def test_bfloat16_in_bfloat16_out(folder: Path, texts: tuple[Path, Path], tmp_path: Path) -> None:
    model = load.load(folder)
    surgery.cast(model, torch.bfloat16)
    half = tmp_path / "half"
    model.save_pretrained(half)
    tiny.tokenizer().save_pretrained(half)
    found = recover(half, tmp_path / "work", **given(texts, half, precision="bfloat16"))
    assert {param.dtype for param in found.model.parameters()} == {torch.bfloat16}
    out = tmp_path / "out"
    out.mkdir()
    found.write(out)


def test_layers_that_differ_recover(folder: Path, texts: tuple[Path, Path], tmp_path: Path) -> None:
    out, text = tmp_path / "uneven", str(texts[0])
    asked = {"ratio": 0.3, "layout": "per_layer", "axes": ("groups", "ffn"), "allocation": "skip:1,0", "multiple_of": 4}
    prune.prune(str(folder), method="fasp", calibration=text, samples=4, seq_len=LENGTH, **asked).save(out)
    found = recover(out, tmp_path / "work", **given(texts, folder))
    healed = tmp_path / "healed"
    healed.mkdir()
    found.write(healed)
    healed_layers = layers(load.load(healed))
    widths = {(layer.mlp.down_proj.in_features, layer.self_attn.o_proj.in_features) for layer in healed_layers}
    assert len(widths) == 2 == len({heads for _, heads in widths})


def test_a_rate_is_found_by_trial_and_checkpoints_of_one_are_not_anothers(
    student: Path, folder: Path, texts: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for seconds in (300.0, 0.0):  # a long trial writes some
        monkeypatch.setattr(trainer, "SAVE_SECONDS", seconds)
        healing = recover(student, tmp_path / f"work{seconds}", **given(texts, folder, lr="auto")).healing
        assert [one["lr"] for one in healing["rates"]] == list(budget.OTHER_RATES)
        assert healing["lr"] == min(healing["rates"], key=lambda one: one["loss"])["lr"]
        assert healing["steps"] == 6  # trials are beyond the budget
        found.append(healing["rates"])
    assert found[0] == found[1]


def test_rates_need_something_to_judge_them(student: Path, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text(tiny.text(20))
    asked = {
        "text": (str(tmp_path / "short.txt"),),
        "held_out": (),
        "guard": False,
        "teacher": str(folder),
        "lr": "auto",
    }
    with pytest.raises(BillhookError, match="judges rates by held-out text, and there is none"):
        recover(student, tmp_path / "work", tokens=64, **asked)


def test_minutes_buy_tokens(
    student: Path, texts: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(setup, "PACE_SECONDS", 0.05)
    pace = 400.0
    monkeypatch.setattr(throughput, "training_pace", lambda *_: pace)
    asked = {"objective": "ce", "teacher": "", "tokens": None, "minutes": 0.05, "held_out": (str(texts[1]),)}
    healing = recover(student, tmp_path / "work", text=(str(texts[0]),), **asked).healing
    least = (budget.EVALUATIONS[0] + 2) * budget.TEXTS * text_windows.HELD_OUT * LENGTH * budget.FORWARD / pace
    assert healing["tokens"] == pytest.approx(
        min((3 - 0.05) / (1 + budget.EVALUATING), 3 - 0.05 - least) * pace, rel=0.02
    )
