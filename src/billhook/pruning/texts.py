"""The windows that a prune looks at: to calibrate, and to judge by."""

import hashlib
from dataclasses import dataclass

import torch

from billhook import data
from billhook.checkpoints.load import Opened
from billhook.choices import DATA_FREE_PRESETS
from billhook.pruning import allocation
from billhook.pruning.recipe import Recipe
from billhook.tensors import Probes, Tokens


@dataclass(frozen=True)
class Texts:
    """Windows (windows, length): those to calibrate on, and those to judge by."""

    calibration: Tokens
    probe: Probes


def needs_text(chosen: Recipe) -> bool:
    """Whether anything is measured on text: positions and named layers need none, unless they are patched or trained."""
    reads = chosen.patches or chosen.select == "healed" or bool(chosen.vocab_from)
    return reads or not chosen.chops or weighs_layers(chosen)


def judges(chosen: Recipe) -> bool:
    """Whether the plan is judged by further windows, which the calibration does not see."""
    return (
        weighs_layers(chosen) if chosen.chops else allocation.parse(chosen.allocation).name in ("sensitivity", "auto")
    )


def weighs_layers(chosen: Recipe) -> bool:
    presets = chosen.candidates if chosen.select == "healed" else (chosen.preset,)
    return chosen.chops and not (chosen.drop or chosen.keep or all(name in DATA_FREE_PRESETS for name in presets))


def hashes(texts: Texts) -> dict[str, str]:
    return {
        part: hashlib.sha256(getattr(texts, part).numpy().tobytes()).hexdigest() for part in ("calibration", "probe")
    }


def draw(opened: Opened, chosen: Recipe, text: data.Text) -> tuple[data.Windows, Texts]:
    """The windows to calibrate on, and further ones to judge by where the allocation measures.

    They are drawn in one order whatever their number.
    """
    if not needs_text(chosen):
        nothing = torch.zeros(0, chosen.seq_len, dtype=torch.long)
        return data.Windows("", nothing, 0, "", ""), Texts(nothing, nothing)
    probes = chosen.probes if judges(chosen) else 0
    windows = data.windows(text, opened.tokenizer, chosen.seq_len, chosen.samples + probes, chosen.seed)
    data.check_vocabulary(windows, opened.model, opened.name)
    return windows, Texts(*windows.tokens.split([chosen.samples, probes]))
