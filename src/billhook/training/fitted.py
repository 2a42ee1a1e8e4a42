"""The text that a pruned model has seen before it is trained, by its record: what would judge it too kindly."""

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
    seq_len: int = Field(ge=1)
    text_sha256: str
    tokens_sha256: str


class Choice(BaseModel):
    """What a recipe says of them."""

    calibration: str
    seed: int = Field(ge=0, lt=2**63)


class Record(BaseModel):
    """Of billhook.json, what says which text a model has seen."""

    calibration: Calibration
    recipe: Choice


def calibrated_on(
    record: dict[str, Any] | None, texts: Sequence[Text], tokenizer: Any, tick: Tick = quiet
) -> tuple[Windows | None, str]:
    """What a prune has seen, drawn again; all of its text where the windows are no longer the same ones.

    Args:
        record: billhook.json of the pruned model, if there is one.
        texts: that are here already.

    Returns:
        the windows, or None where none were seen or none are found; and the name of the text where it is not found.
    """
    try:
        said = Record.model_validate(record)
    except ValidationError:  # of a model that nothing was calibrated for, or no record of a prune's
        return None, ""
    if not said.calibration.windows:
        return None, ""
    seen = said.calibration
    for text in _candidates(texts, said.recipe.calibration, tick):
        same = text.sha256 == seen.text_sha256
        try:
            found = data.windows(text, tokenizer, seen.seq_len)
            if same:
                drawn = data.windows(text, tokenizer, seen.seq_len, seen.windows + seen.probes, said.recipe.seed)
                return (drawn if drawn.sha256 == seen.tokens_sha256 else found), ""
        except BillhookError:  # too short by another tokenizer
            continue
        if text.name == seen.source:
            return found, ""
    return None, seen.source


def _candidates(texts: Sequence[Text], source: str, tick: Tick) -> Iterator[Text]:
    """Texts that may be the one: those that are here, as one, and what the recipe names, where that is on this machine."""
    yield from texts
    yield data.joined(texts)
    if all(name.strip() == "demo" or Path(name.strip()).expanduser().exists() for name in source.split("+")):
        try:
            yield data.calibration_text(source, tick)
        except BillhookError:
            return
