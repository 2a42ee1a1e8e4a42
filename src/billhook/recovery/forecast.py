"""What minutes of training buy on this machine, and what that calls for."""

import shlex
from typing import Any

import torch

from billhook.checkpoints import load
from billhook.choices import MEASURING_SECONDS
from billhook.errors import BillhookError
from billhook.math import layer_presets
from billhook.models.families import layers
from billhook.models.surgery import drop_layers
from billhook.recovery.budget import OTHER_RATES, affordable_tokens
from billhook.runtime.memory import free_bytes
from billhook.runtime.precision import autocast_dtype
from billhook.runtime.progress import Tick, quiet
from billhook.training import throughput, trainables

STATE_BYTES = 16  # bytes a trained parameter takes in float32: itself, its gradient, Adam's two moments
FROZEN_BYTES = 4  # bytes a frozen parameter takes in float32
ROOM = 0.8  # share of free memory that parameters may take; activations need some, too


TRAINED_FROM = 10_000  # tokens below which training is not worth its setting up
WHY = {  # what a budget of tokens calls for, as measured on SmolLM2-135M at 20 % (docs/LOG.md)
    True: "the best cut, then distillation (at 20 %: 1.33 times the unpruned perplexity before training, 1.29 after 17k "
    "tokens; narrower layers alone 1.72 and, after 200k, 1.49)",
    False: "too few tokens to train on: the best cut alone (at 20 %: 1.33 times the unpruned perplexity)",
}


def forecast(
    name: str,
    ratio: float | int,
    minutes: float | int,
    *,
    seq_len: int = 512,
    seconds: float | int = MEASURING_SECONDS,
    tick: Tick = quiet,
    **opens: Any,
) -> dict[str, Any]:
    """How fast a model of the size asked for trains here, how many tokens the minutes buy, and the commands to run.

    The speed of training is measured on the model without its middle layers; nothing is written.

    Args:
        opens: `device` and `family_row`, as `billhook.checkpoints.load.open_model` has them.

    Raises:
        BillhookError: a ratio that leaves nothing, or minutes too short for one window.
    """
    if not 0 < ratio < 1:
        raise BillhookError(f"ratio {ratio:g}: give a share between 0 and 1")
    opened = load.open_model(name, dtype="float32", tick=tick, **opens)
    load.check_positions(opened, seq_len)
    model, autocast = opened.model, autocast_dtype("auto", opened.model.device)
    tick("measuring", 0, 2)
    teacher_pace = throughput.answering_pace(model, seq_len, 1, autocast)
    total = len(layers(model))
    count = min(round(ratio * total), total - 2)
    if count > 0:
        drop_layers(model, layer_presets.middle(total, count))
    size = sum(param.numel() for param in model.parameters())
    free = ROOM * free_bytes(model.device)
    trainable = "decoder" if size * (STATE_BYTES - FROZEN_BYTES) < free else "lora"
    trained_model = trainables.TRAINERS[trainable](model, None, 32)
    tick("measuring", 1, 2)
    pace = throughput.training_pace(trained_model, seq_len, 1, autocast, seconds)
    tick("measuring", 2, 2)
    tokens = affordable_tokens(60 * minutes, pace, teacher_pace, len(OTHER_RATES), seq_len)
    if tokens < seq_len:
        raise BillhookError(
            f"minutes {minutes:g}: at {pace:,.0f} tokens a second that is less than one window of {seq_len}: give more "
            "time"
        )
    trains = tokens >= TRAINED_FROM
    tokens = tokens // 1000 * 1000 or tokens
    row = f"--family-row {shlex.quote(file)} " if (file := opens.get("family_row")) else ""
    commands = [f"billhook prune {name} --ratio {ratio:g} {row}-o smaller"]
    if trains:
        commands.append(
            f"billhook recover smaller --teacher {name} --tokens {tokens} --trainable {trainable} --seq-len {seq_len} "
            f"{row}-o healed"
        )
    return {
        "model": name,
        "ratio": ratio,
        "minutes": minutes,
        "parameters": size,
        "training_tokens_per_second": pace,
        "teacher_tokens_per_second": teacher_pace,
        "precision": str(autocast or torch.float32).removeprefix("torch."),
        "device": str(model.device),
        "tokens": tokens,
        "tokens_per_parameter": tokens / size,
        "training_bytes": size * STATE_BYTES,
        "free_bytes": int(free / ROOM),
        "trainable": trainable,
        "why": WHY[trains],
        "commands": commands,
    }
