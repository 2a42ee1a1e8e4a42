"""The command line: parse, call, print.  Bad input prints one line and leaves with exit code 2.

commands  The app and its commands by name: a command's own module is imported once it is asked for
compare   Commands that prune many times and judge: compare, sweep
console   What a command shows while it works: consoles, a spinner while libraries load, progress bars
evaluate  Commands that look at models: evaluate, inspect
export    Commands that carry a result to where it is served: check, export
help      How help is printed: plain text at once, options under the headings that they name
methods   The command that says what each method is: methods
options   What commands share before they work: common options, and checks of what needs no model
prune     The command prune
quantize  The command quantize
recover   Commands that train, and say beforehand what training buys: recover, forecast
run       Commands that prune without options: run, demo
search    The command that searches for calibration samples and metric before it prunes: search
settings  Options of commands, made from the settings of recipes and methods
work      What commands share once they work; it brings torch
"""

import logging
import sys
from typing import Annotated, NoReturn, cast

import typer

from billhook.cli.commands import app
from billhook.errors import BillhookError
from billhook.runtime import signals
from billhook.runtime.scratch import scratch

__all__ = ["app", "main"]
# typer brings a click of its own or the real one, by version; both derive every parse error from one class
UsageError = cast(type[typer.BadParameter], typer.BadParameter.__mro__[1])
INTERRUPTED = 130
LOG = logging.getLogger("billhook")
PATIENCE = 2.0  # seconds for the processes that this one started to clear up after themselves


def _show_version(wanted: bool | None) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"billhook {version('billhook')}")
        raise typer.Exit


@app.callback()
def _top(
    show_version: Annotated[
        bool | None,
        typer.Option("--version", callback=_show_version, is_eager=True, help="print the version and leave"),
    ] = None,
) -> None:
    """What every command shares."""


class _Said(logging.Handler):
    """What billhook warns of, a line on standard error each, once in a command."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        line = " ".join(record.getMessage().split())
        if line not in self.lines:
            self.lines.add(line)
            typer.echo(f"billhook: warning: {line}", err=True)


def main() -> NoReturn:
    """Entry point: exit code 0, 2 for bad input with one line on standard error; signals are
    `billhook.runtime.signals`'s."""
    said = _Said()
    LOG.addHandler(said)
    try:
        _run()
    finally:
        LOG.removeHandler(said)


def _run() -> NoReturn:
    try:
        with scratch(), signals.cleanup_on_signal(_end_children):
            code = app(sys.argv[1:] or ["--help"], prog_name="billhook", standalone_mode=False) or 0
    except BillhookError as error:
        _fail(str(error))
    except OSError as error:
        _fail(f"{error.filename}: {error.strerror}" if error.filename else str(error))
    except UsageError as error:
        _fail(error.format_message())
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    if code == INTERRUPTED:  # newer typers turn Ctrl-C into this code without a word
        typer.echo("billhook: interrupted; nothing half-written was left", err=True)
    sys.exit(code)


def _end_children() -> None:
    """Workers, and interpreters of other clients."""
    import psutil

    tracker = "multiprocessing.resource_tracker"  # ends by itself, once it has cleared up after the others
    children = [one for one in psutil.Process().children() if tracker not in " ".join(one.cmdline())]
    for one in children:
        one.terminate()
    for one in psutil.wait_procs(children, PATIENCE)[1]:
        one.kill()


def _fail(message: str) -> NoReturn:
    typer.echo("billhook: error: " + " ".join(message.split()), err=True)
    sys.exit(2)
