"""What minutes of training buy on this machine, and what that calls for."""

from dataclasses import dataclass
from typing import Any

import torch

from billhook.checkpoints import load
from billhook.choices import MEASURING_SECONDS
from billhook.errors import BillhookError
from billhook.math import layer_presets
from billhook.models.axes import axes
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


@dataclass(frozen=True)
class Advice:
    """What a budget of tokens calls for, as measured on SmolLM2-135M (docs/LOG.md)."""

    tokens: int  # the least tokens that it holds for
    layers: bool  # whether whole layers go
    prune: str  # options of `billhook prune MODEL --ratio R`
    recover: bool  # whether to train afterwards
    why: str


ADVICE = (  # the first row that holds is taken
    Advice(
        10_000,
        True,
        "--method layerchop --patch linear",
        True,
        "whole layers, patched in closed form, and distillation (at 20 %: 1.46 times the unpruned perplexity before "
        "training, 1.30 after 50k tokens; narrower layers 1.72 and, after 200k, 1.49 on the same windows)",
    ),
    Advice(
        10_000,
        False,
        "",
        True,
        "what costs least before training, then distillation (at 20 % equal widths, one of the cuts tried, went from 1.57 "
        "times the unpruned perplexity to 1.35 with 200k tokens)",
    ),
    Advice(
        0,
        False,
        "",
        False,
        "too few tokens to train on: what costs least without (of the cuts tried at 20 %: layers patched 1.46 times the "
        "unpruned perplexity, equal widths 1.57; where clients load layers that differ, add --layout per_layer: uneven "
        "widths have 1.36)",
    ),
)


def forecast(
    name: str,
    ratio: float | int,
    minutes: float | int,
    *,
    seq_len: int = 512,
    device: str = "auto",
    seconds: float | int = MEASURING_SECONDS,
    tick: Tick = quiet,
) -> dict[str, Any]:
    """How fast a model of the size asked for trains here, how many tokens the minutes buy, and the commands to run.

    The speed of training is measured on the model without its middle layers; nothing is written.

    Raises:
        BillhookError: a ratio that leaves nothing, or minutes too short for one window.
    """
    if not 0 < ratio < 1:
        raise BillhookError(f"ratio {ratio:g}: give a share between 0 and 1")
    opened = load.open_model(name, device=device, dtype="float32", tick=tick)
    load.check_positions(opened, seq_len)
    model, autocast = opened.model, autocast_dtype("auto", opened.model.device)
    tick("measuring", 0, 2)
    teacher_pace = throughput.answering_pace(model, seq_len, 1, autocast)
    total = len(layers(model))
    patchable = all(axis.ends_layer for axis in axes(model, ("ffn",)))
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
    can_drop_layers = count > 0 and patchable
    advice = next(row for row in ADVICE if tokens >= row.tokens and (can_drop_layers or not row.layers))
    tokens = tokens // 1000 * 1000 or tokens
    commands = [f"billhook prune {name} --ratio {ratio:g} {advice.prune} -o smaller"]
    if advice.recover:
        commands.append(
            f"billhook recover smaller --teacher {name} --tokens {tokens} --trainable {trainable} --seq-len {seq_len} "
            "-o healed"
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
        "why": advice.why,
        "commands": commands,
    }
