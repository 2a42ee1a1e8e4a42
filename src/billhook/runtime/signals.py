"""How a command ends when it is told to: at once, in one line, and with nothing half-written left.

A signal raises no exception here: that would come amid other people's code, in destructors that swallow it, or in what clears up.
What must not outlive the process is known to this module instead; it goes, and the process ends.
"""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

WORDS = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated", signal.SIGHUP: "hung up"}
_undo: list[
    tuple[int, Callable[[], object]]
] = []  # with the process that it belongs to: a forked one has a copy of this list
_kept: list[Callable[[], str]] = []  # what says that something was left on purpose
_waiting: list[int] = []  # signals that came where none may
_guarded = [0]  # how many `unbroken` are open


def end_on_signals() -> None:
    """End as this module says from now on; what the process was told to ignore when it began, it ignores."""
    for number in WORDS:
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup
            signal.signal(number, _leave)


def ignore_signals() -> None:
    """All is done but for the interpreter to end, which has no time to be told."""
    for number in WORDS:
        signal.signal(number, signal.SIG_IGN)


@contextmanager
def cleanup_on_signal(undo: Callable[[], object]) -> Iterator[None]:
    """Call `undo` if the process is told to end while this is open; the last one first."""
    one = (os.getpid(), undo)
    _undo.append(one)
    try:
        yield
    finally:
        _undo.remove(one)


@contextmanager
def message_on_signal(words: Callable[[], str]) -> Iterator[None]:
    """If the process is told to end while this is open, say these words, of what it leaves on purpose; none if they are empty."""
    _kept.append(words)
    try:
        yield
    finally:
        _kept.remove(words)


@contextmanager
def signals_deferred() -> Iterator[None]:
    """Whoever tells the process to end waits until this is closed: for the moment in which one name is taken and another given."""
    _guarded[0] += 1
    try:
        yield
    finally:
        _guarded[0] -= 1
        if _waiting and not _guarded[0]:
            _leave(_waiting[0])


def run_cleanups() -> None:
    """What must not outlive this process goes."""
    while _undo:
        owner, undo = _undo.pop()
        if owner == os.getpid():
            with suppress(Exception):
                undo()


def _leave(number: int, _: object = None) -> None:
    if _guarded[0]:
        _waiting.append(number)
        return
    ignore_signals()
    _waiting.clear()
    kept = next(filter(None, (words() for words in reversed(_kept))), "")
    run_cleanups()
    line = f"billhook: {WORDS[signal.Signals(number)]}; nothing half-written was left{kept and '; '}{kept}\n"
    with suppress(OSError):
        os.write(2, line.encode(errors="backslashreplace"))
    os._exit(128 + number)
