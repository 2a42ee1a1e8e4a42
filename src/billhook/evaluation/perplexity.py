"""How well a model predicts text: perplexity, and beside a reference what perplexity hides, divergence and agreement."""

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from billhook.data import Windows
from billhook.runtime.progress import Tick, quiet
from billhook.tensors import Tokens

BATCH_TOKENS = 2048  # logits of one forward: 2048 x 49152 float32 are 400 MB


@dataclass(frozen=True)
class ReferenceComparison:
    """The reference's predictions of the same tokens beside these."""

    kl: float  # KL(reference || model) in nats a token
    kl_standard_error: float | None  # this and the next from the spread of the windows
    agreement: float  # share of tokens where both models' most likely next token is the same
    factor: float  # perplexity over the reference's
    factor_standard_error: float | None  # of paired windows: far smaller than the two perplexities' own


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean token loss over non-overlapping windows; no number without its window, tokens and text."""

    text: str
    perplexity: float
    standard_error: float | None  # of the perplexity, from the spread of the windows' mean losses; none of one window
    bits_per_byte: float | None  # compares across tokenizers, as perplexity does not
    seq_len: int
    tokens: int  # predicted: length - 1 in each window, or fewer behind several special tokens
    bytes: int | None  # of text that they stand for
    text_sha256: str
    window_losses: tuple[float, ...]  # mean nats a token
    against: ReferenceComparison | None = None
    begins_with: tuple[str, ...] = ()  # special tokens at the start of each window


def perplexity(model: Any, windows: Windows, tick: Tick = quiet) -> Perplexity:
    """Perplexity of `model` over all windows: every token of text is predicted from those before it, but the first of a window
    that no special token begins."""
    return perplexities([model], windows, tick=tick)[0]


@torch.inference_mode()
def perplexities(
    models: Sequence[Any], windows: Windows, *, reference: bool = False, tick: Tick = quiet
) -> list[Perplexity]:
    """Perplexity of every model over all windows.

    Args:
        reference: compare the others with the first, batch by batch: nothing is kept of either but sums.
    """
    length, first, stage = windows.tokens.shape[1], windows.first, f"perplexity on {windows.source}"
    rows = max(1, BATCH_TOKENS // length)
    losses: list[list[float]] = [[] for _ in models]
    compared: list[list[tuple[float, float]]] = [[] for _ in models]
    for n, batch in enumerate(windows.tokens.split(rows)):
        tick(stage, n * rows, len(windows.tokens))
        expected: list[Tensor] = []
        for m, model in enumerate(models):
            for row, found in enumerate(_log_probabilities(model, batch, first)):
                losses[m].append(torch.nn.functional.nll_loss(found, batch[row, first:].to(found.device)).item())
                if reference and m:
                    compared[m].append(_compare(expected[row].to(found.device), found))
                elif reference:
                    expected.append(found)
    tick(stage, len(windows.tokens), len(windows.tokens))
    size = sum(windows.bytes) if windows.bytes else None
    return [
        _summed(windows, own, size, _against(pairs, losses[0], own))
        for own, pairs in zip(losses, compared, strict=True)
    ]


def _log_probabilities(model: Any, batch: Tokens, first: int) -> Iterator[Tensor]:
    """Of each window's tokens from `first` on, float32 (length - first, vocabulary), one window at a time."""
    for logits in model(batch.to(model.device), use_cache=False).logits:
        yield torch.log_softmax(logits[first - 1 : -1].float(), -1)


def _compare(expected: Tensor, found: Tensor) -> tuple[float, float]:
    """Mean KL(expected || found) and top-1 agreement of one window; log-probabilities (tokens, vocabulary)."""
    kl = torch.nn.functional.kl_div(found, expected, reduction="batchmean", log_target=True).item()
    return kl, (expected.argmax(-1) == found.argmax(-1)).float().mean().item()


def _summed(windows: Windows, losses: list[float], size: int | None, against: ReferenceComparison | None) -> Perplexity:
    length, mean = windows.tokens.shape[1], statistics.fmean(losses)
    tokens, value = len(losses) * (length - windows.first), _exp(mean)
    return Perplexity(
        windows.source,
        value,
        _times(value, _standard_error(losses)),
        mean * tokens / math.log(2) / size if size else None,
        length,
        tokens,
        size,
        windows.text_sha256,
        tuple(losses),
        against,
        windows.begins_with,
    )


def _against(pairs: list[tuple[float, float]], reference: list[float], own: list[float]) -> ReferenceComparison | None:
    if not pairs:
        return None
    kl, agreement = zip(*pairs, strict=True)
    return ReferenceComparison(
        statistics.fmean(kl), _standard_error(kl), statistics.fmean(agreement), *paired(reference, own)
    )


def paired(reference: Sequence[float], own: Sequence[float]) -> tuple[float, float | None]:
    """Perplexity over the reference's, with its standard error, from the mean losses of the same windows."""
    more = [b - a for a, b in zip(reference, own, strict=True)]
    factor = _exp(statistics.fmean(more))
    return factor, _times(factor, _standard_error(more))


def perplexity_of(losses: Sequence[float]) -> float:
    """Perplexity from the mean losses of windows of one length."""
    return _exp(statistics.fmean(losses))


def _exp(nats: float) -> float:
    return math.exp(nats) if nats < 700 else math.inf  # past the largest float64, or not a number: a broken model


def _standard_error(values: Sequence[float]) -> float | None:
    if len(values) < 2 or not all(map(math.isfinite, values)):
        return None
    return statistics.stdev(values) / math.sqrt(len(values))


def _times(value: float, relative: float | None) -> float | None:
    return None if relative is None else value * relative
