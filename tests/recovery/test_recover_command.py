"""`billhook recover` cut off, shared among processes, and given what it cannot use."""

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers as T
from processes import Child, by_hand
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models

from billhook import cli
from billhook.checkpoints.result import Result
from billhook.errors import BillhookError
from billhook.recovery import recover
from billhook.runtime import cache
from billhook.training import schedule, teacher, trainer

LENGTH = 16
STEPS = 6
LONG = {"tokens": 12 * 2 * LENGTH}


@pytest.fixture
def bench(folder: Path, student: Path, tmp_path: Path) -> Path:
    """A folder with a teacher, a student, and two texts."""
    words = tiny.text(1200)
    (tmp_path / "train.txt").write_text(words[:3000])
    (tmp_path / "held.txt").write_text(words[3000:])
    return tmp_path


def settings(bench: Path, **more: Any) -> dict[str, Any]:
    found = {
        "teacher": str(bench / "tiny-llama"),
        "tokens": STEPS * 2 * LENGTH,
        "batch_tokens": 2 * LENGTH,
        "text": (str(bench / "train.txt"),),
        "held_out": (str(bench / "held.txt"),),
        "seq_len": LENGTH,
        "lr": 1e-3,
        "device": "cpu",
        "precision": "float32",
    }
    return {**found, **more}


def flags(bench: Path, **more: Any) -> list[str]:
    said = [str(bench / "student"), "-o", str(bench / "out")]
    for name, value in settings(bench, **more).items():
        for one in value if isinstance(value, tuple) else (value,):
            said += [f"--{name.replace('_', '-')}", str(one)]
    return ["recover", *said]


def run(bench: Path, work: str = "work", lines: list[str] | None = None, **more: Any) -> Result:
    heard = lines if lines is not None else []
    return recover.recover(bench / "student", work=bench / work, announce=heard.append, **settings(bench, **more))


def same(a: Result, b: Result) -> bool:
    ours, theirs = a.model.state_dict(), b.model.state_dict()
    return all(torch.equal(ours[name], theirs[name]) for name in ours) and ours.keys() == theirs.keys()


# ---- cut off


def recovered(bench: Path, given: dict[str, Any]) -> None:
    trainer.SAVE_SECONDS = 0.02  # a checkpoint every few steps
    recover.recover(bench / "student", work=bench / "work", **given)


def killed(bench: Path, after: float, **more: Any) -> bool:
    """Run in another process, killed `after` seconds from its first checkpoint; whether it was in time."""
    process, until = Child(recovered, bench, settings(bench, **more), fresh=True), time.monotonic() + 120
    while process.runs and time.monotonic() < until:
        if any(schedule.step_of(one) for one in schedule.checkpoints(bench / "work")):
            time.sleep(after)
            break
        time.sleep(0.001)
    process.send(signal.SIGKILL)
    code, _, said = process.ended()
    assert code in (0, -signal.SIGKILL), said
    return code != 0


@pytest.mark.parametrize(
    ("trainable", "after"),
    [
        pytest.param("all", 0.0, id="at once"),
        pytest.param("all", 0.011, id="amid a save", marks=pytest.mark.whole),
        pytest.param("lora", 0.03, id="lora"),
    ],
)
def test_a_killed_run_ends_as_if_it_had_not_been(trainable: str, after: float, bench: Path) -> None:
    more = {"trainable": trainable, "rank": 4, "tokens": 20 * 2 * LENGTH}
    whole = run(bench, "whole", **more)
    assert killed(bench, after, **more), "it was done before it could be killed"
    assert not list((bench / "work").glob("*.partial"))
    lines: list[str] = []
    again = run(bench, lines=lines, **more)
    assert any("going on from" in line for line in lines)
    assert same(whole, again)
    assert whole.healing["losses"] == again.healing["losses"]
    assert whole.healing["evaluations"] == again.healing["evaluations"]


def test_a_run_that_had_only_to_write_trains_no_more(bench: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = run(bench)
    monkeypatch.setattr(trainer.RecoveryTrainer, "train", None)
    assert same(first, run(bench))


@pytest.mark.parametrize("damage", ["truncated", "missing", "unmarked"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(damage: str, bench: Path) -> None:
    whole, lines = run(bench), []
    *_, before, last = schedule.checkpoints(bench / "work")
    file = last / "optimizer.pt"
    if damage == "truncated":
        file.write_bytes(file.read_bytes()[:-100])
    elif damage == "missing":
        file.unlink()
    else:
        (last / schedule.WHOLE).unlink()
    again = run(bench, lines=lines)
    assert f"{last} is not whole: going on from step {schedule.step_of(before)}" in lines
    assert same(whole, again)


def test_another_run_is_not_gone_on_with(bench: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(bench)
    with pytest.raises(
        BillhookError, match=r"holds an unfinished run that differs in lr, seed, training text: .*--fresh"
    ):
        run(bench, lr=2e-3, seed=1)
    text = (bench / "train.txt").read_text()
    (bench / "train.txt").write_text(tiny.text(1300)[500:])
    with pytest.raises(BillhookError, match="differs in training text"):
        run(bench)
    (bench / "train.txt").write_text(text)
    config = bench / "tiny-llama" / "config.json"
    config.write_text(config.read_text().replace("10000.0", "500.0"))
    with pytest.raises(BillhookError, match="differs in teacher's files:"):
        run(bench)
    monkeypatch.setattr(cache, "code_sha256", lambda: "of another version")
    with pytest.raises(BillhookError, match="differs in teacher's files, version of billhook:"):
        run(bench)


def test_fresh_starts_over_and_keeps_what_the_teacher_said(bench: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(bench)
    (bench / "work" / "mine.txt").touch()
    asked: list[object] = []
    monkeypatch.setattr(teacher, "_predictions", lambda *_: asked.append(1))
    assert run(bench, fresh=True, lr=2e-3).healing["lr"] == 2e-3 and not asked
    assert not (bench / "work" / "mine.txt").exists()


def test_fresh_empties_no_folder_that_is_not_a_runs(
    bench: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (bench / "out.unfinished").mkdir()
    (bench / "out.unfinished" / "precious").write_text("")
    assert "is not a run's folder" in command(bench, capsys, monkeypatch, [*flags(bench), "--fresh"])


def test_fresh_loses_nothing_to_bad_input(
    bench: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run(bench, "out.unfinished")
    line = [*flags(bench, text=("nowhere.txt",)), "--fresh"]
    assert "does not exist" in command(bench, capsys, monkeypatch, line)


def test_the_rate_trials_are_kept(bench: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = run(bench, lr="auto", tokens=160)
    monkeypatch.setattr(recover, "_loss_after", None)
    for one in schedule.checkpoints(bench / "work"):
        shutil.rmtree(one)
    assert same(first, run(bench, lr="auto", tokens=160))


# ---- shared


def by_accelerate(line: list[str]) -> str:
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    done = subprocess.run([*launch, "-m", "billhook", *line], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


MASKS = {"masks": "ast", "pattern": "2:4", "mask_score": "wanda", **LONG}


@pytest.mark.parametrize(
    ("launch", "more"),
    [
        (by_hand, {}),
        pytest.param(by_accelerate, {}, marks=pytest.mark.slow),
        pytest.param(by_hand, MASKS, marks=pytest.mark.whole),
    ],
)
def test_two_processes_train_as_one(launch: Callable[[list[str]], str], more: dict[str, Any], bench: Path) -> None:
    one = run(bench, **more).healing
    two = json.loads(launch([*flags(bench, **more), "--json"]))["recovery"][0]
    assert two["processes"] == 2 and two["losses"] == pytest.approx(one["losses"], rel=1e-4, abs=1e-6)
    assert (bench / "out" / "model.safetensors").exists() and not (bench / "out.unfinished").exists()


@pytest.mark.whole
@pytest.mark.parametrize(
    "more",
    [{"mixture": "dro", "text": ("train.txt", "held.txt"), "held_out": ("other.txt",)}, {"keep_data": "0.5"}],
    ids=lambda more: next(iter(more)),
)
def test_two_processes_choose_windows_as_one(more: dict[str, Any], bench: Path) -> None:
    (bench / "train.txt").write_text(tiny.text(1200)[:480])
    (bench / "other.txt").write_text(tiny.text(1200)[-500:])
    given = {key: tuple(str(bench / name) for name in value) for key, value in more.items() if isinstance(value, tuple)}
    more = {**more, **given, "tokens": 2 * 2 * 30 * LENGTH}
    one = run(bench, **more)
    two = json.loads(by_hand([*flags(bench, **more), "--json"]))["recovery"][0]
    assert two["losses"] == pytest.approx(one.healing["losses"], rel=1e-3, abs=1e-6)
    for name, content in one.beside.items():
        assert (bench / "out" / name).read_text() == content


def test_windows_that_processes_cannot_share(bench: Path) -> None:
    with pytest.raises(BillhookError, match="3 windows a step cannot be shared by 1 processes, 2 at a time"):
        run(bench, batch_tokens=3 * LENGTH, micro_batch=2)


# ---- bad input


def command(bench: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, line: list[str]) -> str:
    """The one line that a refused command says; it must leave everything as it was."""
    before = sorted(bench.rglob("*"))
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["billhook", *line])
    with pytest.raises(SystemExit) as left:
        cli.main()
    said = capsys.readouterr()
    assert left.value.code == 2 and not said.out
    (*_, last) = said.err.strip().splitlines()
    assert last.startswith("billhook: error: ")
    assert sorted(bench.rglob("*")) == before
    return last


def another_tokenizer(path: Path) -> None:
    vocab = {letter: n for n, letter in enumerate("abcdefgh")} | {"<unk>": 8}
    T.PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE(vocab, [], unk_token="<unk>"))).save_pretrained(
        path
    )


def another_vocabulary(path: Path) -> None:
    config = tiny.CONFIGS["llama"](vocab_size=300)
    T.AutoModelForCausalLM.from_config(config).save_pretrained(path)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"tokens": 0}, "tokens 0: input should be greater than or equal to 1"),
    ({"tokens": "-5"}, "--tokens '-5' is no amount"),
    ({"tokens": "many"}, "--tokens 'many' is no amount"),
    ({"minutes": 5}, "--tokens and --minutes are two budgets: give one"),
    ({"teacher": ""}, "--objective distill learns from the unpruned model: name it with --teacher"),
    ({"teacher": "nowhere"}, "model nowhere does not exist"),
    ({"objective": "distil"}, "did you mean 'distill'?"),
    ({"trainable": "everything"}, "trainable 'everything'"),
    ({"lr": "fast"}, "lr 'fast'"),
    ({"lr": "-1"}, "lr '-1': input should be greater than 0"),
    ({"seq_len": 4096}, "seq-len 4096"),
    ({"seq_len": 1}, "seq-len 1"),
    ({"batch_tokens": 0}, "batch-tokens 0"),
    ({"objective": "ce", "states": "on"}, "--states on aligns with a teacher's hidden states"),
    ({"device": "cuda:1"}, "device 'cuda:1'"),
    ({"precision": "float16"}, "precision 'float16'"),
    ({"text": ("nowhere.txt",)}, "text nowhere.txt does not exist"),
    ({"held_out": ("nowhere.txt",)}, "text nowhere.txt does not exist"),
]


@pytest.mark.parametrize(("more", "said"), REFUSED, ids=[str(next(iter(more.items()))) for more, _ in REFUSED])
def test_what_is_refused(
    more: dict[str, Any],
    said: str,
    bench: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert said in command(bench, capsys, monkeypatch, flags(bench, **more))


def test_texts_and_models_that_do_not_fit(
    bench: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def said(**more: Any) -> str:
        return command(bench, capsys, monkeypatch, flags(bench, **more))

    (bench / "short.txt").write_text("too short")
    assert "text 'short' has 9 tokens, less than one window of 16" in said(text=(str(bench / "short.txt"),))
    assert "text 'short' has 9 tokens" in said(held_out=(str(bench / "short.txt"),))
    assert "is trained on and held out" in said(held_out=(str(bench / "train.txt"),))
    shutil.copytree(bench / "tiny-llama", bench / "other")
    another_vocabulary(bench / "other")
    assert "predicts 300 tokens" in said(teacher=str(bench / "other"))
    another_tokenizer(bench / "other")
    assert "has another tokenizer than" in said(teacher=str(bench / "other"))
    line = flags(bench, trainable="seam")
    line[line.index(str(bench / "student"))] = str(bench / "tiny-llama")
    assert "--trainable seam trains the layers beside dropped ones" in command(bench, capsys, monkeypatch, line)
    (bench / "out").mkdir()
    (bench / "out" / "precious").write_text("")
    assert "exists and is not empty" in said()
    shutil.rmtree(bench / "out")
    (bench / "out.unfinished").mkdir()
    (bench / "out.unfinished" / "precious").write_text("")
    assert "is not a run's folder" in said()


def test_a_loss_that_is_no_number(
    bench: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = bench / "student" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"] *= 1e38
    save_file(tensors, file, metadata={"format": "pt"})
    said = command(bench, capsys, monkeypatch, [*flags(bench), "--no-guard", "--objective", "ce"])
    assert f"the loss is no longer finite at step 1 of {STEPS}: none was saved yet; lower --lr" in said


def test_a_loss_that_becomes_none_keeps_the_last_good_checkpoint(bench: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    true, seen = trainer.divergence, []

    def breaking(*args: Any) -> torch.Tensor:
        seen.append(1)
        return true(*args) * (float("nan") if len(seen) > 2 * 9 else 1.0)

    monkeypatch.setattr(trainer, "divergence", breaking)
    with pytest.raises(
        BillhookError, match=r"finite at step 10 of 12: the checkpoint of step 8 is kept in .*checkpoint-8"
    ):
        run(bench, **LONG)
    last = schedule.checkpoints(bench / "work")[-1]
    assert schedule.is_whole(last)
    assert all(value.isfinite().all() for value in load_file(last / "model.safetensors").values())
    monkeypatch.setattr(trainer, "divergence", true)
    assert len(run(bench, **LONG).healing["losses"]) == 12
