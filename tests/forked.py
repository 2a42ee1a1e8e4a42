"""A process of its own that need not import anything: a fork of this one, there in a tenth of a second and not in five."""

import multiprocessing
import os
import random
import signal
import sys
import tempfile
from collections.abc import Callable
from typing import IO

import torch


class Forked:
    """`work` in a child process, which may be killed; what it prints goes to files of its own."""

    def __init__(self, work: Callable[[], object]) -> None:
        self._printed, self._said = (tempfile.TemporaryFile("w+") for _ in range(2))  # noqa: SIM115
        self._process = multiprocessing.get_context("fork").Process(target=self._run, args=(work,), daemon=True)
        self._process.start()

    def _run(self, work: Callable[[], object]) -> None:
        """As a new interpreter would: its own streams, handlers of signals, and random numbers."""
        for name, number, file in (("stdout", 1, self._printed), ("stderr", 2, self._said)):
            os.dup2(file.fileno(), number)
            setattr(sys, name, open(number, "w", closefd=False))  # noqa: SIM115
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        torch.manual_seed(os.getpid())
        random.seed(os.getpid())
        work()

    @property
    def runs(self) -> bool:
        return self._process.is_alive()

    def send(self, number: signal.Signals) -> None:
        if self._process.pid is not None and self.runs:
            os.kill(self._process.pid, number)

    def ended(self, timeout: float = 60) -> tuple[int, str, str]:
        """Its exit code, below zero for the signal that ended it, and what it wrote to standard output and standard error."""
        self._process.join(timeout)
        code = self._process.exitcode
        assert code is not None, f"it still runs after {timeout} s"
        return code, _content(self._printed), _content(self._said)


def _content(file: IO[str]) -> str:
    with file:
        file.seek(0)
        return file.read()
