"""Text from files, folders, hub data sets or the demo, cut into windows of tokens."""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from billhook import demo
from billhook.errors import DataError
from billhook.runtime.progress import Tick, quiet
from billhook.runtime.special_tokens import begin_token_names, special_ids
from billhook.runtime.text_files import READERS, is_text, name_of, read_folder, read_text
from billhook.tensors import Tokens

BUNDLED = {"demo": demo.calibration_text, "mixed": demo.mixed_text}  # texts that need no file
HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+){0,2}")


@dataclass(frozen=True)
class Text:
    """One text and the name it goes by in tables."""

    name: str
    text: str

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.text.encode()).hexdigest()


@dataclass(frozen=True)
class Windows:
    """Windows of tokens, and what a reader needs to know where they come from."""

    source: str
    tokens: Tokens
    available: int  # full windows that the text holds
    text_sha256: str
    sha256: str  # digest of the chosen token ids, in order
    bytes: tuple[int, ...] = ()  # bytes of text behind each window's predicted tokens; empty unless asked for
    begins_with: tuple[str, ...] = ()  # names of special tokens at the start of every window, part of its length

    @property
    def first(self) -> int:
        """Position of the first predicted token:
        after the tokenizer's special tokens, or else after the first token."""
        return max(1, len(self.begins_with))


def calibration_text(source: str, tick: Tick = quiet) -> Text:
    """The text to calibrate on; several names are joined by +.

    `demo` has articles that the demo does not evaluate on, `mixed` these and technical prose."""
    return joined(texts(source, tick))


def texts(source: str, tick: Tick = quiet) -> list[Text]:
    """The texts to calibrate on: `source` is one name, or several joined by +."""
    single = "+" not in source or Path(os.path.expanduser(source)).exists()
    names = [source] if single else [name.strip() for name in source.split("+")]
    return [Text(name, BUNDLED[name](tick)) if name in BUNDLED else _read(name) for name in names]


def joined(parts: Sequence[Text]) -> Text:
    """Several texts as one."""
    return Text("+".join(text.name for text in parts), "\n\n".join(text.text for text in parts))


def evaluation_texts(sources: Iterable[str], tick: Tick = quiet) -> list[Text]:
    """The texts to evaluate on.

    `demo` stands for two that nothing is calibrated on, `reference` for technical prose that `mixed` does not hold."""
    texts: list[Text] = []
    for source in sources:
        if source == "demo":
            texts += [Text(*item) for item in demo.evaluation_texts(tick).items()]
        elif source == "reference":
            texts.append(Text(source, demo.language_reference(unseen=True)))
        else:
            texts.append(_read(source))
    return texts


def windows(
    text: Text,
    tokenizer: Any,
    length: int,
    samples: int | tuple[int, int] | None = None,
    seed: int = 0,
    spans: bool = False,
) -> Windows:
    """Non-overlapping windows of `length` tokens; the remainder is dropped.

    If the tokenizer begins texts with a token (BOS), every window begins with it, since a model trained so works badly
    without; the window then holds fewer tokens of text.  End tokens are never added.

    Args:
        samples: how many windows to draw, by `seed`; of two numbers at least the first, and up to the second where the
            text has them; None takes all of them, in order.
        spans: also count the bytes of text in each window, which takes some memory for a long text.

    Raises:
        BillhookError: the text is shorter than one window, or has fewer windows than `samples`.
    """
    located = spans and tokenizer.is_fast
    encoded = tokenizer(text.text, add_special_tokens=False, verbose=False, return_offsets_mapping=located)
    ids = torch.tensor(encoded.input_ids, dtype=torch.long)
    leading = torch.tensor(special_ids(tokenizer)[0], dtype=torch.long)
    room = length - len(leading)
    if room < 1:
        raise DataError(
            f"a window of {length} tokens has no room for text after the {len(leading)} that the tokenizer begins "
            "with: raise --seq-len"
        )
    count = len(ids) // room
    if not count:
        raise DataError(
            f"text {text.name!r} has {len(ids)} tokens, less than one window of {length}: use more text or a smaller "
            "--seq-len"
        )
    if isinstance(samples, tuple):
        samples = min(samples[1], max(samples[0], count))
    if samples is not None and samples > count:
        raise DataError(
            f"text {text.name!r} has {count} windows of {length} tokens, fewer than the {samples} asked for: "
            "lower --samples"
        )
    tokens, sizes = ids[: count * room].view(count, room), ()
    if spans:
        ends = [end for _, end in encoded.offset_mapping] if located else None
        sizes = _window_bytes(text.text, tokenizer, tokens, ends, 0 if len(leading) else 1)
    tokens = torch.cat([leading.expand(count, -1), tokens], 1) if len(leading) else tokens
    if samples is not None:
        drawn = torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:samples]
        tokens, sizes = tokens[drawn], tuple(sizes[n] for n in drawn.tolist()) if sizes else ()
    sha256 = hashlib.sha256(tokens.numpy().tobytes()).hexdigest()
    return Windows(text.name, tokens, count, text.sha256, sha256, sizes, begin_token_names(tokenizer))


def fingerprint(tokenizer: Any) -> str:
    """A digest that is the same for tokenizers with the same vocabulary and start tokens.

    Perplexities per token compare between models whose tokenizers have the same digest.
    """
    vocabulary, leading = sorted(tokenizer.get_vocab().items()), special_ids(tokenizer)[0]
    text = json.dumps([vocabulary, leading] if leading else vocabulary)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _window_bytes(text: str, tokenizer: Any, tokens: Tokens, ends: list[int] | None, first: int) -> tuple[int, ...]:
    """UTF-8 bytes of text behind each row's tokens.

    A token's text begins where the token before ends, so that characters which a tokenizer skips count as well.

    Args:
        ends: position in `text` where each token ends, in characters; None if the tokenizer, in Python, gives none.
        first: 0 or 1, the first token of a row that counts.
    """
    length = tokens.shape[1]
    if ends is None:
        return tuple(len(tokenizer.decode(row[first:]).encode()) for row in tokens)
    before = [0, *ends]
    rows = range(0, len(tokens) * length, length)
    return tuple(len(text[before[n + first] : before[n + length]].encode()) for n in rows)


def check_vocabulary(windows: Windows, model: Any, name: str) -> None:
    """Raise BillhookError if the text has token ids that the model has no embedding for."""
    highest, size = int(windows.tokens.max()), model.get_input_embeddings().num_embeddings
    if highest >= size:
        raise DataError(
            f"the tokenizer of {name} gives id {highest}, beyond the model's vocabulary of {size}: it belongs to "
            "another model; copy the right one"
        )


def _read(source: str) -> Text:
    kinds = f"give a text file ({', '.join(READERS)}, each also .gz), a folder of them, a hub data set or 'demo'"
    if not source.strip():
        raise DataError(f"no text named: {kinds}")
    path = Path(os.path.expanduser(source))
    if path.is_dir():
        return Text(path.name, read_folder(path))
    if path.exists():
        return Text(name_of(path), read_text(path))
    if is_text(path) or source.startswith(("/", ".", "~")) or not HUB_NAME.fullmatch(source):
        raise DataError(f"text {source} does not exist: {kinds}")
    return Text(source, _hub(source))


def _hub(source: str) -> str:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise DataError(
            f"text {source!r} is no file here; to read it as a hub data set, install the extra: "
            "pip install 'billhook[data]'"
        ) from error
    name, *options = source.split(":")
    try:
        rows = load_dataset(name, options[0] if options else None, split=options[1] if len(options) > 1 else "train")
    except Exception as error:  # the hub client raises dozens of kinds, offline ones among them
        first = str(error).strip().splitlines()
        raise DataError(
            f"text {source!r} is no file here, and no hub data set could be loaded by that name "
            f"({first[0] if first else error!r})"
        ) from error
    if "text" not in (rows.column_names or []):
        raise DataError(f"hub data set {source!r} has no column 'text' (it has {', '.join(rows.column_names or [])})")
    return "\n\n".join(rows["text"])
