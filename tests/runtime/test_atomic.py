"""What is written appears whole or not at all, takes the place of nothing unasked, and is never missing."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from processes import Child

from billhook.errors import BillhookError
from billhook.runtime import atomic, locks, renaming


def filled(folder: Path, said: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / atomic.MARK).write_text(said)
    (folder / "model.safetensors").write_text(said)
    return folder


def whole(folder: Path) -> str:
    """What an output holds, all of it the same."""
    found = {file.read_text() for file in folder.iterdir()}
    assert len(found) == 1 and len(list(folder.iterdir())) == 2, list(folder.iterdir())
    return found.pop()


def replaced(out: Path) -> None:
    with atomic.folder(out, overwrite=True) as work:
        filled(work, "new")


SYSTEMS = {"exchanges": None, "only renames": lambda *_: False}  # whether two names can be exchanged


@pytest.fixture(params=SYSTEMS, ids=list(SYSTEMS))
def system(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if able := SYSTEMS[request.param]:
        monkeypatch.setattr(renaming, "_renamed", able)
    return request.param


STEPS = ("rename", "rmtree", "_renamed", "fsync")


@contextmanager
def killed_at(step: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Have the process end before its nth step of any that changes names; how many there were."""
    seen = [0]

    def counted(call: Callable[..., Any]) -> Callable[..., Any]:
        def one(*given: Any, **how: Any) -> Any:
            if seen[0] == step:
                os._exit(9)
            seen[0] += 1
            return call(*given, **how)

        return one

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", counted(Path.rename))
        patch.setattr(atomic.shutil, "rmtree", counted(atomic.shutil.rmtree))
        patch.setattr(renaming, "_renamed", counted(renaming._renamed))
        patch.setattr(os, "unlink", counted(os.unlink))
        patch.setattr(os, "fsync", counted(os.fsync))
        yield seen


def test_killed_at_any_step_of_a_replacement_one_of_both_is_there(
    system: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, died = [], True
    for step in range(30):
        out = filled(tmp_path / f"{step}" / "out", "old")
        child = os.fork()
        if not child:
            with killed_at(step, monkeypatch):
                replaced(out)
            os._exit(0)
        died = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
        if system == "exchanges":
            assert out.is_dir()
        with pytest.raises(BillhookError, match="not empty"):
            atomic.check_free(out, overwrite=False)  # as the next command does
        found.append(whole(out))
        replaced(out)
        assert whole(out) == "new" and [one.name for one in out.parent.iterdir()] == ["out"]
        if not died:
            break
    assert not died and found == sorted(found, reverse=True) and set(found) == {"old", "new"}, found


def appears(what: str, out: Path) -> None:
    if what == "file":
        out.write_text("theirs")
    elif what == "link":
        out.symlink_to(filled(out.with_name("elsewhere"), "theirs"))
    else:
        filled(out, "theirs")
        if what == "folder":
            (out / atomic.MARK).rename(out / "notes.txt")


@pytest.mark.parametrize("what", ["file", "link", "folder", "folder of billhook's"])
def test_what_appears_at_an_output_meanwhile_stays(what: str, system: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with (
        pytest.raises(BillhookError, match=r"out was made by something else meanwhile.* is in .*out\.1"),
        atomic.folder(out) as work,
    ):
        filled(work, "new")
        appears(what, out)
    assert whole(tmp_path / "out.1") == "new"
    assert out.read_text() == "theirs" if what == "file" else whole(out) == "theirs"
    assert not list(tmp_path.glob(".*"))


def test_what_was_no_longer_its_own_is_not_replaced(system: str, tmp_path: Path) -> None:
    out = filled(tmp_path / "out", "old")
    with pytest.raises(BillhookError, match="finished output is in"), atomic.folder(out, overwrite=True) as work:
        filled(work, "new")
        (out / atomic.MARK).rename(out / "notes.txt")
    assert whole(out) == "old" and whole(tmp_path / "out.1") == "new"


def test_an_empty_folder_that_appears_is_filled(system: str, tmp_path: Path) -> None:
    with atomic.folder(tmp_path / "out") as work:
        filled(work, "new")
        (tmp_path / "out").mkdir()
    assert whole(tmp_path / "out") == "new"


@pytest.mark.parametrize("taken", [0, 2])
def test_a_file_that_appears_stays_unless_it_may_be_replaced(taken: int, system: str, tmp_path: Path) -> None:
    out = tmp_path / "a.gguf"
    for n in range(1, taken):
        (tmp_path / f"a.gguf.{n}").write_text("taken")
    with (
        pytest.raises(BillhookError, match=rf"finished output is in .*a\.gguf\.{max(1, taken)}"),
        atomic.file(out, overwrite=False) as work,
    ):
        work.write_text("new")
        out.write_text("theirs")
    assert out.read_text() == "theirs" and (tmp_path / f"a.gguf.{max(1, taken)}").read_text() == "new"
    atomic.write_text(out, "new")
    assert out.read_text() == "new" and not list(tmp_path.glob(".*"))
    with atomic.file(tmp_path / "b", overwrite=False) as work:
        work.write_text("b")
    assert (tmp_path / "b").read_text() == "b"


def test_two_at_once_one_works_and_the_other_says_so(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with atomic.folder(out) as work:
        child = Child(lambda: replaced(out))
        code, _, err = child.ended(30)
        assert code == 1 and "another command is writing" in err and "BillhookError" in err, err
        filled(work, "new")
    assert whole(out) == "new" and not list(tmp_path.glob(".*"))


def test_many_at_once_one_works(tmp_path: Path) -> None:
    """They begin together, and the one that works holds its place until all have tried."""
    out, go, done = tmp_path / "out", tmp_path / "go", tmp_path / "done"

    def race() -> None:
        while not go.exists():
            time.sleep(0.0002)
        try:
            with atomic.folder(out) as work:
                filled(work, str(os.getpid()))
                while not done.exists():
                    time.sleep(0.001)
        except BillhookError as error:
            sys.exit(2 if "another command is writing" in str(error) else 3)

    for left in (False, True):  # what a killed process left is there, or not
        if left:
            filled(atomic.hidden(out, "partial"), "half")
        racers = [Child(race) for _ in range(5)]
        time.sleep(0.1)
        go.touch()
        until = time.monotonic() + 30
        while sum(one.runs for one in racers) > 1 and time.monotonic() < until:
            time.sleep(0.005)
        done.touch()
        ends = sorted(one.ended(30)[0] for one in racers)
        assert ends == [0, 2, 2, 2, 2]
        assert whole(out) != "half" and not list(tmp_path.glob(".*"))
        for one in (go, done, *out.iterdir()):
            one.unlink()


def test_a_lock_ends_with_its_process_and_no_child_has_it(tmp_path: Path) -> None:
    script = (
        "import subprocess, sys\nfrom pathlib import Path\nfrom billhook.runtime import locks\n"
        "with locks.locked(Path(sys.argv[1])) as lock:\n"
        "    child = subprocess.Popen(['sleep', '60'])\n    print(lock, child.pid, flush=True)\n    sys.stdin.read()\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        said, child = process.stdout.readline().split()
        with locks.locked(tmp_path) as lock:
            assert (said, lock) == ("ours", "taken")
        process.kill()
    with locks.locked(tmp_path) as lock:
        assert lock == "ours"
    os.kill(int(child), signal.SIGKILL)


def test_without_locks_what_may_be_another_s_is_left_and_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: int) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(locks.fcntl, "flock", none)
    out = tmp_path / "out"
    replaced(out)
    replaced(out)
    assert whole(out) == "new"
    left = filled(atomic.hidden(out, "partial"), "half")
    with pytest.raises(BillhookError, match=r"has no locks to tell whether another command is writing .*: remove it"):
        replaced(out)
    assert whole(left) == "half"
    atomic.write_text(tmp_path / "file", "x")
    filled(atomic.hidden(tmp_path / "file", "partial"), "half")
    atomic.write_text(tmp_path / "file", "y")
    assert (tmp_path / "file").read_text() == "y"


def test_what_a_killed_process_left_goes(tmp_path: Path) -> None:
    out, file = tmp_path / "out", tmp_path / "file"
    for one in (out, file):
        filled(atomic.hidden(one, "partial"), "half")
    filled(atomic.hidden(out, "old"), "old")
    filled(atomic.hidden(tmp_path / "other", "partial"), "half")
    filled(out, "older")
    replaced(out)
    atomic.write_text(file, "new")
    assert whole(out) == "new" and [one.name for one in tmp_path.glob(".*")] == [".other.billhook.partial"]
