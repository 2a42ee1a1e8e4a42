"""The numbers that a recipe file may expect of its result."""

from pathlib import Path

from billhook import data
from billhook.checkpoints import load
from billhook.evaluation.perplexity import perplexity
from billhook.models import sizes
from billhook.models.experts import fused
from billhook.runtime.progress import Tick, quiet


def measure(
    path: Path, seq_len: int, device: str = "auto", dtype: str = "auto", tick: Tick = quiet
) -> dict[str, float]:
    """Parameters, and perplexity on the demo's evaluation texts in windows of `seq_len` tokens."""
    opened = load.open_model(str(path), device=device, dtype=dtype, tick=tick)
    numbers: dict[str, float] = {"parameters": sizes.total_parameters(opened.model)}
    with fused(opened.model):
        for text in data.evaluation_texts(["demo"], tick):
            windows = data.windows(text, opened.tokenizer, seq_len)
            numbers[f"perplexity on {text.name}"] = perplexity(opened.model, windows, tick).perplexity
    return numbers
