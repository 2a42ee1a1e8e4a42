"""How well a model predicts text: perplexity, and compared with a reference also divergence and agreement."""

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor

from billhook.data import Windows
from billhook.runtime.peers import ALONE, Peers
from billhook.runtime.progress import Tick, quiet
from billhook.tensors import Tokens

HEAD_TOKENS = 2048  # tokens of one forward through the head; their logits, 2048 x 49152 in float32, take 400 MB


@dataclass(frozen=True)
class ReferenceComparison:
    """Comparison with a reference model's predictions of the same tokens."""

    kl: float  # KL(reference || model) in nats a token
    kl_standard_error: float | None  # from the spread over windows
    agreement: float  # share of tokens where both models' most likely next token is the same
    factor: float  # perplexity divided by the reference's
    factor_standard_error: float | None  # from paired windows: far smaller than the perplexities' own errors


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean token loss over non-overlapping windows, with the windows, tokens and text that it depends on."""

    text: str
    perplexity: float
    standard_error: float | None  # the perplexity's, from the spread of the windows' losses; None for one window
    bits_per_byte: float | None  # comparable across tokenizers, unlike perplexity
    seq_len: int
    tokens: int  # predicted tokens: length - 1 in each window, fewer after several special tokens
    bytes: int | None  # bytes of text behind the predicted tokens
    text_sha256: str
    window_losses: tuple[float, ...]  # mean nats a token
    against: ReferenceComparison | None = None
    begins_with: tuple[str, ...] = ()  # special tokens at the start of each window


def head_batches(tokens: Tokens) -> Sequence[Tensor]:
    """Windows (windows, length) in parts that go through the head at once."""
    return tokens.split(max(1, HEAD_TOKENS // tokens.shape[1]))


def perplexity(model: Any, windows: Windows, tick: Tick = quiet) -> Perplexity:
    """Perplexity of `model` over all windows.

    Every token of text is predicted from those before it.  Only the first token of a window is not, unless a special
    token stands before it.
    """
    return perplexities([model], windows, tick=tick)[0]


@torch.inference_mode()
def perplexities(
    models: Sequence[Any],
    windows: Windows,
    *,
    reference: bool = False,
    tick: Tick = quiet,
    peers: Peers = ALONE,
) -> list[Perplexity]:
    """Perplexity of every model over all windows.

    Args:
        reference: compare the other models with the first, batch by batch, so that only sums are kept.
        peers: each takes its share of the windows, in the batches that one would have; all know the results.
    """
    first, stage, done = windows.first, f"perplexity on {windows.source}", 0
    # read once, at the end: on an accelerator each value would be waited for
    losses: list[list[Tensor]] = [[] for _ in models]
    compared: list[list[Tensor]] = [[] for _ in models]
    batches = peers.share(head_batches(windows.tokens))
    total = sum(map(len, batches))
    for batch in batches:
        tick(stage, done, total)
        done += len(batch)
        expected: list[Tensor] = []
        for m, model in enumerate(models):
            for row, log_probabilities in enumerate(_log_probabilities(model, batch, first)):
                wanted = batch[row, first:].to(log_probabilities.device)
                losses[m].append(torch.nn.functional.nll_loss(log_probabilities, wanted))
                if reference and m:
                    compared[m].append(_compare(expected[row].to(log_probabilities.device), log_probabilities))
                elif reference:
                    expected.append(log_probabilities)
    tick(stage, total, total)
    size = sum(windows.bytes) if windows.bytes else None
    found, pairs = ([_read(one, batches, peers) for one in each] for each in (losses, compared))
    return [
        _summed(windows, own, size, _against(own_pairs, found[0], own))
        for own, own_pairs in zip(found, pairs, strict=True)
    ]


def _read(values: Sequence[Tensor], batches: Sequence[Tensor], peers: Peers) -> list[Any]:
    """The values of all windows, in the order of the text, from those of this process's batches, in one transfer."""
    own = iter(torch.stack(list(values)).tolist() if values else [])
    return list(chain(*peers.joined([list(islice(own, len(batch))) for batch in batches])))


def _log_probabilities(model: Any, batch: Tokens, first: int) -> Iterator[Tensor]:
    """Yield, for each window, the log-probabilities of positions from `first` on:
    float32 (length - first, vocabulary)."""
    for logits in model(batch.to(model.device), use_cache=False).logits:
        yield torch.log_softmax(logits[first - 1 : -1].float(), -1)


def _compare(expected: Tensor, actual: Tensor) -> Tensor:
    """Mean KL(expected || actual) and top-1 agreement of one window, from log-probabilities (tokens, vocabulary)."""
    kl = torch.nn.functional.kl_div(actual, expected, reduction="batchmean", log_target=True)
    return torch.stack([kl, (expected.argmax(-1) == actual.argmax(-1)).float().mean()])


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


def _against(pairs: list[list[float]], reference: list[float], losses: list[float]) -> ReferenceComparison | None:
    if not pairs:
        return None
    kl, agreement = zip(*pairs, strict=True)
    return ReferenceComparison(
        statistics.fmean(kl), _standard_error(kl), statistics.fmean(agreement), *paired(reference, losses)
    )


def paired(reference: Sequence[float], losses: Sequence[float]) -> tuple[float, float | None]:
    """Perplexity divided by the reference's, with its standard error, from the mean losses of the same windows."""
    differences = [b - a for a, b in zip(reference, losses, strict=True)]
    factor = _exp(statistics.fmean(differences))
    return factor, _times(factor, _standard_error(differences))


def perplexity_of(losses: Sequence[float]) -> float:
    """The perplexity of windows of one length, from their mean losses."""
    return _exp(statistics.fmean(losses))


def _exp(nats: float) -> float:
    return math.exp(nats) if nats < 700 else math.inf  # beyond float64, or not a number: a broken model


def _standard_error(values: Sequence[float]) -> float | None:
    if len(values) < 2 or not all(map(math.isfinite, values)):
        return None
    return statistics.stdev(values) / math.sqrt(len(values))


def _times(value: float, relative: float | None) -> float | None:
    return None if relative is None else value * relative
