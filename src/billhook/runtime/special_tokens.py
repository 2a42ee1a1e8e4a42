"""Special tokens that a tokenizer adds to a text by itself: the token that begins it, the one that ends it."""

import copy
from typing import Any

from tokenizers import processors


def special_ids(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The ids that `tokenizer("a")` adds before and after the letter's own; most add none, or one before."""
    bare, full = (tokenizer("a", add_special_tokens=added).input_ids for added in (False, True))
    start = next(n for n in range(len(full) + 1) if full[n : n + len(bare)] == bare or n == len(full))
    return full[:start], full[start + len(bare) :]


def begin_token_names(tokenizer: Any) -> tuple[str, ...]:
    """The tokens that begin every text, by name."""
    return tuple(map(str, tokenizer.convert_ids_to_tokens(special_ids(tokenizer)[0])))


def without_end_token(tokenizer: Any) -> Any:
    """A tokenizer that adds the same tokens before a text, and none after it: a text to be continued has not ended."""
    before, after = special_ids(tokenizer)
    if not after:
        return tokenizer
    changed = copy.deepcopy(tokenizer)
    if changed.is_fast:
        names = changed.convert_ids_to_tokens(before)
        plain = processors.TemplateProcessing(
            single=[*names, "$A"], pair=[*names, "$A", "$B"], special_tokens=list(zip(names, before, strict=True))
        )
        changed.backend_tokenizer.post_processor = plain
    else:
        changed.add_eos_token = False
    return changed
