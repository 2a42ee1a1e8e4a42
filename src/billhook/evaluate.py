"""What a model costs and what it is worth: perplexity, speed, memory, and the text it writes."""

import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from billhook import data
from billhook.budget import decoder_parameters, total_parameters
from billhook.data import Text, Windows
from billhook.memory import peak_growth
from billhook.progress import Tick, quiet
from billhook.tensors import Tokens

BATCH_TOKENS = 2048  # logits of one forward: 2048 x 49152 float32 are 400 MB
PROMPTS = (
    "The capital of France is",
    "Water boils when",
    "Once upon a time, in a small village by the sea,",
)


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean token loss over non-overlapping windows; no number without its window, tokens and text."""

    text: str
    perplexity: float
    standard_error: float | None  # of the perplexity, from the spread of the windows' mean losses; none of one window
    seq_len: int
    tokens: int  # predicted: length - 1 in each window
    text_sha256: str


@dataclass(frozen=True)
class Speed:
    """Tokens per second, median over `repeats`, with the slowest and fastest repeat."""

    prefill: float
    prefill_range: tuple[float, float]
    decode: float
    decode_range: tuple[float, float]
    prompt_tokens: int
    new_tokens: int
    repeats: int


@torch.inference_mode()
def perplexity(model: Any, windows: Windows, tick: Tick = quiet) -> Perplexity:
    """Perplexity of `model` over all windows: every token but a window's first is predicted from those before it."""
    length = windows.tokens.shape[1]
    rows = max(1, BATCH_TOKENS // length)
    losses: list[float] = []
    for n, batch in enumerate(windows.tokens.split(rows)):
        tick(f"perplexity on {windows.source}", n * rows, len(windows.tokens))
        losses += _window_losses(model, batch.to(model.device))
    tick(f"perplexity on {windows.source}", len(windows.tokens), len(windows.tokens))
    mean = statistics.fmean(losses)
    value = math.exp(mean) if mean < 700 else math.inf  # past the largest float64, or not a number: a broken model
    error = value * statistics.stdev(losses) / math.sqrt(len(losses)) if len(losses) > 1 else None
    return Perplexity(windows.source, value, error, length, len(losses) * (length - 1), windows.text_sha256)


def speeds(
    models: Sequence[Any], prompt_tokens: int, new_tokens: int = 32, repeats: int = 5, tick: Tick = quiet
) -> list[Speed]:
    """Prefill and decode speed of each model at batch 1, measured in turns so that a drifting machine favours none.

    Prefill is one forward of `prompt_tokens` up to the first logits; decode is greedy, one token at a time through the
    cache.  One uncounted round warms up.
    """
    prefill: list[list[float]] = [[] for _ in models]
    decode: list[list[float]] = [[] for _ in models]
    for turn in range(repeats + 1):
        tick("speed", turn, repeats + 1)
        for n, model in enumerate(models):
            first, rest = _generate_timed(model, prompt_tokens, new_tokens)
            if turn:
                prefill[n].append(prompt_tokens / first)
                decode[n].append(new_tokens / rest)
    tick("speed", repeats + 1, repeats + 1)
    return [
        Speed(
            statistics.median(p),
            (min(p), max(p)),
            statistics.median(d),
            (min(d), max(d)),
            prompt_tokens,
            new_tokens,
            repeats,
        )
        for p, d in zip(prefill, decode, strict=True)
    ]


def memory(model: Any, prompt_tokens: int) -> dict[str, int]:
    """Bytes of the weights, and the peak of weights plus what one prefill of `prompt_tokens` adds to the process."""
    weights = sum(t.numel() * t.element_size() for t in model.parameters())
    with peak_growth(model.device) as growth:
        _generate_timed(model, prompt_tokens, 1)
    return {"weights_bytes": weights, "peak_bytes": weights + growth()}


def continuations(model: Any, tokenizer: Any, prompts: Sequence[str] = PROMPTS, new_tokens: int = 32) -> list[str]:
    """Greedy continuations, the prompts excluded."""
    out = []
    for prompt in prompts:
        inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
        room = getattr(model.config, "max_position_embeddings", math.inf) - inputs.input_ids.shape[1]
        if room <= 0:
            out.append("")
            continue
        ids = model.generate(
            **inputs, max_new_tokens=min(new_tokens, room), do_sample=False, pad_token_id=model.config.eos_token_id or 0
        )
        out.append(tokenizer.decode(ids[0, inputs.input_ids.shape[1] :], skip_special_tokens=True))
    return out


def sizes(model: Any) -> dict[str, int]:
    """Parameters: all of them, and those of the decoder layers."""
    return {"parameters": total_parameters(model), "decoder_parameters": decoder_parameters(model)}


@dataclass(frozen=True)
class Subject:
    """A model to measure, by the name it has in tables."""

    name: str
    model: Any
    tokenizer: Any
    disk_bytes: int | None = None


def side_by_side(
    subjects: Sequence[Subject], texts: Sequence[Text], seq_len: int, max_windows: int | None = None, tick: Tick = quiet
) -> list[dict[str, Any]]:
    """Every measure of every model, as plain data: sizes, perplexities, speed, memory, continuations.

    Perplexities are per token, so the models must share a tokenizer to be compared.
    """
    windows = [_first(data.windows(text, subjects[0].tokenizer, seq_len), max_windows) for text in texts]
    prompt = max(1, min(512, *(getattr(s.model.config, "max_position_embeddings", 512) - 64 for s in subjects)))
    for subject in subjects:
        for window in windows:
            data.check_vocabulary(window, subject.model, subject.name)
    found: list[dict[str, Any]] = []
    for subject in subjects:
        measured = [asdict(perplexity(subject.model, w, _named(tick, subject.name))) for w in windows]
        found.append(
            {
                "name": subject.name,
                "sizes": sizes(subject.model),
                "disk_bytes": subject.disk_bytes,
                "perplexities": measured,
            }
        )
    for result, speed in zip(found, speeds([s.model for s in subjects], prompt, tick=tick), strict=True):
        result["speed"] = asdict(speed)
    for n, (result, subject) in enumerate(zip(found, subjects, strict=True)):
        tick("generation", n, len(subjects))
        result["memory"] = memory(subject.model, prompt)
        result["prompts"] = list(PROMPTS)
        result["continuations"] = continuations(subject.model, subject.tokenizer)
    tick("generation", len(subjects), len(subjects))
    return found


def _first(windows: Windows, most: int | None) -> Windows:
    return replace(windows, tokens=windows.tokens[:most])


def _named(tick: Tick, name: str) -> Tick:
    return lambda stage, done, total: tick(f"{name}: {stage}", done, total)


def _window_losses(model: Any, batch: Tokens) -> list[float]:
    """Mean token loss of each window, in float32."""
    logits = model(batch, use_cache=False).logits
    return [
        torch.nn.functional.cross_entropy(row[:-1].float(), ids[1:]).item()
        for row, ids in zip(logits, batch, strict=True)
    ]


@torch.inference_mode()
def _generate_timed(model: Any, prompt_tokens: int, new_tokens: int) -> tuple[float, float]:
    """Seconds to the first token, and seconds for `new_tokens` after it."""
    ids = torch.randint(model.config.vocab_size, (1, prompt_tokens), generator=torch.Generator().manual_seed(0)).to(
        model.device
    )
    synchronise(model.device)
    start = time.perf_counter()
    step = model(ids, use_cache=True, logits_to_keep=1)
    token = step.logits[:, -1:].argmax(-1)
    synchronise(model.device)
    first = time.perf_counter()
    for _ in range(new_tokens):
        step = model(token, past_key_values=step.past_key_values, use_cache=True)
        token = step.logits[:, -1:].argmax(-1)
    synchronise(model.device)
    return first - start, time.perf_counter() - first


def synchronise(device: torch.device) -> None:
    """Wait for what the device still has to do, so that a clock may be read."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
