"""What a model writes: a model that only repeats itself can look fine by multiple choice and perplexity."""

import math
from collections.abc import Sequence
from typing import Any

import torch

from billhook.choices import NEW_TOKENS
from billhook.models.greedy import end_tokens_of, greedy_tokens
from billhook.runtime.special_tokens import without_end_token

PROMPTS = (
    "The capital of France is",
    "Water boils when",
    "Once upon a time, in a small village by the sea,",
    "To make a good cup of tea, first",
    "The most important invention of the last century was",
)
REPETITION = 4  # tokens of a run: seq-rep-4 (Welleck et al. 2020)
DISTINCT = (1, 2, 3)  # values of n in distinct-n (Li et al. 2016)


def continuations(
    model: Any, tokenizer: Any, prompts: Sequence[str] = PROMPTS, new_tokens: int = NEW_TOKENS
) -> tuple[list[str], dict[str, float | None]]:
    """Plain greedy continuations without their prompts, and the `variety` of their tokens."""
    texts, written = [], []
    encode, end_tokens = without_end_token(tokenizer), end_tokens_of(model)
    for prompt in prompts:
        prompt_ids = encode(prompt).input_ids
        room = getattr(model.config, "max_position_embeddings", math.inf) - len(prompt_ids)
        ids: list[int] = []
        if prompt_ids and room > 0:
            start, count = (
                torch.tensor([prompt_ids], device=model.device),
                new_tokens if room > new_tokens else int(room),
            )
            ids = greedy_tokens(model, start, count, end_tokens)[0].tolist()
        written.append(ids)
        texts.append(tokenizer.decode(ids, skip_special_tokens=True))
    return texts, variety(written)


def variety(written: Sequence[Sequence[int]]) -> dict[str, float | None]:
    """How much token sequences repeat themselves.

    Returns:
        `repetition`: the share of a text's runs of 4 tokens that occurred in it before, mean over the texts that hold
        one;
        `distinct_n`: different runs of n tokens over all runs, all texts together.  None where there is no such run.
    """
    repeated = [1 - len(set(runs)) / len(runs) for ids in written if (runs := _runs(ids, REPETITION))]
    result: dict[str, float | None] = {"repetition": sum(repeated) / len(repeated) if repeated else None}
    for n in DISTINCT:
        runs = [run for ids in written for run in _runs(ids, n)]
        result[f"distinct_{n}"] = len(set(runs)) / len(runs) if runs else None
    return result


def _runs(ids: Sequence[int], n: int) -> list[tuple[int, ...]]:
    return [tuple(ids[start : start + n]) for start in range(len(ids) - n + 1)]
