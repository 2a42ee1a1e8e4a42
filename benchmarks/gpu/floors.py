"""What work costs at least: operations and bytes, counted, over the rates of a card.

An operation is a multiplication or an addition; a matrix product of (m, k) and (k, n) has 2 m k n.  Bytes are those of
weights, caches and optimiser state, each read or written once where it must be.  No version can be much faster than
the larger of the two times.  Operations of different arithmetic add up: they share the same units.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from billhook.evaluation.speed import synchronise
from billhook.planning.sensitivity import POINTS

HALF = 2  # bytes of a bfloat16
STREAMS = {"dense": 1, "sequential": 2, "dense_target": 3}  # how often a walk takes the text through each layer
ADMM_STEPS = 20


@dataclass(frozen=True)
class Card:
    """A device's rates: operations a second by arithmetic, and bytes a second through its memory."""

    name: str
    bf16: float
    float32: float
    float64: float
    bandwidth: float


# makers' data sheets, dense, matrix units where they count
DATASHEETS = {
    "h100": Card("H100 SXM, data sheet", 989e12, 67e12, 67e12, 3.35e12),
    "h200": Card("H200 SXM, data sheet", 989e12, 67e12, 67e12, 4.8e12),
    "4090": Card("RTX 4090, data sheet", 165e12, 83e12, 1.3e12, 1.01e12),
}


def measured(device: torch.device, size: int, copied: int) -> Card:
    """The rates of square products of random numbers, and of a copy of `copied` bytes, read and written."""

    def rate(dtype: torch.dtype) -> float:
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        return 2 * size**3 / seconds(lambda: a @ b, device, 5)

    source = torch.empty(copied, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    bandwidth = 2 * copied / seconds(lambda: target.copy_(source), device, 5)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return Card(name, rate(torch.bfloat16), rate(torch.float32), rate(torch.float64), bandwidth)


def seconds(act: Callable[[], Any], device: torch.device, repeats: int) -> float:
    """Seconds of one of `repeats` runs after each other, the first, which is not counted, left out."""
    act()
    synchronise(device)
    start = time.perf_counter()
    for _ in range(repeats):
        act()
    synchronise(device)
    return (time.perf_counter() - start) / repeats


@dataclass(frozen=True)
class Work:
    """Operations by arithmetic, and bytes that move."""

    bf16: float = 0.0
    float32: float = 0.0
    float64: float = 0.0
    moved: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(
            self.bf16 + other.bf16,
            self.float32 + other.float32,
            self.float64 + other.float64,
            self.moved + other.moved,
        )

    def __mul__(self, times: float | int) -> Work:
        return Work(self.bf16 * times, self.float32 * times, self.float64 * times, self.moved * times)

    def seconds(self, card: Card) -> float:
        """The least time on a card."""
        computing = self.bf16 / card.bf16 + self.float32 / card.float32 + self.float64 / card.float64
        return max(computing, self.moved / card.bandwidth)


@dataclass(frozen=True)
class Shape:
    """The sizes of a model; its attention has as many KV heads as heads."""

    name: str
    layers: int
    hidden: int
    width: int  # FFN channels
    heads: int
    vocabulary: int
    family: str = "llama"

    @property
    def ffn(self) -> int:
        """Weights of one FFN: gate, up and down, or two matrices."""
        return (3 if self.family == "llama" else 2) * self.hidden * self.width

    @property
    def layer(self) -> int:
        """Weights of one decoder layer."""
        return 4 * self.hidden**2 + self.ffn

    @property
    def head(self) -> int:
        return self.vocabulary * self.hidden

    def gone(self, ratio: float) -> int:
        """FFN channels of a layer that go where `ratio` of the decoder does."""
        return round(ratio * self.layer / self.ffn * self.width)


def forward(shape: Shape, tokens: int, length: int, *, head: bool = False, width: float | None = None) -> Work:
    """One pass of windows of `length` tokens, causal; the weights are read once.

    Args:
        head: whether the logits of every token are computed.
        width: FFN channels, on average, if not the shape's.
    """
    ffn = shape.ffn * (1 if width is None else width / shape.width)
    weights = shape.layers * (4 * shape.hidden**2 + ffn)
    attention = shape.layers * 2 * tokens * length * shape.hidden  # scores and values, half of each: causal
    logits = shape.head if head else 0
    return Work(bf16=2 * tokens * (weights + logits) + attention, moved=HALF * (weights + logits))


def gram(width: int, tokens: int) -> Work:
    """X^T X, half of which says all."""
    return Work(bf16=tokens * width**2)


def factor(size: int) -> Work:
    """A Cholesky factor; the inverse of a triangle takes as much."""
    return Work(float64=size**3 / 3)


def fasp_layer(shape: Shape, gone: int) -> Work:
    """Score, restoration and errors of one FFN's reader, in float64."""
    out, size, kept = shape.hidden, shape.width, shape.width - gone
    fit = factor(kept) + Work(float64=2 * out * gone * kept + 2 * out * kept**2)
    errors = Work(float64=4 * out * size**2 + out * gone**2)  # W^T W against a Gram, half of which says all
    return factor(size) * 2 + fit * 2 + errors  # a fit without the held-out windows judges the other


def fasp(shape: Shape, tokens: int, length: int, ratio: float, stream: str) -> Work:
    """FASP on FFNs: passes, Grams, and what is solved."""
    each = gram(shape.width, tokens) + fasp_layer(shape, shape.gone(ratio))
    return forward(shape, tokens, length) * STREAMS[stream] + each * shape.layers


def zeros(shape: Shape, tokens: int, length: int, method: str) -> Work:
    """N:M zeros in every weight, layers in sequence: two passes, four Grams a layer, a solver for each weight."""
    weights = [(shape.hidden, shape.hidden)] * 4 + [(shape.width, shape.hidden)] * 2 + [(shape.hidden, shape.width)]
    grams = gram(shape.hidden, tokens) * 3 + gram(shape.width, tokens)
    solved = Work()
    for out, size in weights if method != "wanda" else ():
        solved += factor(size) * 2 + Work(float32=out * size**2)  # the sweep updates half of the matrix on average
        if method == "admm":
            solved += factor(size) * 3 + Work(float32=ADMM_STEPS * 2 * out * size**2)
    return forward(shape, tokens, length) * 2 + (grams + solved) * shape.layers


def curves(shape: Shape, tokens: int, length: int, probes: int) -> Work:
    """Sensitivity of FFNs: one pass with Grams; at every layer each count is fitted, and the probes go to the end."""
    tried = forward(shape, probes, length) * ((shape.layers + 1) / 2) + Work(
        bf16=2 * probes * shape.head * shape.layers
    )
    fits = Work()
    for share in POINTS:
        gone = round(share * shape.width)
        kept = shape.width - gone
        fits += factor(shape.width) * 2 + factor(kept) + Work(float64=2 * shape.hidden * (gone * kept + kept**2))
    once = forward(shape, tokens, length) + gram(shape.width, tokens) * shape.layers
    return once + tried * len(POINTS) + fits * shape.layers


def training(shape: Shape, tokens: int, length: int) -> Work:
    """A step: forward and backward, and AdamW on float32 weights, of which it reads four tensors and writes three."""
    weights = shape.layers * shape.layer + shape.head
    return forward(shape, tokens, length, head=True) * 3 + Work(moved=7 * 4 * weights)


def decoding(shape: Shape, batch: int, context: int, width: float | None = None) -> Work:
    """One more token in every row of a batch: the weights are read, and the cache."""
    cache = HALF * 2 * shape.layers * shape.hidden * context * batch
    return forward(shape, batch, context, head=True, width=width) + Work(moved=cache)
