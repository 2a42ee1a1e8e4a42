"""The ladder of a search: how many candidates stand on each rung, on how many windows, and when the time is up."""

import time
from collections.abc import Callable

from billhook.errors import BillhookError
from billhook.search.validation import Validation

BATCH = 8  # candidates of a round
RUNGS = (4, 16, 64)  # short windows of a round, of the promotion, and of the choice among finalists
PROMOTED = 12  # candidates that are tried again on more windows
FINALISTS = 2  # candidates that are pruned as the result will be
RESTORED_ON = 16  # calibration windows that finalists are restored on; the winner has all of them


def end_tokens(validation: Validation, finished: int, each: int) -> int:
    """Tokens of the forward passes of promotion and finals.

    Args:
        finished: how many candidates are made what the result would be.
        each: tokens that this takes for each of them.
    """
    _, promotion, choice = (count * validation.rungs.shape[1] for count in RUNGS)
    return (PROMOTED + 1) * promotion + finished * (choice + validation.final.numel() + each)


def deadline(minutes: float | None, started: float, end: float) -> Callable[[], bool]:
    """A function that says whether trials must stop for the rest, `end` seconds, to be done in time.

    Args:
        minutes: the time that the whole search may take; None: any.
        started: when it began, by `time.perf_counter`.

    Raises:
        BillhookError: no trial can be done in time.
    """
    if minutes is None:
        return lambda: False
    if time.perf_counter() - started + end > 60 * minutes:
        least = (time.perf_counter() - started + end) / 60
        raise BillhookError(
            f"--minutes {minutes:g} is too short for one trial: the pool, the known metrics and the end take "
            f"{least:.1f} here"
        )
    return lambda: time.perf_counter() - started + end > 60 * minutes
