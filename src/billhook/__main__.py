"""Entry point: the libraries take seconds to load, and Ctrl-C leaves cleanly meanwhile."""

import logging
import os
import signal
import sys
import warnings
from typing import Any, NoReturn


def main() -> NoReturn:
    """Run the command line."""
    _hush_libraries()
    signal.signal(signal.SIGINT, _leave)  # an exception amid other people's imports could end anywhere
    from billhook import cli

    signal.signal(signal.SIGINT, signal.default_int_handler)
    cli.main()


def _hush_libraries() -> None:
    """Keep off the terminal what libraries warn of in passing, here and in the processes that a command starts: a user can do nothing about it.

    Whoever asked Python or transformers for another verbosity, by their own variables or -W, still has it.
    """
    os.environ.setdefault("PYTHONWARNINGS", "ignore")  # for processes that share the work
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    logging.getLogger().addHandler(logging.NullHandler())  # without one, Python prints what loggers warn of
    if not sys.warnoptions:
        warnings.simplefilter("ignore")


def _leave(*_: Any) -> NoReturn:
    os.write(2, b"billhook: interrupted; nothing half-written was left\n")
    os._exit(130)


if __name__ == "__main__":
    main()
