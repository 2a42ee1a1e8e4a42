"""A disk that takes no more, or files that may not be as large, in the midst of a recovery: one line, nothing lost, and
it goes on."""

import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers as T

from billhook.checkpoints.result import Result
from billhook.errors import BillhookError
from billhook.pruning import prune
from billhook.recovery import recover
from billhook.runtime import atomic, cache, tensor_files
from billhook.training import schedule

LENGTH, STEPS, BYTES = 16, 3, 64


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a teacher, a student, two texts, and what a recovery of it gives."""
    root = tmp_path_factory.mktemp("full")
    tiny.model("llama").save_pretrained(root / "teacher")
    tiny.tokenizer().save_pretrained(root / "teacher")
    student = prune.prune(str(root / "teacher"), method="layerchop", drop="1")
    student.model.save_pretrained(root / "student")
    tiny.tokenizer().save_pretrained(root / "student")
    words = tiny.text(1200)
    (root / "train.txt").write_text(words[:3000])
    (root / "held.txt").write_text(words[3000:])
    return root


def run(root: Path, work: Path) -> Result:
    return recover.recover(
        root / "student",
        work=work,
        teacher=str(root / "teacher"),
        tokens=STEPS * 2 * LENGTH,
        batch_tokens=2 * LENGTH,
        text=(str(root / "train.txt"),),
        held_out=(str(root / "held.txt"),),
        seq_len=LENGTH,
        lr=1e-3,
        device="cpu",
        precision="float32",
    )


@pytest.fixture(scope="module")
def whole(made: Path) -> Result:
    return run(made, made / "whole")


def never_larger(true: Callable[..., Any], calls: Callable[..., bool]) -> Callable[..., Any]:
    """A writer, with a limit on the size of files, from the `calls` on that say so."""

    def limited(*args: Any, **more: Any) -> Any:
        if not calls(*args):
            return true(*args, **more)
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (BYTES, hard))  # Python ignores SIGXFSZ: the write fails
        try:
            return true(*args, **more)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    return limited


FILES: dict[str, tuple[Any, str, Callable[..., bool]]] = {  # of a checkpoint: who writes it
    "model": (T.modeling_utils, "safe_save_file", lambda *_: True),
    "optimizer": (torch, "save", lambda _, to: "optimizer" in str(to)),
    "schedule": (torch, "save", lambda _, to: "scheduler" in str(to)),
    "random numbers": (torch, "save", lambda _, to: "rng_state" in str(to)),
    "state": (T.TrainerState, "save_to_json", lambda *_: True),
    "mark": (atomic, "write_text", lambda to, _: to.name == schedule.WHOLE),
}


def test_checkpoints_that_the_disk_does_not_take(
    made: Path, whole: Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reason = "(File too large|the disk is full, or files may not be as large)"
    for before, left in enumerate(("none was saved yet", "the checkpoint of step 1 is kept in .*checkpoint-1")):
        for owner, attribute, concerns in list(FILES.values())[:: 1 + 4 * before]:  # all, then the first and the last

            def now(*args: Any, known: int = before, of: Callable[..., bool] = concerns) -> bool:
                return of(*args) and len(whole_ones(tmp_path)) == known

            with monkeypatch.context() as patch:
                patch.setattr(owner, attribute, never_larger(getattr(owner, attribute), now))
                with pytest.raises(BillhookError, match=rf"^cannot write .*checkpoint-\d: {reason}; {left}: make room"):
                    run(made, tmp_path)
            found = whole_ones(tmp_path)
            assert schedule.checkpoints(tmp_path) == found and len(found) == before
    again = run(made, tmp_path)
    assert again.healing["losses"] == whole.healing["losses"]
    theirs = whole.model.state_dict()
    assert all(torch.equal(one, theirs[key]) for key, one in again.model.state_dict().items())


def whole_ones(work: Path) -> list[Path]:
    return [one for one in schedule.checkpoints(work) if schedule.is_whole(one)]


def test_answers_and_results_that_the_disk_does_not_take(
    made: Path, whole: Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writers = ((tensor_files, "write", "teacher-.*safetensors"), (cache.atomic, "write_text", "tokens|teacher-.*json"))
    for owner, attribute, file in writers:
        with monkeypatch.context() as patch:
            patch.setattr(owner, attribute, never_larger(getattr(owner, attribute), lambda *_: True))
            with pytest.raises(
                BillhookError, match=rf"^cannot write .*({file}|run.json): File too large; nothing half-wr"
            ):
                run(made, tmp_path / "work")
    assert run(made, tmp_path / "work").healing["losses"] == whole.healing["losses"]
    with monkeypatch.context() as patch:
        patch.setattr(tensor_files, "write", never_larger(tensor_files.write, lambda *_: True))
        with pytest.raises(BillhookError, match=r"^cannot write .*out: File too large; nothing half-written was left"):
            whole.save(tmp_path / "out")
    shutil.rmtree(tmp_path / "work")
    assert not list(tmp_path.iterdir())
