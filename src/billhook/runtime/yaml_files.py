"""YAML that a user wrote: plain data, read with care.  The parser takes a while to load:
whoever has no file leaves it alone."""

from pathlib import Path
from typing import Any

import yaml

from billhook.errors import BillhookError, first_line
from billhook.runtime.documents import read_bytes, too_deep

LARGEST_YAML = 2**17  # bytes of a recipe or an allocation; parsing as much YAML takes a second


def read_yaml(path: Path, what: str) -> Any:
    """The plain data in a user's YAML file; JSON is YAML, too.

    Raises:
        BillhookError: it is not a plain file, is too large, not UTF-8, not YAML, or nested too deeply.
    """
    try:
        document = yaml.load(read_bytes(path, what, "write it again", LARGEST_YAML).decode("utf-8"), _Plain)
        if too_deep(document):
            raise RecursionError
    except BillhookError:
        raise
    except RecursionError:
        raise BillhookError(f"{what} cannot be read (nested too deeply)") from None
    except (OSError, yaml.YAMLError, ValueError) as error:  # an impossible date is a ValueError
        raise BillhookError(f"{what} cannot be read: {first_line(error)}") from error
    return document


class _Plain(yaml.SafeLoader):
    """Loads YAML without aliases: a few lines of those can stand for more than memory holds."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("it has an alias, which is not read: write out what it stands for")
        return super().compose_node(parent, index)
