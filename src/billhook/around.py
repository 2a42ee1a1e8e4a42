"""What a tokenizer puts around a text by itself: the token that begins it, the one that ends it."""

from typing import Any


def around(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The ids that `tokenizer("a")` puts before and after the letter's own; most have none, or one before."""
    bare, full = (tokenizer("a", add_special_tokens=added).input_ids for added in (False, True))
    start = next(n for n in range(len(full) + 1) if full[n : n + len(bare)] == bare or n == len(full))
    return full[:start], full[start + len(bare) :]


def begins_with(tokenizer: Any) -> tuple[str, ...]:
    """The tokens that begin every text, by name."""
    return tuple(map(str, tokenizer.convert_ids_to_tokens(around(tokenizer)[0])))
