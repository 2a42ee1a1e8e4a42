"""What lies in a model's folder and belongs to its tokenizer or processor: it goes along, or a line says what does not."""

import logging
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

LOG = logging.getLogger("billhook")
PROCESSOR = re.compile(r"processor|audio_tokenizer")  # what reads images, sound and video beside the text
OWN = (
    re.compile(  # names, of which some have others before or behind them (tokenizer.model.v3, bpe.codes, qwen.tiktoken)
        rf"{PROCESSOR.pattern}|token|vocab|merges|template|\.model$|\.model\.v\d|\bbpe\b|spiece|sentencepiece"
    )
)
KEPT_APART = re.compile(r"\.(pyc?|pkl|pickle|safetensors|pth?|ckpt|h5|gguf|onnx|msgpack)$")  # code, pickles, weights
TEMPLATES = "additional_chat_templates"  # transformers' folder of those that have names


def carry(source: Path, to: Path, named: Iterable[str] = ()) -> None:
    """Copy what belongs to the tokenizer or processor of the folder `source` into the folder `to`, as it is; say what is left out.

    Args:
        named: files that belong to it under any name, as the tokenizer's class calls its own.
    """
    for file in _belonging(source, OWN, set(named)):
        if file.is_file() and not KEPT_APART.search(file.name):
            shutil.copyfile(file, to / file.name)
    templates = [one for one in sorted((source / TEMPLATES).glob("*.jinja")) if one.is_file()]
    for file in templates:
        (to / TEMPLATES).mkdir(exist_ok=True)
        shutil.copyfile(file, to / TEMPLATES / file.name)
    _say_left(source, to, OWN)


def leave(source: Path, to: Path) -> None:
    """Say what of the processor is left out where the tokenizer is another than that of `source`."""
    _say_left(source, to, PROCESSOR)


def _belonging(source: Path, names: re.Pattern[str], named: Iterable[str] = ()) -> Iterator[Path]:
    return (one for one in sorted(source.iterdir()) if names.search(one.name) or one.name in named)


def _say_left(source: Path, to: Path, names: re.Pattern[str]) -> None:
    left = [one.name + "/" * one.is_dir() for one in _belonging(source, names) if not (to / one.name).exists()]
    if left:
        LOG.warning(
            "%s: %s left out: no part of a tokenizer that transformers reads by itself; copy what you need",
            *(source, ", ".join(map(ascii, left)) + (" is" if len(left) == 1 else " are")),
        )
