"""A short look at a model before and after it is changed: what a perplexity on the calibration's kind of text hides.

Four windows of another kind of text, what the model writes after eight prompts, and small tasks that it has to write
the answer of.  A model whose layers are gone may keep its perplexity and repeat itself (arXiv:2603.24652).
"""

import math
import statistics
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from billhook import demo
from billhook.evaluation.continuations import variety
from billhook.evaluation.perplexity import head_batches, paired
from billhook.models.greedy import tokens_after
from billhook.models.modes import evaluation_mode
from billhook.runtime.special_tokens import without_end_token

PROMPTS = (
    "The capital of France is a city that",
    "Water boils when the temperature of it",
    "Once upon a time, in a small village",
    "To make a good cup of tea, first you",
    "The most important invention of the last century",
    "My grandmother was a woman who always",
    "Scientists have found that the oldest trees",
    "When the train arrived at the station, the",
)
NEW_TOKENS = 48
TEMPERATURE = 0.7  # of the sampled texts
WINDOWS, LENGTH = 4, 256  # of the second text
KEPT_BYTES = 2**27  # of the unpruned model's log-probabilities: positions are thinned out to fit
SHOTS = 3  # solved examples before each question
MORE_REPETITION = 0.15  # a share of repeated runs this much above the unpruned model's is worth a warning


@dataclass(frozen=True)
class Look:
    """What was seen of one model."""

    losses: tuple[float, ...]  # nats a token of each window of the second text
    log_probabilities: Tensor  # (windows, positions, vocabulary)
    repetition: dict[str, float | None]  # `greedy` and `sampled`: share of repeated runs of 4 tokens
    tasks: dict[str, float]  # share of answers that are right, token for token


@torch.inference_mode()
def look(model: Any, tokenizer: Any) -> Look:
    """Look at a model: about 4,000 tokens forward, and twice 48 steps of eight texts.

    Its weights have to be in memory.
    """
    with evaluation_mode(model):
        losses, kept = _predictions(model, _windows(model, tokenizer))
        return Look(losses, kept, _repetition(model, tokenizer), _tasks(model, tokenizer))


def compared(before: Look, after: Look) -> dict[str, Any]:
    """Two looks side by side, as plain data; `warning` is one line where the model degenerates, or ''."""
    factor, error = paired(before.losses, after.losses) if before.losses else (None, None)
    both = {
        "text": "Python's language reference",
        "perplexities": [math.exp(statistics.fmean(each.losses)) if each.losses else None for each in (before, after)],
        "factor": factor,
        "factor_standard_error": error,
        "kl": _divergence(before.log_probabilities, after.log_probabilities),
        "repetition": {name: [before.repetition[name], after.repetition[name]] for name in before.repetition},
        "tasks": {name: [before.tasks[name], after.tasks[name]] for name in before.tasks},
    }
    return {**both, "warning": warning(both["repetition"])}


def warning(repetition: dict[str, list[float | None]]) -> str:
    """One line where a model repeats itself far more than the unpruned one did, or ''."""
    for name, (before, after) in repetition.items():
        if before is not None and after is not None and after - before > MORE_REPETITION:
            times = f"{after / before:.1f} × as often as" if before >= 0.02 else f"{after:.0%} of the time, unlike"
            return f"repeats itself {times} the unpruned model ({name} text): recover it, or prune less"
    return ""


def _windows(model: Any, tokenizer: Any) -> Tensor:
    """Windows (windows, length) of the second text, spread over it."""
    text = demo.language_reference(unseen=True)
    pieces, room = [], min(LENGTH, getattr(model.config, "max_position_embeddings", None) or LENGTH)
    for n in range(WINDOWS):
        start = text.index("\n", len(text) * n // WINDOWS)
        ids = without_end_token(tokenizer)(text[start : start + 8 * LENGTH], verbose=False).input_ids[:room]
        pieces.append(ids)
    length = min(map(len, pieces))
    return torch.tensor([ids[:length] for ids in pieces], dtype=torch.long).to(model.device)


def _predictions(model: Any, windows: Tensor) -> tuple[tuple[float, ...], Tensor]:
    """The loss of each window, and log-probabilities at some positions, on the CPU."""
    if windows.shape[1] < 2:
        return (), torch.zeros(0)
    losses, kept = [], []
    for batch in head_batches(windows):
        logits = model(batch, use_cache=False).logits.float()
        every = max(1, -(-4 * windows.numel() * logits.shape[-1] // KEPT_BYTES))
        each = torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), batch[:, 1:], reduction="none")
        losses += each.mean(1).tolist()
        kept.append(torch.log_softmax(logits[:, ::every], -1).cpu())
    return tuple(losses), torch.cat(kept)


def _divergence(before: Tensor, after: Tensor) -> float | None:
    """KL(before || after) in nats a token; None where the vocabulary is another."""
    if not before.numel() or before.shape != after.shape:
        return None
    return (before.exp() * (before - after)).sum(-1).mean().item()


def _repetition(model: Any, tokenizer: Any) -> dict[str, float | None]:
    encode = without_end_token(tokenizer)
    ids = [encode(prompt).input_ids for prompt in PROMPTS]
    length = min(map(len, ids))
    most = (getattr(model.config, "max_position_embeddings", None) or math.inf) - length
    if length < 1 or most < NEW_TOKENS:
        return {"greedy": None, "sampled": None}
    start = torch.tensor([prompt[:length] for prompt in ids]).to(model.device)  # cut alike: no padding
    written = {"greedy": tokens_after(model, start, NEW_TOKENS)}
    with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(0)
        written["sampled"] = tokens_after(model, start, NEW_TOKENS, temperature=TEMPERATURE)
    return {name: variety(rows.tolist())["repetition"] for name, rows in written.items()}


@cache
def questions() -> dict[str, list[tuple[str, str]]]:
    """Small tasks: for each its questions, with `SHOTS` solved ones before them, and the answers."""
    words = ["apple", "river", "stone", "candle", "garden", "window", "paper", "forest", "bridge", "mirror"]
    solved = {
        "copying": [(f"Say: {a} {b}\nSaid: {a}", f" {b}") for a, b in zip(words, words[3:] + words[:3], strict=True)],
        "counting": [(f"{n}, {n + 1}, {n + 2}, {n + 3},", f" {n + 4}") for n in (3, 11, 24, 7, 40, 15, 62, 31, 86, 53)],
        "sums": [
            (f"{a} + {b} =", f" {a + b}")
            for a, b in ((2, 3), (4, 1), (6, 2), (3, 3), (5, 4), (1, 7), (2, 6), (4, 4), (3, 5), (2, 2))
        ],
    }
    return {
        task: [
            ("\n".join([*(q + a for q, a in pairs[:SHOTS]), question]), answer) for question, answer in pairs[SHOTS:]
        ]
        for task, pairs in solved.items()
    }


def _tasks(model: Any, tokenizer: Any) -> dict[str, float]:
    """The share of answers that greedy text would give:
    each token of the answer is the likeliest after all before it."""
    return {
        name: statistics.fmean(_right(model, tokenizer, *each) for each in asked) for name, asked in questions().items()
    }


def _right(model: Any, tokenizer: Any, question: str, answer: str) -> bool:
    encode = without_end_token(tokenizer)
    before, whole = encode(question).input_ids, encode(question + answer).input_ids
    start = next((n for n, (a, b) in enumerate(zip(before, whole, strict=False)) if a != b), len(before))
    if not 0 < start < len(whole) or len(whole) > (getattr(model.config, "max_position_embeddings", None) or math.inf):
        return False
    ids = torch.tensor([whole]).to(model.device)
    likeliest = model(ids, use_cache=False, logits_to_keep=len(whole) - start + 1).logits[0, :-1].argmax(-1)
    return likeliest.tolist() == whole[start:]
