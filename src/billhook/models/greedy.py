"""Plain greedy text: the likeliest token each time, whatever a checkpoint's generation_config.json sets for `generate`.

Settings of that file may need more than a caller has (stop strings), return another type, or prefer other tokens
(penalties).  Comparisons of models and of clients must depend on the models alone.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig


@contextmanager
def without_generation_settings(model: Any) -> Iterator[None]:
    """While open, `model.generate` has its own defaults; else it fills missing arguments from the model's settings."""
    settings = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = settings


def greedy_tokens(
    model: Any, ids: Tensor, new_tokens: int, end_tokens: Sequence[int] = (), use_cache: bool = True
) -> Tensor:
    """The greedy continuation of `ids` (rows, tokens): (rows, at most `new_tokens`).

    Args:
        end_tokens: tokens that end a row, which is then padded with the first of them; without any, no row ends early.
    """
    settings = GenerationConfig(
        max_new_tokens=new_tokens,
        do_sample=False,
        use_cache=use_cache,
        eos_token_id=list(end_tokens) or None,
        pad_token_id=end_tokens[0] if end_tokens else None,
    )
    with without_generation_settings(model):
        output = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings)
    return output[:, ids.shape[1] :]


def tokens_after(model: Any, ids: Tensor, new_tokens: int, *, temperature: float = 0.0) -> Tensor:
    """What the model writes after `ids` (rows, tokens), no row ending early: (rows, `new_tokens`).

    Args:
        temperature: of the sampling, by torch's own random numbers, from all tokens; 0 takes the likeliest.
    """
    drawn = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature else {}
    settings = GenerationConfig(max_new_tokens=new_tokens, min_new_tokens=new_tokens, pad_token_id=0, **drawn)
    with without_generation_settings(model):
        output = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings)
    return output[:, ids.shape[1] :]


def end_tokens_of(model: Any) -> list[int]:
    """The tokens that end a text, by generation_config.json or else config.json."""
    for config in (model.generation_config, model.config):
        value = getattr(config, "eos_token_id", None)
        ids: list[Any] = value if isinstance(value, list) else [value]
        if ids and all(type(number) is int and number >= 0 for number in ids):
            return ids
    return []
