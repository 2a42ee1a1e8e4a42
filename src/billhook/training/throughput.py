"""How many tokens a second this machine trains on, and a teacher answers: what a budget in minutes buys."""

import time
from typing import Any

import torch

from billhook.math.losses import most_likely, next_token
from billhook.runtime.precision import computing

TOP_K = 256  # predictions of each token that a recovery keeps by default
WARM_UP = 1  # first steps that are not counted, since they allocate gradients and optimiser state


def training_pace(model: Any, seq_len: int, rows: int, autocast: torch.dtype | None, seconds: float | int) -> float:
    """Tokens a second of forward, backward and optimiser step, measured for about `seconds`; no weight changes."""
    trained = [param for param in model.parameters() if param.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.0, weight_decay=0.0)
    tokens = _any_tokens(model, rows, seq_len)
    steps, started, ended = -WARM_UP, time.perf_counter(), 0.0
    while steps < 1 or ended - started < seconds:
        with computing(model.device, autocast):
            logits = model(tokens, use_cache=False).logits
        next_token(logits, tokens).backward()
        optimizer.step()
        optimizer.zero_grad()
        steps += 1
        _wait(model.device)
        ended = time.perf_counter()
        started = ended if steps <= 0 else started
    return steps * tokens.numel() / (ended - started)


@torch.no_grad()
def answering_pace(model: Any, seq_len: int, rows: int, autocast: torch.dtype | None) -> float:
    """Tokens a second that a teacher predicts: a forward pass and, as long on a CPU, finding the likeliest tokens."""
    tokens, started = _any_tokens(model, rows, seq_len), 0.0
    for _ in range(2):  # the first pass warms up
        started = time.perf_counter()
        with computing(model.device, autocast):
            most_likely(model(tokens, use_cache=False).logits, TOP_K)
        _wait(model.device)
    return tokens.numel() / (time.perf_counter() - started)


def _any_tokens(model: Any, rows: int, seq_len: int) -> torch.Tensor:
    tokens = torch.randint(model.config.vocab_size, (rows, seq_len), generator=torch.Generator().manual_seed(0))
    return tokens.to(model.device)


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
