"""Plain greedy text: the likeliest token each time, whatever a checkpoint's generation_config.json asks of `generate`.

A setting of that file may need what a caller does not have (stop strings), return another type, or prefer other tokens
(penalties): comparisons of models, and of clients, are of the models alone.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig


@contextmanager
def without_generation_settings(model: Any) -> Iterator[None]:
    """`model.generate` by its own defaults, with none of the model's settings, which it would fill in for what is not given."""
    own = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own


def greedy_tokens(
    model: Any, ids: Tensor, new_tokens: int, end_tokens: Sequence[int] = (), use_cache: bool = True
) -> Tensor:
    """The tokens that follow `ids`, (rows, tokens) of one length: (rows, at most `new_tokens`).

    Args:
        ends: the tokens that end a row, filled up with the first of them; without any, nothing does.
    """
    settings = GenerationConfig(
        max_new_tokens=new_tokens,
        do_sample=False,
        use_cache=use_cache,
        eos_token_id=list(end_tokens) or None,
        pad_token_id=end_tokens[0] if end_tokens else None,
    )
    with without_generation_settings(model):
        made = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings)
    return made[:, ids.shape[1] :]


def ends(model: Any) -> list[int]:
    """The tokens that end a text, as generation_config.json says, or else config.json."""
    for config in (model.generation_config, model.config):
        said = getattr(config, "eos_token_id", None)
        found: list[Any] = said if isinstance(said, list) else [said]
        if found and all(type(one) is int and one >= 0 for one in found):
            return found
    return []
