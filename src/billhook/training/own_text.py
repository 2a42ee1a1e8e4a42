"""Text that a model writes itself, to train a cut one on: other text would let it forget what it says by itself.

Self-distillation (arXiv:2410.09982): every other window goes on from the first words of a text, the others from what
stands before a user's words in the model's chat template, so that it writes questions and answers; all of them from
words of a text where there is no template.
"""

from typing import Any

import torch
from torch import Tensor

from billhook.models.greedy import tokens_after
from billhook.runtime.progress import Tick, quiet
from billhook.runtime.special_tokens import special_ids
from billhook.tensors import Tokens

BEGUN = 8  # tokens of a text that are gone on from
ROWS = 16  # windows that are written at once
MARK = "\u2603"  # stands for what a user says
STAGE = "writing text"


def own_windows(model: Any, tokenizer: Any, begun: Tokens, seed: int, tick: Tick = quiet) -> Tokens:
    """As many windows as `begun` has, (windows, length), sampled from the model's own probabilities.

    Args:
        begun: windows of a text, whose first tokens are gone on from.
        seed: of the sampling.
    """
    start, length = chat_start(tokenizer), begun.shape[1]
    chat, text = (begun[1::2], begun[::2]) if start and len(start) < length else (begun[:0], begun)
    begins = [text[:, : min(BEGUN, length - 1)], torch.tensor(start or [0]).expand(len(chat), -1)]
    parts = [part for each in begins for part in each.split(ROWS) if len(part)]
    written, whole = [], len(parts)
    with torch.random.fork_rng(), torch.inference_mode():
        torch.manual_seed(seed)
        for n, part in enumerate(parts):
            tick(STAGE, n, whole)
            after = tokens_after(model, part.to(model.device), length - part.shape[1], temperature=1.0)
            written.append(torch.cat([part, after.cpu()], 1))
    tick(STAGE, whole, whole)
    both = torch.cat(written)
    order = torch.cat([torch.arange(len(text)) * 2, torch.arange(len(chat)) * 2 + 1]) if len(chat) else None
    return both if order is None else both[order.argsort()]


def chat_start(tokenizer: Any) -> list[int]:
    """The tokens that stand before a user's words in the chat template; none without a template."""
    if not getattr(tokenizer, "chat_template", None):
        return []
    text = tokenizer.apply_chat_template([{"role": "user", "content": MARK}], tokenize=False)
    ids, leading = tokenizer(text.partition(MARK)[0], add_special_tokens=False).input_ids, special_ids(tokenizer)[0]
    return ids if ids[: len(leading)] == leading else [*leading, *ids]


def among(windows: Tokens, own: Tensor) -> Tokens:
    """Windows of a text, the last of which have made room for `own`, evenly spread among them."""
    total, count = len(windows), len(own)
    is_own = torch.zeros(total, dtype=torch.bool)
    is_own[torch.arange(count) * total // max(1, count)] = True
    mixed = windows.clone()
    mixed[~is_own], mixed[is_own] = windows[: total - count], own
    return mixed
