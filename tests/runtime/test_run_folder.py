"""The folder of a run: one process at a time works in it, and a kill as it goes leaves it known as one that goes."""

import errno
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from processes import Child

from billhook.errors import BillhookError
from billhook.runtime import locks, run_folder, scratch

KEY = {"settings": {"ratio": 0.2}, "model": "a"}


def run_of(work: Path) -> Path:
    run_folder.claim(work, KEY, fresh=False)
    for name in ("layer-0.json", "layer-0.safetensors", "layer.partial"):
        (work / name).write_text("{}")
    for name in ("pages", "lessons", "checkpoint-3"):
        (work / name).mkdir()
        (work / name / "one").write_text("x")
    return work


def ended_at(step: int, work: Callable[[], object]) -> bool:
    """Do it in a process that ends before its nth removal; whether it ended there."""
    child = os.fork()
    if not child:
        seen = [0]

        def counted(call: Callable[..., Any]) -> Callable[..., Any]:
            def one(*given: Any, **how: Any) -> Any:
                if seen[0] == step:
                    os._exit(9)
                seen[0] += 1
                return call(*given, **how)

            return one

        os.unlink, os.rmdir = counted(os.unlink), counted(os.rmdir)
        work()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


REMOVALS = {"removed": False, "started over": True}


@pytest.mark.parametrize("fresh", REMOVALS.values(), ids=list(REMOVALS))
def test_killed_as_it_is_removed_it_is_known_as_a_run_s(fresh: bool, tmp_path: Path) -> None:
    for step in range(60):
        work = run_of(tmp_path / f"work-{step}")
        other = {"settings": {"ratio": 0.3}, "model": "a"}
        if fresh:
            died = ended_at(step, partial(run_folder.claim, work, other, True, ("lessons",)))
        else:
            died = ended_at(step, partial(run_folder.remove, work))
        if run_folder.begun(work) and (work / "layer-0.json").exists():  # not begun to go
            run_folder.claim(work, KEY, fresh=False)
            assert (work / "layer-0.safetensors").exists() and (work / "pages" / "one").exists()
        else:
            run_folder.claim(
                work, other, fresh=False, keep=("lessons",)
            )  # whatever comes next takes what is left for its own
            assert {one.name for one in work.iterdir()} <= {run_folder.NAME, "lessons"}
            assert not fresh or (work / "lessons" / "one").exists()
        if not died:
            break
    assert step > 5 and not died


def test_one_process_works_in_a_folder(tmp_path: Path) -> None:
    work = tmp_path / "new" / "work"

    def enter() -> None:
        with run_folder.locked(work):
            run_folder.claim(work, KEY, fresh=False)

    with run_folder.locked(work), run_folder.locked(work):  # what has it may ask again
        code, _, said = Child(enter).ended(30)
        assert code == 1 and "another command works in" in said and not (work / run_folder.NAME).exists()
    assert not (tmp_path / "new").exists()
    enter()
    assert run_folder.begun(run_of(work)) and not run_folder.begun(tmp_path)
    run_folder.remove(work)
    assert not work.exists()


def test_without_locks_a_folder_is_worked_in_and_that_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def none(*_: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    def lines() -> list[str]:
        said = [one.getMessage() for one in caplog.records]
        caplog.clear()
        return said

    work = tmp_path / "work"
    with run_folder.locked(work):
        run_of(work)
    assert not lines()
    monkeypatch.setattr(locks.fcntl, "flock", none)
    for one in (work, tmp_path / "new"):  # which no one else can have made, and others may come to
        with run_folder.locked(one), run_folder.locked(one):
            assert one.is_dir()
        (line,) = lines()
        assert line.startswith(f"{one}: its file system has no locks: start no other command that works there")


def test_what_no_run_made_is_not_removed(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    run_folder.remove(tmp_path)
    with pytest.raises(BillhookError, match="is not a run's folder"), run_folder.locked(tmp_path):
        pass
    assert (tmp_path / "notes.txt").exists()


def test_temporary_files_go_with_their_process_or_with_the_next_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scratch.tempfile, "tempdir", str(tmp_path))
    (tmp_path / "billhook-notes").mkdir()

    def killed() -> None:
        with scratch.scratch():
            Path(scratch.tempfile.mkdtemp(), "pages").write_text("large")
            os._exit(9)

    assert Child(killed).ended(30)[0] == 9
    assert len(list(tmp_path.glob("billhook-*/*/pages"))) == 1
    with scratch.scratch():
        here = Path(scratch.tempfile.mkdtemp()).parent
        assert not list(tmp_path.glob("billhook-*/*/pages"))
        with scratch.scratch():  # another one's is left
            assert here.exists()
    assert [one.name for one in tmp_path.iterdir()] == ["billhook-notes"] and scratch.tempfile.tempdir == str(tmp_path)
    monkeypatch.setattr(scratch.tempfile, "mkdtemp", lambda **_: (_ for _ in ()).throw(OSError(28, "full")))
    with scratch.scratch():
        assert scratch.tempfile.tempdir == str(tmp_path)
    shutil.rmtree(tmp_path)
