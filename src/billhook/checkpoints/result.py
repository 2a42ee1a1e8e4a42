"""What a prune or a training comes to: a model, its tokenizer and a report, and the folder that they become."""

import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from billhook.checkpoints import belongings, save, verify
from billhook.checkpoints.clients import check
from billhook.checkpoints.report import Report
from billhook.errors import BillhookError, first_line
from billhook.models.greedy import greedy_tokens
from billhook.models.modes import evaluation_mode
from billhook.reports import card, commands, page, records
from billhook.runtime import atomic
from billhook.runtime.offload import is_offloaded
from billhook.runtime.outputs import check_out
from billhook.runtime.progress import Tick, quiet


@dataclass
class Result:
    """A model that was pruned, trained or both, its tokenizer, and the record of what that cost."""

    model: Any
    tokenizer: Any
    record: dict[str, Any]  # the content of billhook.json, as plain data
    source: Path | None = None  # the folder the model came from
    trimmed: bool = False  # whether the tokenizer is no longer the source's
    kept: Path | None = None  # the folder that has it layer by layer, which is of no more use once it is written
    beside: Mapping[str, str] = field(default_factory=dict)  # what else is written with it: content of files, by name

    @property
    def report(self) -> Report:
        """What was done to the model, and what it cost."""
        return Report.of(self.record)

    @property
    def healing(self) -> dict[str, Any]:
        """The record of the last training."""
        return self.record["recovery"][-1]

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

    def save_pretrained(self, save_directory: str | os.PathLike[str]) -> Path:
        """`save`, by the name that it has in transformers."""
        return self.save(save_directory)

    def push_to_hub(
        self, repo_id: str, *, private: bool | None = None, token: str | None = None, endpoint: str | None = None
    ) -> str:
        """Write the checkpoint, verified, to a repository of the Hugging Face hub, which is made if it is missing.

        Args:
            repo_id: owner/name.
            endpoint: another hub than huggingface.co.

        Returns:
            the address of the commit.

        Raises:
            BillhookError: as `save`; the hub refuses.
        """
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HfHubHTTPError

        hub = HfApi(endpoint=endpoint, token=token)
        with tempfile.TemporaryDirectory() as folder:
            out = self.save(Path(folder) / "model")
            try:
                hub.create_repo(repo_id, private=private, exist_ok=True)
                said = f"{self.record.get('parent') or repo_id}, made by billhook"
                return str(hub.upload_folder(repo_id=repo_id, folder_path=out, commit_message=said).commit_url)
            except HfHubHTTPError as error:
                raise BillhookError(f"{repo_id}: the hub refuses: {first_line(error)}") from error

    def generate(self, prompt: str = "Once upon a time", new_tokens: int = 48) -> str:
        """What the model writes after a prompt, greedily: a first look."""
        ids = self.tokenizer(prompt, return_tensors="pt").input_ids.to(self.model.device)
        with evaluation_mode(self.model):
            return self.tokenizer.decode(greedy_tokens(self.model, ids, new_tokens)[0], skip_special_tokens=True)

    def write(self, work: Path, tick: Tick = quiet) -> None:
        """Fill the existing folder `work` and verify it, before anyone can use it.

        Raises:
            BillhookError: what was written does not come back equal.
        """
        self._fill(work, tick)
        if self.trimmed and self.source:
            belongings.leave(self.source, work)

    def _fill(self, work: Path, tick: Tick) -> None:
        tick("saving", 0, 2)
        for key in ("license", "pipeline_tag"):
            self.record.setdefault(key, belongings.said_of(self.source, key))
        save.save(self.model, self.tokenizer, work, None if self.trimmed else self.source)
        tick("saving", 1, 2)
        with evaluation_mode(self.model):
            self.record["verified"] = verify.verify(work, self.model)
        # the check loads the whole model, which an offloaded one may be too large for
        self.record["loads"] = [] if is_offloaded(self.model) else [check.check(work, "transformers")]
        atomic.write_text(work / atomic.MARK, records.to_json(self.record))
        atomic.write_text(work / "README.md", card.model_card(self.record))
        page.save(work / "report.html", self.page())
        self.write_beside(work)
        tick("saving", 2, 2)

    def write_beside(self, work: Path) -> None:
        """Write the files that belong beside the model."""
        for name, content in self.beside.items():
            atomic.write_text(work / name, content)

    def page(self, measured: Sequence[dict[str, Any]] = ()) -> dict[str, Any]:
        """The content of report.json; `measured`: the unpruned and the pruned model, of `evaluate.side_by_side`."""
        report = self.record
        cut = report if "cuts" in report else None
        if report.get("recovery"):
            healing, kind = self.healing, "recover"
            title = f"{healing['student']}, trained on {healing['kept_tokens']:,} tokens"
            command, seconds = commands.recover_command(healing), healing["seconds"]
        else:
            healing, kind, command, seconds = None, "prune", report["command"], report["seconds"]
            share = f"{report['sizes']['achieved_ratio']:.0%} of its decoder pruned"
            share = f"{report['zeros']['sparsity']:.0%} zeros" if report.get("zeros") else share
            title = f"{report['parent']}, {share} by {report['recipe']['method']}"
        where = records.conditions(self.model, command, sum(seconds.values()))
        reference = measured[0]["name"] if measured else None
        return records.assemble(kind, title, where, cut=cut, models=measured, reference=reference, healing=healing)
