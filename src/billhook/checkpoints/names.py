"""What a user may call a model, looked at before anything is opened.  Loads no torch."""

import os
import re
from pathlib import Path

from billhook.errors import ModelError

SUFFIX = ".gguf"
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")


def is_gguf(path: Path) -> bool:
    """Whether a path names a GGUF file."""
    return path.suffix.lower() == SUFFIX and not path.is_dir()


def local_path(name: str) -> Path | None:
    """The folder or .gguf file that a name means; None where it means `demo` or a hub id.

    Raises:
        BillhookError: it is another file, or no such thing.
    """
    if name == "demo":
        return None
    path = Path(os.path.expanduser(name))  # Path.expanduser raises for unknown users
    if path.exists():
        if path.is_file() and not is_gguf(path):
            raise ModelError(f"{name} is a file: give the model's folder, a hub id, a .gguf file or 'demo'")
        return path
    if not HUB_ID.fullmatch(name) or is_gguf(path):
        raise ModelError(f"model {name} does not exist: give a folder, a hub id (owner/name), a .gguf file or 'demo'")
    return None
