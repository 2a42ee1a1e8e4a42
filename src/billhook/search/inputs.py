"""What a search reads: the calibration text, the pool of windows that are drawn from it, and the validation windows."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from billhook import data
from billhook.checkpoints.load import Opened
from billhook.data import Text
from billhook.errors import BillhookError
from billhook.math.overlap import overlapping
from billhook.runtime.progress import Tick, quiet
from billhook.runtime.special_tokens import special_ids
from billhook.search import pool
from billhook.search.pool import Pool
from billhook.search.settings import SearchSettings
from billhook.search.validation import Validation, split

HELD_BACK = 0.2  # share of each calibration text, at its end, that validates where no validation text is given


@dataclass(frozen=True)
class SearchTexts:
    """The texts that calibrate, and the windows that candidates are tried on."""

    calibration: tuple[Text, ...]
    validation: Validation
    names: tuple[str, ...]  # names of the validation texts


@dataclass(frozen=True)
class Inputs:
    """What AdaPruner's search reads."""

    texts: SearchTexts
    pool: Pool
    samples: tuple[str, ...]  # the pool's windows, as text

    @property
    def calibration(self) -> Text:
        """The text that finalists and the winner are restored on."""
        return data.joined(self.texts.calibration)


def read_inputs(opened: Opened, chosen: SearchSettings, tick: Tick = quiet) -> Inputs:
    """The pool and the windows that candidates are tried on, from the recipe's texts.

    Raises:
        BillhookError: a text is too short, or validation and calibration share windows (says how many).
    """
    texts = read_texts(opened, chosen, tick)
    embedding = opened.model.get_input_embeddings().weight.detach()
    drawn = pool.draw(
        texts.calibration,
        opened.tokenizer,
        embedding,
        chosen.pool,
        chosen.pool_len,
        chosen.clusters,
        chosen.seed,
    )
    samples = tuple(map(opened.tokenizer.decode, drawn.tokens[:, len(drawn.begins_with) :]))
    return Inputs(texts, drawn, samples)


def read_texts(opened: Opened, chosen: SearchSettings, tick: Tick = quiet) -> SearchTexts:
    """The texts that calibrate, and the windows that candidates are tried on.

    Raises:
        BillhookError: as `read_inputs`.
    """
    calibration: Sequence[Text] = data.texts(chosen.calibration, tick)
    if chosen.validation:
        validation = data.evaluation_texts(chosen.validation, tick)
    else:
        calibration, validation = zip(*(_without_its_end(text) for text in calibration), strict=True)
    leading = len(special_ids(opened.tokenizer)[0])  # special tokens, which all windows share and which make no overlap
    windows = torch.cat([data.windows(text, opened.tokenizer, chosen.seq_len).tokens for text in validation])
    calibration_tokens = [
        data.windows(text, opened.tokenizer, chosen.pool_len).tokens[:, leading:].flatten() for text in calibration
    ]
    shared = overlapping(windows[:, leading:], torch.cat(calibration_tokens)[None])
    if chosen.validation and shared.any():
        raise BillhookError(
            f"{int(shared.sum())} of the {len(windows)} windows of --validation are also in the calibration text, "
            "and would judge what they have calibrated: name another"
        )
    # without --validation the overlap is passages that a text repeats: these windows are left out
    split_windows = split(windows[~shared], chosen.seed, leading)
    return SearchTexts(tuple(calibration), split_windows, tuple(text.name for text in validation))


def _without_its_end(text: Text) -> tuple[Text, Text]:
    """A text without its last fifth, and that fifth."""
    end = int(len(text.text) * (1 - HELD_BACK))
    return replace(text, text=text.text[:end]), Text(f"the last fifth of {text.name}", text.text[end:])
