"""The windows that training reads, in which order, and those that it is evaluated on."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

from billhook import data
from billhook.data import Windows
from billhook.errors import BillhookError
from billhook.math.overlap import RUN, runs, sharing
from billhook.runtime.progress import Tick, quiet
from billhook.tensors import TextOf, Tokens
from billhook.training.fitted import calibrated_on

HELD_OUT = 8  # windows of each text that are held out for evaluation
SPARED = 10  # windows of which one is held out, where there are few
BLOCK = 256  # windows that are compared at a time with those that the model has seen


class Draw(NamedTuple):
    """How texts become windows."""

    seq_len: int
    seed: int = 0  # of the order of the windows
    apart: bool = False  # whether each text has held-out windows of its own


@dataclass(frozen=True)
class TrainingTexts:
    """What a model is trained on, and what it is evaluated on."""

    names: tuple[str, ...]  # names of the training texts
    sha256: tuple[str, ...]  # digests of the training texts
    train: Tokens  # training windows, in the order drawn
    text_of: TextOf  # of the training windows
    held_out: tuple[Windows, ...]  # windows held out of the training texts, if there are any, then those of other texts
    guards: tuple[str, ...]  # names of these other texts
    begins_with: tuple[str, ...] = ()  # special tokens at the start of every window
    doubt: str = ""  # why the model may do too well on windows held out of the training texts

    @property
    def of_training(self) -> tuple[Windows, ...]:
        """Windows held out of the training texts: together, or of each text."""
        return self.held_out[: len(self.held_out) - len(self.guards)]

    def begun_with(self, numbers: Sequence[int]) -> "TrainingTexts":
        """The same with some training windows before the others."""
        chosen = set(numbers)
        order = [*numbers, *(n for n in range(len(self.train)) if n not in chosen)]
        return replace(self, train=self.train[order], text_of=self.text_of[order])

    def only(self, numbers: Sequence[int]) -> "TrainingTexts":
        """The same with some training windows alone."""
        return replace(self, train=self.train[list(numbers)], text_of=self.text_of[list(numbers)])

    def first(self, count: int) -> "TrainingTexts":
        """The same with so many training windows."""
        return replace(self, train=self.train[:count], text_of=self.text_of[:count])


def read(
    training: Sequence[str],
    held_out: Sequence[str],
    tokenizer: Any,
    draw: Draw,
    tick: Tick = quiet,
    record: dict[str, Any] | None = None,
) -> TrainingTexts:
    """Windows of all the training texts, shuffled together; a few of them are held out.

    Args:
        training: names or files of the texts to train on.
        held_out: names or files of other texts to evaluate on.
        record: billhook.json of the model that is trained.  Windows that its prune was fitted on are held out only
            where there are no others.

    Raises:
        BillhookError: a text is shorter than a window, or both trained on and held out; two that must be held apart
            have one name, or one has too few windows to hold one out.
    """
    texts = [data.calibration_text(source, tick) for source in training]
    parts = [data.windows(text, tokenizer, draw.seq_len) for text in texts]
    # from the end of the order in which a prune draws: its calibration windows come last and are never held out
    order = torch.randperm(
        sum(len(part.tokens) for part in parts), generator=torch.Generator().manual_seed(draw.seed)
    ).flip(0)
    tokens = torch.cat([part.tokens for part in parts])[order]
    text_of = torch.cat([torch.full((len(part.tokens),), n) for n, part in enumerate(parts)])[order]
    begins_with = parts[0].begins_with
    seen, lost = calibrated_on(record, texts, tokenizer, tick)
    of_training, held, fitted = [], torch.zeros(len(tokens), dtype=torch.bool), 0
    for name, members in _groups(parts, text_of, draw.apart):
        chosen, repeated = _hold_out(tokens[members], len(begins_with), seen)
        held[members[chosen]] = True
        fitted += repeated
        windows = tokens[members[chosen]]
        of_training.append(Windows(held_out_of(name), windows, len(windows), "", "", begins_with=begins_with))
    others = []
    for text in data.evaluation_texts(held_out, tick):
        if text.sha256 in [part.text_sha256 for part in parts]:
            raise BillhookError(f"text {text.name!r} is trained on and held out: name another --held-out")
        windows = data.windows(text, tokenizer, draw.seq_len)
        spread = torch.linspace(0, len(windows.tokens) - 1, min(HELD_OUT, len(windows.tokens))).long()
        others.append(replace(windows, tokens=windows.tokens[spread]))
    return TrainingTexts(
        names=tuple(part.source for part in parts),
        sha256=tuple(part.text_sha256 for part in parts),
        train=tokens[~held],
        text_of=text_of[~held],
        held_out=(*[windows for windows in of_training if len(windows.tokens)], *others),
        guards=tuple(windows.source for windows in others),
        begins_with=begins_with,
        doubt=_doubt(parts, int(held.sum()), fitted, lost, _trained_on(record, parts, draw)),
    )


def held_out_of(text: str) -> str:
    """The name of the windows that are held out of a text."""
    return f"{text}, held out"


def _groups(parts: Sequence[Windows], text_of: TextOf, apart: bool) -> list[tuple[str, torch.Tensor]]:
    """The windows that some are held out of, by the name of what is held out: those of each text, or of all."""
    names = [part.source for part in parts]
    if not apart:
        return [("+".join(names), torch.arange(len(text_of)))]
    digests = [part.text_sha256 for part in parts]
    if same := next((name for name, digest in zip(names, digests, strict=True) if digests.count(digest) > 1), None):
        raise BillhookError(f"text {same!r} is there twice, and each text has shares of its own: name it once")
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise BillhookError(f"two training texts are named {twice!r}, and each is judged by its name: rename one")
    groups = [(name, (text_of == n).nonzero().flatten()) for n, name in enumerate(names)]
    if few := next(((name, len(members)) for name, members in groups if len(members) < SPARED), None):
        raise BillhookError(
            f"text {few[0]!r} has {few[1]} windows, and of fewer than {SPARED} none is held out, which its share is judged "
            "by: use more text or a smaller --seq-len"
        )
    return groups


def _hold_out(tokens: Tokens, lead: int, seen: Windows | None) -> tuple[list[int], int]:
    """The numbers of the windows that are held out, and how many of these the model has seen.

    The first windows that the model has not seen; where there are too few, the first of the others.

    Args:
        lead: special tokens at the start of every window.
        seen: the windows that the model has seen.
    """
    count = min(HELD_OUT, len(tokens) // SPARED)
    if seen is None:
        return list(range(count)), 0
    fresh, fitted = _unseen(tokens[:, lead:], seen, count)
    return sorted((fresh + fitted)[:count]), max(0, count - len(fresh))


def _doubt(parts: Sequence[Windows], held: int, fitted: int, lost: str, recoveries: Sequence[int]) -> str:
    """What makes the windows that are held out doubtful, in words; '' if nothing does.

    Args:
        held: how many are held out.
        fitted: how many of them the prune has seen.
        lost: the name of its text, where that is not found.
        recoveries: the numbers of those that may have trained on them.
    """
    doubts = []
    if lost:
        doubts.append(f"may be among those that the prune was calibrated on: its text {lost} is not found here")
    if fitted:
        doubts.append(f"are the prune's own, {fitted} of {held}: there are no others")
    if recoveries:
        doubts.append(f"may have been trained on by recovery {' and '.join(map(str, recoveries))} of this model")
    subject = f"windows held out of {' and '.join(part.source for part in parts)}"
    return f"{subject} {', and '.join(doubts)}" if doubts and held else ""


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


def _trained_on(record: dict[str, Any] | None, parts: Sequence[Windows], draw: Draw) -> list[int]:
    """The numbers, from 1, of recoveries that may have trained on windows which are now held out.

    They trained on one of these texts, and by another order of windows held out others of it.
    """
    recoveries = (record or {}).get("recovery")
    texts, drawn_by = [part.text_sha256 for part in parts], (draw.seed, draw.seq_len, draw.apart)
    numbers = []
    for n, recovery in enumerate(recoveries if isinstance(recoveries, list) else [], 1):
        earlier = recovery.get("text_sha256") if isinstance(recovery, dict) else None
        if not isinstance(earlier, list) or not any(text in earlier for text in texts):
            continue
        was_apart = recovery.get("mixture") not in (None, "proportional")
        if earlier != texts or (recovery.get("seed"), recovery.get("seq_len"), was_apart) != drawn_by:
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
