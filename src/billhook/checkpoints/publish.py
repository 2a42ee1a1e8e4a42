"""Write a model's folder: weights, report, model card and page, reloaded and compared before anyone can use them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from billhook.checkpoints import save, verify
from billhook.checkpoints.clients import check
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
    # the check loads the whole model, which an offloaded one may be too large for
    record["loads"] = [] if is_offloaded(model) else [check.check(work, "transformers")]
    atomic.write_text(work / atomic.MARK, records.to_json(record))
    atomic.write_text(work / "README.md", card.model_card(record))
    page.save(work / "report.html", content())
    tick("saving", 2, 2)
