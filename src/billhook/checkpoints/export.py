"""Carry a model to another runtime: as a GGUF file, or as a checkpoint folder."""

from pathlib import Path
from typing import Any

from billhook.checkpoints import save, verify
from billhook.checkpoints.clients import check
from billhook.checkpoints.formats import Wanted
from billhook.checkpoints.gguf.write import write_gguf
from billhook.checkpoints.load import Opened
from billhook.checkpoints.shards import read_json
from billhook.models import layout
from billhook.models.stock_shapes import merge, settle_biases
from billhook.models.surgery import cast
from billhook.reports import records
from billhook.runtime import atomic
from billhook.runtime.progress import Tick

MERGED = "{} weights are back in stock shapes: what was cut of them saves nothing here"


def export(opened: Opened, to: Path, wanted: Wanted, tick: Tick) -> dict[str, Any]:
    """Write a model, which is opened in float32, as `wanted`; the file or folder `to` appears whole or not at all.

    Returns:
        what was written; of a GGUF, what `write_gguf` says.

    Raises:
        BillhookError: the format cannot hold the model, or it cannot be written.
    """
    merged = {"merged": MERGED.format(merge(opened.model))} if wanted.merge else {}
    if wanted.format == "gguf":
        kind = wanted.quantize or "F16"
        return merged | write_gguf(opened.model, opened.tokenizer, to, kind, tick, overwrite=wanted.overwrite)
    if wanted.merge:
        settle_biases(opened.model)
    with atomic.folder(to, wanted.overwrite) as work:
        record = merged | _write_folder(opened, work, tick)
        atomic.write_text(work / atomic.MARK, records.to_json(record))
    return record


def _write_folder(opened: Opened, work: Path, tick: Tick) -> dict[str, Any]:
    """Fill a folder, and verify it."""
    tick("saving", 0, 1)
    model = opened.model
    cast(model, opened.dtype)
    save.save(model, opened.tokenizer, work, opened.folder)
    record = {
        "parent": opened.name,
        "model_type": read_json(work / "config.json", opened.name)["model_type"],
        "layout": layout.layout_of(model),
        "verified": verify.verify(work, model),
        "loads": [check.check(work, "transformers")],
        "bytes": save.stored_bytes(work),
        "versions": records.versions(),
    }
    tick("saving", 1, 1)
    return record
