"""What a user did that cannot work, said in one line: what, where, what to do."""

from collections.abc import Iterable
from difflib import get_close_matches


class BillhookError(ValueError):
    """Bad input.  The command line prints the message alone and leaves with exit code 2."""


class SettingsError(BillhookError):
    """A setting that is unknown or impossible, or settings that cannot go together."""


class ModelError(BillhookError):
    """A model or checkpoint that cannot be read, is damaged, or of a kind that billhook does not know."""


class DataError(BillhookError):
    """A text that cannot be read, or is too short."""


MANY = 40  # names: more do not make a line that anyone reads
NEAREST = 8
LONGEST = 300  # characters of what another library says


def one_of(what: str, given: str, valid: Iterable[str]) -> str:
    """Return `given` if it is valid, else raise naming the nearest valid name and all of them, or some of very many."""
    names = list(valid)
    if given in names:
        return given
    near = get_close_matches(given, names, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    some = (get_close_matches(given, names, NEAREST, 0.4) or names[:NEAREST]) if len(names) > MANY else names
    rest = f", … ({len(names)} in all)" if len(names) > MANY else ""
    raise SettingsError(f"unknown {what} {given!r}: {hint}valid: {', '.join(some)}{rest}")


def reason(error: BaseException) -> str:
    """The whole of what an exception of another library says, in one line."""
    said = " ".join(str(error).split()) or type(error).__name__
    return said if len(said) <= LONGEST else said[:LONGEST] + "…"


def first_line(error: BaseException) -> str:
    """What an exception of another library says, cut to one line."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
