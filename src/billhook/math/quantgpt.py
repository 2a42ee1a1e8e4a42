"""QuantGPT: weights trained on the levels that they will be packed on (Tao et al. 2022, arXiv:2203.10705).

A weight W stays in float32 and is used as W^, its nearest on the grid.  For n entries that share a scale, with the mean
magnitude m = ||w||_1 / n and a learned gamma:

    d  = gamma m, rounded to float16                  the step (module-wise dynamic scaling)
    w^ = d q,  q = round(clip(u)),  u = w / d         clipped to the lowest and the highest level

Backward, straight through the rounding, with entries inside and outside of the clip:

    dL/dw = dL/dw^ inside, 0 outside                  dL/dd = sum dL/dw^ (q - u) inside, sum dL/dw^ q outside

Where this differs from the paper, whose body was not at hand (a note and the abstract were).  Its gamma scales the
clip, which is the step times the highest level, and is one number a module; here it may be one for each block, too.  m
counts as a constant in the backward pass.  `token_contrast` has no memory bank of the student's states, which smooths
them over passes: a window is mostly read once.
"""

from typing import Any

import torch
from torch import Tensor

from billhook.tensors import States

PACE = 10.0  # gamma = gamma_0 exp(PACE x): x moves at the weights' rate, gamma ten times as fast, and keeps its sign
TEMPERATURE = 0.1


class _Nearest(torch.autograd.Function):
    """W^ of W (…, n), by steps (…, 1) and the lowest and the highest level."""

    @staticmethod
    def forward(ctx: Any, W: Tensor, steps: Tensor, lowest: int, highest: int) -> Tensor:
        d = steps.half().float()
        ctx.save_for_backward(W, d)
        ctx.levels = lowest, highest
        return _levels(W, d).round().clamp(lowest, highest) * d

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor, Tensor, None, None]:
        (slope,), (W, d), (lowest, highest) = slopes, ctx.saved_tensors, ctx.levels
        u = _levels(W, d)
        inside = (u >= lowest) & (u <= highest)
        q = u.round().clamp(lowest, highest)
        return slope * inside, (slope * (q - u * inside)).sum(-1, keepdim=True), None, None


def _levels(W: Tensor, d: Tensor) -> Tensor:
    """u; a step of zero has the level 0 alone."""
    return W / torch.where(d == 0, torch.inf, d)


def nearest(W: Tensor, gamma: Tensor, lowest: int, highest: int) -> Tensor:
    """W^ of weights whose last dimension shares a scale, float32, with the gradients above.

    Args:
        W: (…, n).
        gamma: (…, 1), signed: a negative one turns the levels round.
    """
    m = W.detach().abs().mean(-1, keepdim=True)
    return _Nearest.apply(W, gamma * m, lowest, highest)


def token_contrast(states: States, teacher: States) -> Tensor:
    """Token-level contrastive distillation: -log of what a token's own teacher state has of all in its row.

        -log exp(cos(s_i, t_i) / tau) / sum_j exp(cos(s_i, t_j) / tau),  tau = TEMPERATURE

    Args:
        states: the student's last states, projected.
        teacher: the teacher's of the same tokens, projected alike.

    Returns:
        the mean over tokens, in nats: 0 where every state is its own teacher's alone, ln of the row's length by chance.
    """
    own, others = (torch.nn.functional.normalize(one.float(), dim=-1) for one in (states, teacher))
    alike = own @ others.mT / TEMPERATURE
    place = torch.arange(alike.shape[-1], device=alike.device).expand(len(alike), -1)
    return torch.nn.functional.cross_entropy(alike.flatten(0, 1), place.flatten())
