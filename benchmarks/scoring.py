"""What the recovery benchmarks share: a model's losses on several texts, and how a table says them."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from billhook import data
from billhook.checkpoints import load
from billhook.evaluation import perplexity
from billhook.runtime.precision import autocast_dtype, computing

Losses = Mapping[str, Sequence[float]]  # mean nats a token of every window, by text


class Scoring:
    """The first `windows` windows of 512 tokens of every text, on the CPU, matrix products in `precision`."""

    def __init__(self, texts: Sequence[str], windows: int, precision: str) -> None:
        self.texts, self.windows = data.evaluation_texts(texts), windows
        self.autocast = autocast_dtype(precision, torch.device("cpu"))

    @property
    def heads(self) -> str:
        return " | ".join(text.name for text in self.texts)

    def of(self, name: str) -> dict[str, list[float]]:
        """A checkpoint's losses."""
        opened = load.open_model(name, device="cpu", dtype="float32")
        return self(opened.model, opened.tokenizer)

    def __call__(self, model: Any, tokenizer: Any) -> dict[str, list[float]]:
        found = {}
        with computing(torch.device("cpu"), self.autocast):
            for text in self.texts:
                windows = data.windows(text, tokenizer, 512)
                windows = replace(windows, tokens=windows.tokens[: self.windows])
                found[text.name] = list(perplexity.perplexity(model, windows).window_losses)
        return found


def measured(losses: Losses, dense: Losses) -> list[dict[str, object]]:
    """What `cells` says, as rows of a table of results: a text each."""
    rows = []
    for text, before in dense.items():
        factor, error = perplexity.paired(before, losses[text])
        judged = {"perplexity": perplexity.perplexity_of(losses[text]), "factor": factor, "standard_error": error}
        rows.append({"text": text, **judged})
    return rows


def cells(losses: Losses, dense: Losses) -> str:
    """Perplexities with their factor to the unpruned model's, ± one standard error over pairs of windows."""
    said = []
    for text, before in dense.items():
        factor, error = perplexity.paired(before, losses[text])
        mean = perplexity.perplexity_of(losses[text])
        said.append(f"{mean:.4g} (×{factor:.4g} ± {error:.2g})")
    return " | ".join(said)
