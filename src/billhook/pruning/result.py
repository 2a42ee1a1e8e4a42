"""What a prune comes to: a model, its tokenizer and a report, and the folder that they become."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from billhook.checkpoints import belongings
from billhook.checkpoints.publish import publish
from billhook.reports import commands, records
from billhook.runtime import atomic
from billhook.runtime.outputs import check_out
from billhook.runtime.progress import Tick, quiet


@dataclass
class Result:
    """A pruned model, its tokenizer, and the report of what it cost."""

    model: Any
    tokenizer: Any
    report: dict[str, Any]
    source: Path | None = None  # the folder the model came from
    trimmed: bool = False  # whether the tokenizer is no longer the source's
    kept: Path | None = None  # the folder that has it layer by layer, which is of no more use once it is written

    def save(self, path: str | os.PathLike[str], overwrite: bool = False) -> Path:
        """Write a plain checkpoint with report and model card, reload it with stock transformers and compare.

        Raises:
            BillhookError: `path` is taken, holds the source model, cannot be written, or what was written does not come
                back equal.  In each case nothing is left behind.
        """
        out = Path(path)
        check_out(out, self.source, overwrite)
        with atomic.folder(out, overwrite) as work:
            self.write(work)
        return out

    def page(self, measured: Sequence[dict[str, Any]] = ()) -> dict[str, Any]:
        """The content of report.json; `measured`: the unpruned and the pruned model, of `evaluate.side_by_side`."""
        found = self.report
        share = (
            f"{zeros['sparsity']:.0%} zeros"
            if (zeros := found.get("zeros"))
            else f"{found['sizes']['achieved_ratio']:.0%} of its decoder pruned"
        )
        title = f"{found['parent']}, {share} by {found['recipe']['method']}"
        where = records.conditions(self.model, commands.command(found), sum(found["seconds"].values()))
        reference = measured[0]["name"] if measured else None
        return records.assemble("prune", title, where, cut=found, models=measured, reference=reference)

    def write(self, work: Path, tick: Tick = quiet) -> None:
        """Fill the existing folder `work` and verify it."""
        source = None if self.trimmed else self.source
        publish(self.model, self.tokenizer, source, self.report, self.page, work, tick)
        if self.trimmed and self.source:
            belongings.leave(self.source, work)
