"""The windows that a prune looks at: to calibrate, and to judge by."""

import hashlib
from dataclasses import dataclass, replace
from itertools import chain, zip_longest
from typing import Any

import torch

from billhook import data, demo
from billhook.checkpoints.load import Opened
from billhook.errors import DataError
from billhook.math.overlap import overlapping
from billhook.planning.recipe import SAMPLES, Recipe
from billhook.runtime.progress import Tick
from billhook.tensors import Probes, Tokens

CHARACTERS = 16  # of a text for each token that is drawn from it: enough of it, whatever the tokenizer
REFERENCE = "reference"  # the technical prose that judges where no other text is named
NOWHERE = data.Windows("", torch.zeros(0, 2, dtype=torch.long), 0, "", "")


@dataclass(frozen=True)
class Texts:
    """Windows (windows, length): those to calibrate on, and those to judge by."""

    calibration: Tokens
    probe: Probes
    windows: data.Windows = NOWHERE  # both, with where they come from
    search: Any = None  # what a search reads besides
    elsewhere: data.Windows = NOWHERE  # of another kind of text, to judge by

    @property
    def judges(self) -> Probes:
        """Windows of both kinds to judge by, in turns."""
        both = chain.from_iterable(zip_longest(self.probe, self.elsewhere.tokens))
        return torch.stack([one for one in both if one is not None]) if len(self.elsewhere.tokens) else self.probe

    @property
    def hashes(self) -> dict[str, str]:
        """SHA-256 of each."""
        return {
            part: hashlib.sha256(getattr(self, part).numpy().tobytes()).hexdigest() for part in ("calibration", "probe")
        }

    def record(self, seq_len: int) -> dict[str, Any]:
        """What a report says of them; `seq_len`: tokens in a window."""
        other = self.elsewhere
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
        } | ({"elsewhere": {"source": other.source, "windows": len(other.tokens)}} if len(other.tokens) else {})


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


def with_another_kind(texts: Texts, opened: Opened, recipe: Recipe, source: str, tick: Tick) -> Texts:
    """The same, with as many windows of another text to judge by, or as many as it has: what fits the calibration's
    kind of text best need not be what damages a model least.

    Args:
        source: a text's name, or `reference`: technical prose, none of it where that is shorter than a window.

    Raises:
        BillhookError: the text named cannot be read, is shorter than a window, or is also what is calibrated on.
    """
    if not len(texts.probe):
        return texts
    read = recipe.calibration
    if source == REFERENCE:
        prose = demo.language_reference()[: CHARACTERS * len(texts.probe) * read.seq_len]
        text = data.Text("Python's language reference", prose)
    else:
        text = data.calibration_text(source, tick)
    try:
        drawn = data.windows(text, opened.tokenizer, read.seq_len, (1, len(texts.probe)), read.seed)
    except DataError:
        if source == REFERENCE:
            return texts
        raise
    data.check_vocabulary(drawn, opened.model, opened.name)
    if source != REFERENCE:
        _check_apart(drawn, texts.calibration, source)
    return replace(texts, elsewhere=drawn)


def _check_apart(judges: data.Windows, calibration: Tokens, source: str) -> None:
    leading = len(judges.begins_with)  # special tokens, which all windows share and which make no overlap
    shared = int(overlapping(judges.tokens[:, leading:], calibration[:, leading:]).sum())
    if shared:
        raise DataError(
            f"--judge {source}: {shared} of its {len(judges.tokens)} windows are also in what is calibrated on, and would "
            "judge their own fit: name another text, or own"
        )
