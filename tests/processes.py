"""Processes that have imported everything already: there in a tenth of a second, where an interpreter takes five.

`forkserver` starts processes as `spawn` does, with nothing of this one's state and with what is sent to them pickled,
from a server that imported `preloaded` once.
"""

import io
import multiprocessing
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from multiprocessing.forkserver import _forkserver
from pathlib import Path
from typing import Any

import torch

HERE = str(Path(__file__).parent)
multiprocessing.set_forkserver_preload(["preloaded"])


def _ensure_running(ensure: Callable[[], None] = _forkserver.ensure_running) -> None:
    """The server finds the tests' own modules: Python 3.11 does not tell it where this process does."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [HERE, before]))
    try:
        ensure()
    finally:
        os.environ["PYTHONPATH"] = before or ""
        if before is None:
            del os.environ["PYTHONPATH"]


_forkserver.ensure_running = _ensure_running


class Child:
    """`work` in a process that may be killed; what it prints is kept.

    Either forked from this process, all that tests have patched included, or fresh: then `work` is of a module, no
    random number was drawn before, and sets have another order.
    """

    def __init__(self, work: Callable[..., object], *given: Any, fresh: bool = False) -> None:
        self._folder = tempfile.TemporaryDirectory()
        process = (
            multiprocessing.get_context("forkserver").Process if fresh else multiprocessing.get_context("fork").Process
        )
        self._process = process(target=_run, args=(Path(self._folder.name), work, given), daemon=True)
        self._process.start()

    @property
    def runs(self) -> bool:
        return self._process.is_alive()

    def send(self, number: signal.Signals) -> None:
        if self._process.pid is not None and self.runs:
            os.kill(self._process.pid, number)

    def ended(self, timeout: float = 240) -> tuple[int, str, str]:
        """Its exit code, below zero for the signal that ended it, and what it wrote to standard output and standard
        error."""
        self._process.join(timeout)
        code = self._process.exitcode
        assert code is not None, f"it still runs after {timeout} s"
        with self._folder as folder:
            out, err = ((Path(folder) / name).read_text() for name in STREAMS)
        return code, out, err


STREAMS = ("stdout", "stderr")


def _run(folder: Path, work: Callable[..., object], given: tuple[Any, ...]) -> None:
    """As an interpreter would: with streams, handlers of signals, and random numbers of its own."""
    for number, name in enumerate(STREAMS, 1):
        with (folder / name).open("w") as file:
            os.dup2(file.fileno(), number)
        setattr(sys, name, open(number, "w", closefd=False))  # noqa: SIM115
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.manual_seed(os.getpid())
    random.seed(os.getpid())
    work(*given)


def by_hand(line: list[str]) -> str:
    """A command as `accelerate launch` starts it on two processes; what the first one says."""
    return launched(2, command, line)


def launched(count: int, work: Callable[[list[str]], object], line: list[str]) -> str:
    """What the first of some processes says that `accelerate launch` has started, and the others do not; `work`, which
    gets the command's line, is of a module."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = [Child(_launched, rank, count, port, work, line, fresh=True) for rank in range(count)]
    ends = [one.ended() for one in started]
    assert [code for code, _, _ in ends] == [0] * count, ends
    assert not any(said for _, said, _ in ends[1:])
    return ends[0][1]


def _launched(rank: int, count: int, port: int, work: Callable[[list[str]], object], line: list[str]) -> None:
    given = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
    given |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "ACCELERATE_MIXED_PRECISION": "no"}
    os.environ.update({name: str(value) for name, value in given.items()})
    work(line)


def command(line: list[str]) -> None:
    """A command as it is typed, without the check in a third process."""
    from billhook import cli
    from billhook.checkpoints.clients import check

    check.check = lambda _, client: {"client": client, "version": "not run"}  # imports of a third process
    sys.argv = ["billhook", *line]
    cli.main()


def stock(script: str, arguments: Sequence[str], given: str = "") -> subprocess.CompletedProcess[str]:
    """A script as an interpreter runs it that has no billhook: a fresh process that has forgotten it.

    transformers copies code of a model to a folder beside the first argument.
    """
    child = Child(_without_billhook, script, list(arguments), given, fresh=True)
    return subprocess.CompletedProcess([script, *arguments], *child.ended())


class _NoBillhook:
    def find_spec(self, name: str, *_: object) -> None:
        if name.partition(".")[0] == "billhook":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def forget_billhook() -> None:
    """What imports billhook next imports it anew."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "billhook"]:
        del sys.modules[name]


def _without_billhook(script: str, arguments: list[str], given: str) -> None:
    from transformers import dynamic_module_utils

    forget_billhook()
    sys.meta_path.insert(0, _NoBillhook())
    dynamic_module_utils.HF_MODULES_CACHE = str(Path(arguments[0]).parent / "modules")
    sys.argv, sys.stdin = ["script", *arguments], io.StringIO(given)
    exec(compile(script, "script", "exec"), {"__name__": "__main__"})
