"""The windows that training reads, in which order, and those that judge it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from billhook import data
from billhook.data import Windows
from billhook.errors import BillhookError
from billhook.progress import Tick, quiet
from billhook.tensors import Tokens

HELD_OUT = 8  # windows of each text to judge by; those of the training text are kept from training


@dataclass(frozen=True)
class Texts:
    """What is trained on and what is judged by."""

    names: tuple[str, ...]
    sha256: tuple[str, ...]
    train: Tokens  # windows in the order drawn
    judged: tuple[Windows, ...]  # of the training text held out, and of the others
    guards: tuple[str, ...]  # names of those others
    begins_with: tuple[str, ...] = ()  # special tokens at the start of every window


def read(
    training: Sequence[str], held_out: Sequence[str], tokenizer: Any, seq_len: int, seed: int, tick: Tick = quiet
) -> Texts:
    """Windows of all the training texts, shuffled together by `seed`; a few of them are held out.

    Raises:
        BillhookError: a text is shorter than a window, or both trained on and held out.
    """
    sources = [data.calibration_text(source, tick) for source in training]
    found = [data.windows(text, tokenizer, seq_len) for text in sources]
    tokens = torch.cat([one.tokens for one in found])
    # from the end of the order in which a prune draws: its calibration windows, which it fits, come last and are never held out
    tokens = tokens[torch.randperm(len(tokens), generator=torch.Generator().manual_seed(seed)).flip(0)]
    held = min(HELD_OUT, len(tokens) // 10)
    begins_with = found[0].begins_with
    name = f"{'+'.join(one.source for one in found)}, held out"
    own = Windows(name, tokens[:held], held, "", "", begins_with=begins_with)
    others = []
    for text in data.evaluation_texts(held_out, tick):
        if text.sha256 in [one.text_sha256 for one in found]:
            raise BillhookError(f"text {text.name!r} is trained on and held out: name another --held-out")
        windows = data.windows(text, tokenizer, seq_len)
        spread = torch.linspace(0, len(windows.tokens) - 1, min(HELD_OUT, len(windows.tokens))).long()
        others.append(replace(windows, tokens=windows.tokens[spread]))
    return Texts(
        tuple(one.source for one in found),
        tuple(one.text_sha256 for one in found),
        tokens[held:],
        (*([own] if held else []), *others),
        tuple(one.source for one in others),
        begins_with,
    )


def judged_by(texts: Texts) -> dict[str, dict[str, Any]]:
    """What a reader of a perplexity must know, by text."""
    return {
        text.source: {
            "windows": len(text.tokens),
            "seq_len": text.tokens.shape[1],
            "begins_with": list(text.begins_with),
            "tokens": text.tokens[:, text.first :].numel(),
        }
        for text in texts.judged
    }


def order_of(count: int, wanted: int, seed: int) -> list[int]:
    """Windows by number: all of them once, in the order drawn, then again in other orders."""
    order = list(range(count))
    draw = torch.Generator().manual_seed(seed)
    while len(order) < wanted:
        order += torch.randperm(count, generator=draw).tolist()
    return order[:wanted]
