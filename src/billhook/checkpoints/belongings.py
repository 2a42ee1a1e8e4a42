"""Files of a model's folder that belong to its tokenizer or processor: copied, or named in a warning."""

import logging
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

LOG = logging.getLogger("billhook")
PROCESSOR = re.compile(r"processor|audio_tokenizer")  # names of files that read images, sound and video
# parts of names of tokenizer files, which may have prefixes and suffixes (tokenizer.model.v3, bpe.codes, qwen.tiktoken)
TOKENIZER = re.compile(
    rf"{PROCESSOR.pattern}|token|vocab|merges|template|\.model$|\.model\.v\d|\bbpe\b|spiece|sentencepiece"
)
KEPT_APART = re.compile(r"\.(pyc?|pkl|pickle|safetensors|pth?|ckpt|h5|gguf|onnx|msgpack)$")  # code, pickles, weights
TEMPLATES = "additional_chat_templates"  # transformers' folder of chat templates that have names


def carry(source: Path, to: Path, named: Iterable[str] = ()) -> None:
    """Copy the tokenizer's and processor's files from folder `source` into folder `to`; warn of what is left out.

    Args:
        named: names under which the tokenizer's class stores files of its own.
    """
    for file in _belonging(source, TOKENIZER, set(named)):
        if file.is_file() and not KEPT_APART.search(file.name):
            shutil.copyfile(file, to / file.name)
    templates = [file for file in sorted((source / TEMPLATES).glob("*.jinja")) if file.is_file()]
    for file in templates:
        (to / TEMPLATES).mkdir(exist_ok=True)
        shutil.copyfile(file, to / TEMPLATES / file.name)
    _warn_of_left(source, to, TOKENIZER)


def leave(source: Path, to: Path) -> None:
    """Warn of the processor's files, which are left out where the tokenizer is not that of `source`."""
    _warn_of_left(source, to, PROCESSOR)


def _belonging(source: Path, names: re.Pattern[str], named: Iterable[str] = ()) -> Iterator[Path]:
    return (file for file in sorted(source.iterdir()) if names.search(file.name) or file.name in named)


def _warn_of_left(source: Path, to: Path, names: re.Pattern[str]) -> None:
    left = [file.name + "/" * file.is_dir() for file in _belonging(source, names) if not (to / file.name).exists()]
    if left:
        LOG.warning(
            "%s: %s left out: no part of a tokenizer that transformers reads by itself; copy what you need",
            *(source, ", ".join(map(ascii, left)) + (" is" if len(left) == 1 else " are")),
        )


def said_of(source: Path | None, key: str) -> str | None:
    """What a checkpoint's own model card says of itself, if it has one: its `license`, its `pipeline_tag`."""
    card = source and source / "README.md"
    if not card or not card.is_file():
        return None
    head = card.read_text(errors="replace").partition("---\n")[2].partition("\n---")[0]
    found = re.search(rf"^{key}:\s*([\w.-]+)\s*$", head, re.M)
    return found[1] if found else None
