"""The windows that training reads, in which order, and those that judge it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from billhook import data
from billhook.data import Text, Windows
from billhook.errors import BillhookError
from billhook.math.overlap import RUN, runs, sharing
from billhook.runtime.progress import Tick, quiet
from billhook.tensors import Tokens
from billhook.training.fitted import calibrated_on

HELD_OUT = 8  # windows of each text to judge by; those of the training text are kept from training
BLOCK = 256  # windows that are looked at together, until as many are found as are held out


@dataclass(frozen=True)
class Texts:
    """What is trained on and what is judged by."""

    names: tuple[str, ...]
    sha256: tuple[str, ...]
    train: Tokens  # windows in the order drawn
    judged: tuple[Windows, ...]  # of the training text held out, and of the others
    guards: tuple[str, ...]  # names of those others
    begins_with: tuple[str, ...] = ()  # special tokens at the start of every window
    doubt: str = ""  # what may make the windows of the training text too kind a judge


def read(
    training: Sequence[str],
    held_out: Sequence[str],
    tokenizer: Any,
    seq_len: int,
    seed: int,
    tick: Tick = quiet,
    record: dict[str, Any] | None = None,
) -> Texts:
    """Windows of all the training texts, shuffled together by `seed`; a few of them are held out.

    Args:
        record: billhook.json of the model that is trained: what its prune was fitted on is held out only where nothing else is left.

    Raises:
        BillhookError: a text is shorter than a window, or both trained on and held out.
    """
    sources = [data.calibration_text(source, tick) for source in training]
    found = [data.windows(text, tokenizer, seq_len) for text in sources]
    tokens = torch.cat([one.tokens for one in found])
    # from the end of the order in which a prune draws: its calibration windows, which it fits, come last and are never held out
    tokens = tokens[torch.randperm(len(tokens), generator=torch.Generator().manual_seed(seed)).flip(0)]
    begins_with = found[0].begins_with
    name = f"{'+'.join(one.source for one in found)}, held out"
    chosen, doubt = _held(tokens, sources, found, tokenizer, seed, record, tick)
    held = int(chosen.sum())
    own = Windows(name, tokens[chosen], held, "", "", begins_with=begins_with)
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
        tokens[~chosen],
        (*([own] if held else []), *others),
        tuple(one.source for one in others),
        begins_with,
        doubt,
    )


def _held(
    tokens: Tokens,
    sources: Sequence[Text],
    found: Sequence[Windows],
    tokenizer: Any,
    seed: int,
    record: dict[str, Any] | None,
    tick: Tick,
) -> tuple[torch.Tensor, str]:
    """Which windows are held out, as a mask: the first that the model has not seen, else the first; and what is to be said of them."""
    count = min(HELD_OUT, len(tokens) // 10)
    chosen = torch.zeros(len(tokens), dtype=torch.bool)
    seen, lost = calibrated_on(record, sources, tokenizer, tick)
    others = [str(one) for one in _trained_on(record, found, seed)]
    kind = f"windows held out of {' and '.join(one.source for one in found)}"
    if seen is None:
        chosen[:count] = True
        doubt = (
            [f"may be among those that the prune was calibrated on: its text {lost} is not found here"] if lost else []
        )
    else:
        fresh, known = _unseen(tokens[:, len(found[0].begins_with) :], seen, count)
        chosen[(fresh + known)[:count]] = True
        again = count - len(fresh)
        doubt = [f"are the prune's own, {again} of {count}: there are no others"] if again > 0 else []
    doubt += [f"may have been trained on by recovery {' and '.join(others)} of this model"] if others and count else []
    return chosen, f"{kind} {', and '.join(doubt)}" if doubt and count else ""


def _unseen(tokens: Tokens, seen: Windows, count: int) -> tuple[list[int], list[int]]:
    """The first `count` windows that share nothing with those seen, and those that do, by number."""
    fitted = seen.tokens[:, len(seen.begins_with) :]
    length = min(RUN, tokens.shape[1], fitted.shape[1])
    known, fresh, again = runs(fitted, length), [], []
    for start in range(0, len(tokens), BLOCK):
        for n, twice in enumerate(sharing(tokens[start : start + BLOCK], known, length).tolist(), start):
            (again if twice else fresh).append(n)
        if len(fresh) >= count:
            break
    return fresh[:count], again


def _trained_on(record: dict[str, Any] | None, found: Sequence[Windows], seed: int) -> list[int]:
    """The recoveries, from 1, that trained on one of these texts and held out other windows of it, as another order does."""
    earlier = (record or {}).get("recovery")
    now, same = [one.text_sha256 for one in found], (seed, found[0].tokens.shape[1])
    numbers = []
    for n, one in enumerate(earlier if isinstance(earlier, list) else [], 1):
        texts = one.get("text_sha256") if isinstance(one, dict) else None
        if not isinstance(texts, list) or not any(text in texts for text in now):
            continue
        if texts != now or (one.get("seed"), one.get("seq_len")) != same:
            numbers.append(n)
    return numbers


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
