"""Whether an output may be written where the user wants it, before anything is computed.  Loads no torch."""

from pathlib import Path

from billhook.errors import BillhookError
from billhook.runtime import atomic


def check_out(out: Path, source: Path | None, overwrite: bool) -> None:
    """Refuse an output folder that is taken, or that would put result and source inside each other."""
    check_apart(out, source)
    if source is not None and out.resolve() in source.resolve().parents:
        raise BillhookError(f"{out} holds the model's own folder {source}: choose another output")
    atomic.check_free(out, overwrite)


def check_apart(out: Path, source: Path | None) -> None:
    """Refuse to write in a model's own folder, or over its file."""
    atomic.check_name(out)
    if source is not None and source.exists() and source.resolve() in (out.resolve(), *out.resolve().parents):
        own = "lies inside the model's own folder" if source.is_dir() else "is the model's own file"
        raise BillhookError(f"{out} {own} {source}: choose another output")
