"""How a command ends when a signal tells it to: at once, with one line, and with nothing half-written left.

A signal raises no exception here: that could come in the middle of a library's code, in a destructor that swallows it,
or in a cleanup.  Instead cleanups are registered with this module, which runs them and ends the process.
"""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

WORDS = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated", signal.SIGHUP: "hung up"}
# registered cleanups, each with the process it belongs to: a forked process has a copy of this list
_cleanups: list[tuple[int, Callable[[], object]]] = []
_messages: list[Callable[[], str]] = []  # functions that say what is left on purpose
_waiting: list[int] = []  # signals that came while they were deferred
_deferring = [0]  # how many `signals_deferred` are open


def end_on_signals() -> None:
    """From now on end as this module says; a SIGHUP that was ignored at the start (nohup) stays ignored."""
    for number in WORDS:
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup
            signal.signal(number, _leave)


def ignore_signals() -> None:
    """Ignore signals while the interpreter shuts down: all work is done."""
    for number in WORDS:
        signal.signal(number, signal.SIG_IGN)


@contextmanager
def cleanup_on_signal(cleanup: Callable[[], object]) -> Iterator[None]:
    """Call `cleanup` if a signal ends the process while this is open; the last registered one first."""
    entry = (os.getpid(), cleanup)
    _cleanups.append(entry)
    try:
        yield
    finally:
        _cleanups.remove(entry)


@contextmanager
def message_on_signal(words: Callable[[], str]) -> Iterator[None]:
    """If a signal ends the process while this is open, add these words, about what is left on purpose, to its line."""
    _messages.append(words)
    try:
        yield
    finally:
        _messages.remove(words)


@contextmanager
def signals_deferred() -> Iterator[None]:
    """Signals wait until this is closed: for the moment in which one name is taken away and another given."""
    _deferring[0] += 1
    try:
        yield
    finally:
        _deferring[0] -= 1
        if _waiting and not _deferring[0]:
            _leave(_waiting[0])


def run_cleanups() -> None:
    """Run all cleanups that this process has registered."""
    while _cleanups:
        owner, cleanup = _cleanups.pop()
        if owner == os.getpid():
            with suppress(Exception):
                cleanup()


def _leave(number: int, _: object = None) -> None:
    if _deferring[0]:
        _waiting.append(number)
        return
    ignore_signals()
    _waiting.clear()
    message = next(filter(None, (words() for words in reversed(_messages))), "")
    run_cleanups()
    line = f"billhook: {WORDS[signal.Signals(number)]}; nothing half-written was left{message and '; '}{message}\n"
    with suppress(OSError):
        os.write(2, line.encode(errors="backslashreplace"))
    os._exit(128 + number)
