"""Speed and memory of models; several are measured in turns."""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from billhook.models.cached import after
from billhook.models.experts import fused
from billhook.models.plan import Plan
from billhook.models.sizes import kv_cache_entries
from billhook.runtime.memory import peak_growth
from billhook.runtime.progress import Tick, quiet


@dataclass(frozen=True)
class Speed:
    """Tokens per second of the whole batch, median over `repeats`, with the slowest and fastest repeat."""

    batch: int
    context: int  # tokens of each prompt
    prefill: float
    prefill_range: tuple[float, float]
    decode: float
    decode_range: tuple[float, float]
    first_token_seconds: float
    token_seconds: float  # median for a step after the first token, which makes one token for every row of the batch
    new_tokens: int
    repeats: int


def speeds(
    models: Sequence[Any],
    sizes: Sequence[tuple[int, int]] = ((1, 512),),
    new_tokens: int = 32,
    repeats: int = 5,
    tick: Tick = quiet,
) -> list[list[Speed]]:
    """Prefill and decode speed of each model at each (batch, context), in turns,
    so that a drifting machine favours none.

    Mixtures of experts are timed with the stock class's forward.  Prefill is one forward of the prompts up to the first
    logits; decode is greedy, one token at a time with the KV cache.  One round of each size warms up and is not
    counted.
    """
    with fused(*models):
        return _speeds(models, sizes, new_tokens, repeats, tick)


def _speeds(
    models: Sequence[Any], sizes: Sequence[tuple[int, int]], new_tokens: int, repeats: int, tick: Tick
) -> list[list[Speed]]:
    results: list[list[Speed]] = [[] for _ in models]
    rounds = (repeats + 1) * len(sizes)
    for s, (batch, context) in enumerate(sizes):
        seconds: list[list[tuple[float, float]]] = [[] for _ in models]
        for turn in range(repeats + 1):
            tick("speed", s * (repeats + 1) + turn, rounds)
            for n, model in enumerate(models):
                taken = _generate_timed(model, batch, context, new_tokens)
                if turn:
                    seconds[n].append(taken)
        for n, taken in enumerate(seconds):
            results[n].append(_speed(batch, context, new_tokens, taken))
    tick("speed", rounds, rounds)
    return results


def memory(model: Any, batch: int = 1, context: int = 512) -> dict[str, int]:
    """Bytes of the weights, of the KV cache, and of the peak: the weights and what a prefill adds to the process."""
    weights = sum(t.numel() * t.element_size() for t in model.parameters())
    with fused(model), peak_growth(model.device) as growth:
        _generate_timed(model, batch, context, 1)
    return {
        "weights_bytes": weights,
        "kv_cache_bytes": kv_cache_entries(model, Plan(), context, batch) * model.dtype.itemsize,
        "peak_bytes": weights + growth(),
        "batch": batch,
        "context": context,
    }


def synchronise(device: torch.device) -> None:
    """Wait until the device has finished its work, before a clock is read."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _speed(batch: int, context: int, new_tokens: int, seconds: list[tuple[float, float]]) -> Speed:
    first, later = [start for start, _ in seconds], [decoding / new_tokens for _, decoding in seconds]
    prefill, decode = [batch * context / duration for duration in first], [batch / duration for duration in later]
    return Speed(
        batch,
        context,
        statistics.median(prefill),
        (min(prefill), max(prefill)),
        statistics.median(decode),
        (min(decode), max(decode)),
        statistics.median(first),
        statistics.median(later),
        new_tokens,
        len(seconds),
    )


@torch.inference_mode()
def _generate_timed(model: Any, batch: int, context: int, new_tokens: int) -> tuple[float, float]:
    """Seconds to the first token, and seconds for `new_tokens` after it."""
    ids = torch.randint(model.config.vocab_size, (batch, context), generator=torch.Generator().manual_seed(0)).to(
        model.device
    )
    synchronise(model.device)
    start = time.perf_counter()
    step = model(ids, use_cache=True, logits_to_keep=1)
    token = step.logits[:, -1:].argmax(-1)
    synchronise(model.device)
    first = time.perf_counter()
    for _ in range(new_tokens):
        step = model(token, **after(step))
        token = step.logits[:, -1:].argmax(-1)
    synchronise(model.device)
    return first - start, time.perf_counter() - first
