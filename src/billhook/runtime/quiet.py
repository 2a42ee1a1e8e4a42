"""Keep the progress bars and warnings of transformers off the terminal."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from transformers.utils import logging as transformers_logging


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """While open, transformers draws no progress bars and logs errors alone."""
    bars, verbosity = transformers_logging.is_progress_bar_enabled(), transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    _set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        _set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


def _set_verbosity(verbosity: int) -> None:
    if transformers_logging.get_verbosity() != verbosity:  # setting it clears what all loggers have cached
        transformers_logging.set_verbosity(verbosity)
