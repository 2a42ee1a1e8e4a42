"""What a model writes by itself: multiple choice and perplexity can look fine where it only repeats itself."""

import math
from collections.abc import Sequence
from typing import Any

import torch

from billhook.models.greedy import end_tokens_of, greedy_tokens
from billhook.runtime.special_tokens import without_end_token

PROMPTS = (
    "The capital of France is",
    "Water boils when",
    "Once upon a time, in a small village by the sea,",
    "To make a good cup of tea, first",
    "The most important invention of the last century was",
)
NEW_TOKENS = 48
REPETITION = 4  # tokens in a row: Welleck et al. 2020, seq-rep-4
DISTINCT = (1, 2, 3)  # Li et al. 2016, distinct-n


def continuations(
    model: Any, tokenizer: Any, prompts: Sequence[str] = PROMPTS, new_tokens: int = NEW_TOKENS
) -> tuple[list[str], dict[str, float | None]]:
    """Plain greedy continuations, the prompts excluded, and what `variety` says of their tokens."""
    texts, written = [], []
    encode, last = without_end_token(tokenizer), end_tokens_of(model)
    for prompt in prompts:
        given = encode(prompt).input_ids
        room = getattr(model.config, "max_position_embeddings", math.inf) - len(given)
        ids: list[int] = []
        if given and room > 0:
            start, most = torch.tensor([given], device=model.device), new_tokens if room > new_tokens else int(room)
            ids = greedy_tokens(model, start, most, last)[0].tolist()
        written.append(ids)
        texts.append(tokenizer.decode(ids, skip_special_tokens=True))
    return texts, variety(written)


def variety(written: Sequence[Sequence[int]]) -> dict[str, float | None]:
    """How much token sequences repeat themselves.

    Returns:
        `repetition`: the share of a text's runs of 4 tokens that occurred in it before, mean over the texts that hold one;
        `distinct_n`: different runs of n tokens over all runs, all texts together.  None where there is no such run.
    """
    repeated = [1 - len(set(runs)) / len(runs) for ids in written if (runs := _runs(ids, REPETITION))]
    found: dict[str, float | None] = {"repetition": sum(repeated) / len(repeated) if repeated else None}
    for n in DISTINCT:
        runs = [run for ids in written for run in _runs(ids, n)]
        found[f"distinct_{n}"] = len(set(runs)) / len(runs) if runs else None
    return found


def _runs(ids: Sequence[int], n: int) -> list[tuple[int, ...]]:
    return [tuple(ids[start : start + n]) for start in range(len(ids) - n + 1)]
