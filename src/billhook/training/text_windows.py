"""The windows that training reads, in which order, and those that it is evaluated on."""

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

HELD_OUT = 8  # windows of each text that are held out for evaluation
BLOCK = 256  # windows that are compared at a time with those that the model has seen


@dataclass(frozen=True)
class TrainingTexts:
    """What a model is trained on, and what it is evaluated on."""

    names: tuple[str, ...]  # names of the training texts
    sha256: tuple[str, ...]  # digests of the training texts
    train: Tokens  # training windows, in the order drawn
    held_out: tuple[Windows, ...]  # windows held out of the training texts, if there are any, then those of other texts
    guards: tuple[str, ...]  # names of these other texts
    begins_with: tuple[str, ...] = ()  # special tokens at the start of every window
    doubt: str = ""  # why the model may do too well on windows held out of the training texts


def read(
    training: Sequence[str],
    held_out: Sequence[str],
    tokenizer: Any,
    seq_len: int,
    seed: int,
    tick: Tick = quiet,
    record: dict[str, Any] | None = None,
) -> TrainingTexts:
    """Windows of all the training texts, shuffled together by `seed`; a few of them are held out.

    Args:
        training: names or files of the texts to train on.
        held_out: names or files of other texts to evaluate on.
        record: billhook.json of the model that is trained.  Windows that its prune was fitted on are held out only
            where there are no others.

    Raises:
        BillhookError: a text is shorter than a window, or both trained on and held out.
    """
    texts = [data.calibration_text(source, tick) for source in training]
    parts = [data.windows(text, tokenizer, seq_len) for text in texts]
    tokens = torch.cat([part.tokens for part in parts])
    # from the end of the order in which a prune draws: its calibration windows come last and are never held out
    tokens = tokens[torch.randperm(len(tokens), generator=torch.Generator().manual_seed(seed)).flip(0)]
    begins_with = parts[0].begins_with
    is_held_out, doubt = _hold_out(tokens, texts, parts, tokenizer, seed, record, tick)
    count = int(is_held_out.sum())
    name = f"{'+'.join(part.source for part in parts)}, held out"
    of_training = Windows(name, tokens[is_held_out], count, "", "", begins_with=begins_with)
    others = []
    for text in data.evaluation_texts(held_out, tick):
        if text.sha256 in [part.text_sha256 for part in parts]:
            raise BillhookError(f"text {text.name!r} is trained on and held out: name another --held-out")
        windows = data.windows(text, tokenizer, seq_len)
        spread = torch.linspace(0, len(windows.tokens) - 1, min(HELD_OUT, len(windows.tokens))).long()
        others.append(replace(windows, tokens=windows.tokens[spread]))
    return TrainingTexts(
        names=tuple(part.source for part in parts),
        sha256=tuple(part.text_sha256 for part in parts),
        train=tokens[~is_held_out],
        held_out=(*([of_training] if count else []), *others),
        guards=tuple(windows.source for windows in others),
        begins_with=begins_with,
        doubt=doubt,
    )


def _hold_out(
    tokens: Tokens,
    texts: Sequence[Text],
    parts: Sequence[Windows],
    tokenizer: Any,
    seed: int,
    record: dict[str, Any] | None,
    tick: Tick,
) -> tuple[torch.Tensor, str]:
    """Which windows are held out, as a mask, and what makes them doubtful, in words.

    The first windows that the model has not seen; where there are too few, the first of the others.
    """
    count = min(HELD_OUT, len(tokens) // 10)
    mask = torch.zeros(len(tokens), dtype=torch.bool)
    seen, lost = calibrated_on(record, texts, tokenizer, tick)
    doubts = []
    if seen is None:
        mask[:count] = True
        if lost:
            doubts.append(f"may be among those that the prune was calibrated on: its text {lost} is not found here")
    else:
        fresh, fitted = _unseen(tokens[:, len(parts[0].begins_with) :], seen, count)
        mask[(fresh + fitted)[:count]] = True
        if count > len(fresh):
            doubts.append(f"are the prune's own, {count - len(fresh)} of {count}: there are no others")
    recoveries = [str(number) for number in _trained_on(record, parts, seed)]
    if recoveries and count:
        doubts.append(f"may have been trained on by recovery {' and '.join(recoveries)} of this model")
    subject = f"windows held out of {' and '.join(part.source for part in parts)}"
    return mask, f"{subject} {', and '.join(doubts)}" if doubts and count else ""


def _unseen(tokens: Tokens, seen: Windows, count: int) -> tuple[list[int], list[int]]:
    """The numbers of the first `count` windows that share nothing with those seen, and of those before that do."""
    fitted = seen.tokens[:, len(seen.begins_with) :]
    length = min(RUN, tokens.shape[1], fitted.shape[1])
    known, fresh, repeated = runs(fitted, length), [], []
    for start in range(0, len(tokens), BLOCK):
        for n, shares in enumerate(sharing(tokens[start : start + BLOCK], known, length).tolist(), start):
            (repeated if shares else fresh).append(n)
        if len(fresh) >= count:
            break
    return fresh[:count], repeated


def _trained_on(record: dict[str, Any] | None, parts: Sequence[Windows], seed: int) -> list[int]:
    """The numbers, from 1, of recoveries that may have trained on windows which are now held out.

    They trained on one of these texts, and by another order of windows held out others of it.
    """
    recoveries = (record or {}).get("recovery")
    texts, drawn_by = [part.text_sha256 for part in parts], (seed, parts[0].tokens.shape[1])
    numbers = []
    for n, recovery in enumerate(recoveries if isinstance(recoveries, list) else [], 1):
        earlier = recovery.get("text_sha256") if isinstance(recovery, dict) else None
        if not isinstance(earlier, list) or not any(text in earlier for text in texts):
            continue
        if earlier != texts or (recovery.get("seed"), recovery.get("seq_len")) != drawn_by:
            numbers.append(n)
    return numbers


def conditions(texts: TrainingTexts) -> dict[str, dict[str, Any]]:
    """What a reader of a perplexity must know of the windows behind it, by text."""
    return {
        text.source: {
            "windows": len(text.tokens),
            "seq_len": text.tokens.shape[1],
            "begins_with": list(text.begins_with),
            "tokens": text.tokens[:, text.first :].numel(),
        }
        for text in texts.held_out
    }


def order_of(count: int, wanted: int, seed: int) -> list[int]:
    """`wanted` numbers of windows: all `count` once, in the order drawn, then again in other orders."""
    order = list(range(count))
    generator = torch.Generator().manual_seed(seed)
    while len(order) < wanted:
        order += torch.randperm(count, generator=generator).tolist()
    return order[:wanted]
