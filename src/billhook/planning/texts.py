"""The windows that a prune looks at: to calibrate, and to judge by."""

import hashlib
from dataclasses import dataclass
from typing import Any

import torch

from billhook import data
from billhook.checkpoints.load import Opened
from billhook.planning.recipe import SAMPLES, Recipe
from billhook.tensors import Probes, Tokens

NOWHERE = data.Windows("", torch.zeros(0, 2, dtype=torch.long), 0, "", "")


@dataclass(frozen=True)
class Texts:
    """Windows (windows, length): those to calibrate on, and those to judge by."""

    calibration: Tokens
    probe: Probes
    windows: data.Windows = NOWHERE  # both, with where they come from
    search: Any = None  # what a search reads besides

    @property
    def hashes(self) -> dict[str, str]:
        """SHA-256 of each."""
        return {
            part: hashlib.sha256(getattr(self, part).numpy().tobytes()).hexdigest() for part in ("calibration", "probe")
        }

    def record(self, seq_len: int) -> dict[str, Any]:
        """What a report says of them; `seq_len`: tokens in a window."""
        return {
            "source": self.windows.source,
            "windows": len(self.calibration),
            "probes": len(self.probe),
            "drawn": len(self.windows.tokens),  # more than these where not all were needed
            "windows_available": self.windows.available,
            "seq_len": seq_len,
            "begins_with": list(self.windows.begins_with),
            "text_sha256": self.windows.text_sha256,
            "tokens_sha256": self.windows.sha256,
        }


def draw(opened: Opened, recipe: Recipe, text: data.Text, search: Any = None) -> Texts:
    """The windows to calibrate on, and further ones to judge by where the method does.

    They are drawn in one order whatever their number.
    """
    read = recipe.calibration
    if not recipe.reads:
        nothing = torch.zeros(0, read.seq_len, dtype=torch.long)
        return Texts(nothing, nothing)
    probes = read.probes if recipe.method.judges(recipe) else 0
    least = min(read.samples or SAMPLES, recipe.samples)
    drawn = data.windows(text, opened.tokenizer, read.seq_len, (least + probes, recipe.samples + probes), read.seed)
    data.check_vocabulary(drawn, opened.model, opened.name)
    calibration, probe = drawn.tokens.split([len(drawn.tokens) - probes, probes])
    return Texts(calibration, probe, drawn, search)
