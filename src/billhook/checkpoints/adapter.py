"""A stock PEFT adapter as an output: low-rank adapters beside a base that stays as it is, reloaded and compared.

Where llama.cpp has an architecture for the base, the same adapters lie beside it as a GGUF.
"""

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from billhook.checkpoints import belongings, load
from billhook.checkpoints.gguf import lora
from billhook.checkpoints.result import Result
from billhook.errors import ModelError
from billhook.reports import card, page, records
from billhook.runtime import atomic
from billhook.runtime.progress import Tick, quiet
from billhook.runtime.quiet import quiet_transformers

FILE = "adapter.gguf"


@dataclass
class Adapted(Result):
    """The model of the folder `source` with adapters; what is written holds these alone, and names their base."""

    def write(self, work: Path, tick: Tick = quiet) -> None:
        """Fill the existing folder `work` with an adapter that stock peft loads, and verify it on the base.

        Raises:
            BillhookError: what was written does not come back equal.
        """
        tick("saving", 0, 2)
        with quiet_transformers():
            self.model.save_pretrained(work)
        tick("saving", 1, 2)
        base = load.open_model(str(self.source), device="cpu", dtype="float32", packed=True).model
        told = {"base": str(self.source), **self._for_llama_cpp(base, work / FILE)}
        self.record |= {"adapter": told, "verified": self._verified(base, work), "loads": []}
        self.record.setdefault("license", belongings.said_of(self.source, "license"))
        atomic.write_text(work / atomic.MARK, records.to_json(self.record))
        atomic.write_text(work / "README.md", card.model_card(self.record))
        page.save(work / "report.html", self.page())
        self.write_beside(work)
        tick("saving", 2, 2)

    def _for_llama_cpp(self, base: Any, path: Path) -> dict[str, Any]:
        """Write the adapters as a GGUF, too: the name of the file, or why there is none."""
        try:
            lora.write_lora(base, lora.factors(self.model), path)
        except ModelError as error:
            return {"gguf": None, "why": str(error)}
        return {"gguf": path.name}

    @torch.no_grad()
    def _verified(self, base: Any, work: Path) -> dict[str, Any]:
        """Put the written adapter on the base, which is opened anew, and compare logits with the model in memory."""
        import peft

        with quiet_transformers(), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # as in training.trainables
            again = peft.PeftModel.from_pretrained(base, str(work)).eval()
        ids = torch.arange(min(64, base.config.vocab_size))[None]
        if not torch.equal(again(input_ids=ids).logits, self.model.eval()(input_ids=ids).logits):
            raise ModelError(f"{work} did not survive reloading: logits differ from the model in memory")
        return {"client": f"peft {peft.__version__}", "logits": "equal"}
