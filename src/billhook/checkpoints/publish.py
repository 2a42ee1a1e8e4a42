"""Write a model's folder: weights, report, model card and page, reloaded and compared before anyone can use them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from billhook.checkpoints import save, verify
from billhook.checkpoints.clients import check
from billhook.errors import BillhookError
from billhook.models.modes import evaluation_mode
from billhook.reports import card, page, records
from billhook.runtime import atomic
from billhook.runtime.offload import is_offloaded
from billhook.runtime.progress import Tick, quiet


def publish(
    model: Any,
    tokenizer: Any,
    source: Path | None,
    record: dict[str, Any],
    content: Callable[[], dict[str, Any]],
    work: Path,
    tick: Tick = quiet,
) -> None:
    """Fill the existing folder `work` and verify it.

    Args:
        source: the folder whose tokenizer files are copied; None writes them anew.
        record: the content of billhook.json, to which the verification and the clients that load the folder are added.
        content: makes the content of report.json, once the record is complete.

    Raises:
        BillhookError: what was written does not come back equal.
    """
    tick("saving", 0, 2)
    save.save(model, tokenizer, work, source)
    tick("saving", 1, 2)
    with evaluation_mode(model):
        record["verified"] = verify.verify(work, model)
    record["loads"] = (
        [] if is_offloaded(model) else [check.check(work, "transformers")]
    )  # the check would load the whole model
    atomic.write_text(work / atomic.MARK, records.to_json(record))
    atomic.write_text(work / "README.md", card.model_card(record))
    page.save(work / "report.html", content())
    tick("saving", 2, 2)


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
        fault = "lies inside the model's own folder" if source.is_dir() else "is the model's own file"
        raise BillhookError(f"{out} {fault} {source}: choose another output")
