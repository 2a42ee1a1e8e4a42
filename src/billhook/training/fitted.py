"""The text that a pruned model was calibrated on, by its record: held out, it would judge the model too kindly."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field, ValidationError

from billhook import data
from billhook.data import Text, Windows
from billhook.errors import BillhookError
from billhook.runtime.progress import Tick, quiet


class Calibration(BaseModel):
    """The windows that a prune fitted its weights on, and those that its allocation judged by."""

    source: str
    windows: int = Field(ge=0)
    probes: int = Field(default=0, ge=0)
    drawn: int | None = Field(default=None, ge=0)  # None: as many as windows and probes
    seq_len: int = Field(ge=1)
    text_sha256: str
    tokens_sha256: str


class Recipe(BaseModel):
    """The part of a recipe that decides which windows these are."""

    calibration: str
    seed: int = Field(ge=0, lt=2**63)


class Record(BaseModel):
    """The part of billhook.json that says which text a model has seen."""

    calibration: Calibration
    recipe: Recipe


def calibrated_on(
    record: dict[str, Any] | None, texts: Sequence[Text], tokenizer: Any, tick: Tick = quiet
) -> tuple[Windows | None, str]:
    """The windows that a prune has seen, drawn again; its whole text where the same windows cannot be drawn.

    Args:
        record: billhook.json of the pruned model, if there is one.
        texts: texts that are loaded already.

    Returns:
        the windows, or None where none were seen or none are found; and the name of the text where it is not found.
    """
    try:
        prune = Record.model_validate(record)
    except ValidationError:  # nothing was calibrated for this model, or the record is not a prune's
        return None, ""
    if not prune.calibration.windows:
        return None, ""
    seen = prune.calibration
    for text in _candidates(texts, prune.recipe.calibration, tick):
        try:
            whole = data.windows(text, tokenizer, seen.seq_len)
            if text.sha256 == seen.text_sha256:
                count = seen.drawn or seen.windows + seen.probes
                drawn = data.windows(text, tokenizer, seen.seq_len, count, prune.recipe.seed)
                return (drawn if drawn.sha256 == seen.tokens_sha256 else whole), ""
        except BillhookError:  # the text is too short by this tokenizer
            continue
        if text.name == seen.source:
            return whole, ""
    return None, seen.source


def _candidates(texts: Sequence[Text], source: str, tick: Tick) -> Iterator[Text]:
    """Texts that the prune may have read: those loaded, these joined, and the recipe's if it is on this machine."""
    yield from texts
    yield data.joined(texts)
    if all(name.strip() in data.BUNDLED or Path(name.strip()).expanduser().exists() for name in source.split("+")):
        try:
            yield data.calibration_text(source, tick)
        except BillhookError:
            return
