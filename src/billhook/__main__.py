"""Entry point: the libraries take seconds to load, and signals end it cleanly meanwhile, too."""

import logging
import os
import sys
import warnings
from typing import NoReturn


def main() -> NoReturn:
    """Run the command line."""
    from billhook.runtime import signals

    signals.end_on_signals()
    _hush_libraries()
    from billhook import cli

    try:
        cli.main()
    finally:
        signals.ignore_signals()


def _hush_libraries() -> None:
    """Keep off the terminal what libraries warn of in passing, here and in the processes that a command starts: a user
    can do nothing about it.

    Whoever asked Python or transformers for another verbosity, by their own variables or -W, still has it.
    """
    os.environ.setdefault("PYTHONWARNINGS", "ignore")  # for processes that share the work
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")  # looking for some reads every package's metadata
    logging.getLogger().addHandler(logging.NullHandler())  # without one, Python prints what loggers warn of
    if not sys.warnoptions:
        warnings.simplefilter("ignore")


if __name__ == "__main__":
    main()
