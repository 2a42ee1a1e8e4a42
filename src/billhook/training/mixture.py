"""Several texts in shares that follow how far the student lags its teacher on each (DRPruning, arXiv:2411.14055).

A judgement sets the shares of the windows up to the next one.  All that decides which windows are read is in the log of
the evaluations, so a run that is cut off reads the same ones.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from billhook.math import mixture
from billhook.tensors import TextOf, TextShares
from billhook.training.text_windows import TrainingTexts, held_out_of, order_of

SETTLED = 0.2  # share of the steps from which the base shares move


@dataclass(frozen=True)
class Mixture:
    """Training texts whose shares are set as the training goes."""

    texts: tuple[str, ...]
    references: tuple[float, ...]  # the teacher's loss on the windows held out of each text
    text_of: TextOf  # of the windows that may be read
    first: TextShares  # in which training begins: of windows in all texts
    seed: int  # of the order of each text's windows

    @classmethod
    def of(cls, texts: TrainingTexts, count: int, losses: Mapping[str, Sequence[float]], seed: int) -> "Mixture":
        """The training texts, of which the first `count` windows may be read.

        Args:
            losses: the teacher's, of each held-out window, by name.
        """
        return cls(texts.names, _means(losses, texts.names), texts.text_of[:count], first_shares(texts), seed)

    def judged(self, losses: Mapping[str, Sequence[float]], base: Sequence[float], progress: float) -> dict[str, Any]:
        """The shares that follow from the losses of an evaluation, as its log entry keeps them.

        Args:
            losses: of each held-out window, by name.
            base: base shares so far; empty: those of the beginning.
            progress: the share of the steps that are done.
        """
        p = torch.tensor(base, dtype=torch.float64) if base else self.first
        own, references = (
            torch.tensor(each, dtype=torch.float64) for each in (_means(losses, self.texts), self.references)
        )
        q = mixture.robust(p, own - references)
        p = mixture.follow(p, q, self.first) if progress >= SETTLED else p
        return {"shares": q.tolist(), "base_shares": p.tolist()}

    def order(self, shares: Sequence[Sequence[float]], ends: Sequence[int]) -> list[int]:
        """Numbers of the windows to train on, as far as shares are known.

        The next window is of the text that is furthest behind its share.  Each text's come all once before any comes
        twice.

        Args:
            shares: of each judgement so far.
            ends: how many windows are read before the shares of each judgement end.
        """
        pools = [(self.text_of == n).nonzero().flatten().tolist() for n in range(len(self.texts))]
        passes = [[pool[n] for n in order_of(len(pool), ends[-1], self.seed)] for pool in pools]
        behind, taken, order = [0.0] * len(pools), [0] * len(pools), []
        for share, end in zip(shares, ends, strict=False):
            while len(order) < end:
                behind = [more + missing for more, missing in zip(share, behind, strict=True)]
                n = max(range(len(pools)), key=behind.__getitem__)
                behind[n] -= 1
                order.append(passes[n][taken[n]])
                taken[n] += 1
        return order


def readable(texts: TrainingTexts, windows: int) -> list[int]:
    """The numbers of the training windows that a run over so many may read, whatever is judged; ascending."""
    largest = mixture.largest(first_shares(texts)).tolist()
    rest = [min(windows, math.ceil(share * windows) + len(largest)) for share in largest]
    numbers = []
    for number, text in enumerate(texts.text_of.tolist()):
        if rest[text] > 0:
            numbers.append(number)
            rest[text] -= 1
    return numbers


def answered_for_each(texts: TrainingTexts) -> float:
    """For how many windows a teacher is asked, for each that is read: what `readable` comes to in a long run."""
    return float(mixture.largest(first_shares(texts)).sum())


def first_shares(texts: TrainingTexts) -> TextShares:
    """The share of each text in all windows."""
    counts = torch.bincount(texts.text_of, minlength=len(texts.names)).double()
    return counts / counts.sum()


def _means(losses: Mapping[str, Sequence[float]], texts: Sequence[str]) -> tuple[float, ...]:
    """The mean loss on the windows that are held out of each text."""
    return tuple(sum(losses[name]) / len(losses[name]) for name in map(held_out_of, texts))
