"""A model becomes a folder: weights, report, model card and page, reloaded and compared before anyone may have it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from billhook import atomic, clients, report, saving
from billhook.modes import evaluating
from billhook.pages import page
from billhook.paging import is_paged
from billhook.progress import Tick, quiet


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
        record: what billhook.json will hold; gains what was verified and what loads it.
        content: of report.json, once the record is complete.

    Raises:
        BillhookError: what was written does not come back equal.
    """
    tick("saving", 0, 2)
    saving.save(model, tokenizer, work, source)
    tick("saving", 1, 2)
    with evaluating(model):
        record["verified"] = clients.verify(work, model)
    record["loads"] = [] if is_paged(model) else [clients.check(work, "transformers")]  # which loads it whole
    atomic.write_text(work / atomic.MARK, report.to_json(record))
    atomic.write_text(work / "README.md", report.model_card(record))
    page.save(work / "report.html", content())
    tick("saving", 2, 2)
