"""A GGUF's rotary position embedding as transformers' rope_parameters, and what a GGUF says of those.

llama.cpp keeps a factor for each frequency in a tensor, where transformers computes them from a few numbers (`llama3`).
The numbers are found again; where none fit, the factors themselves are kept, as in `longrope`, for short and long texts
alike.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

Rope = dict[str, Any]
NONE, LINEAR, YARN, LONG = "none", "linear", "yarn", "longrope"
SCALING_TYPES = (NONE, LINEAR, YARN, LONG)
FACTORS, SHORT_FACTORS, LONG_FACTORS = (f"rope_{name}.weight" for name in ("freqs", "factors_short", "factors_long"))
CLOSE = 2e-6  # relative tolerance, since factors are stored in float32
USUAL = 1.0, 4.0  # low_freq_factor and high_freq_factor of every published model with this scaling
CONTEXTS = [8192, *(2**n for n in range(4, 21) if n != 13)]  # original_max_position_embeddings, the usual one first


def parameters(
    kind: str, base: float, scaling: Mapping[str, float], positions: int, factors: Mapping[str, Tensor]
) -> Rope:
    """transformers' `rope_parameters`.

    Args:
        kind: one of SCALING_TYPES.
        base: base of the frequencies.
        scaling: the file's numbers under `rope.scaling.`.
        positions: how many positions the model has.
        factors: the file's tensors of FACTORS, SHORT_FACTORS and LONG_FACTORS, each (rotated / 2,).

    Raises:
        ValueError: transformers cannot compute this; names the field or tensor.
    """
    return {"rope_theta": base, **_scaling(kind, base, scaling, positions, factors)}


def _scaling(
    kind: str, base: float, scaling: Mapping[str, float], positions: int, factors: Mapping[str, Tensor]
) -> Rope:
    original, factor = int(scaling.get("original_context_length", positions)), scaling.get("factor", 0.0) or 1.0
    attention = scaling.get("attn_factor", 1.0)
    yarn = {key: value for key, value in scaling.items() if key.startswith("yarn_")}
    if FACTORS in factors and (kind not in (NONE, LINEAR) or factor != 1.0):
        raise ValueError(f"tensor {FACTORS} beside rope.scaling.type {kind!r} and factor {factor:g}")
    if (SHORT_FACTORS in factors or LONG_FACTORS in factors) != (kind == LONG):
        raise ValueError(f"rope.scaling.type {kind!r} with {' and '.join(factors) or f'no {SHORT_FACTORS}'}")
    if kind != YARN and any(yarn.values()):
        raise ValueError(f"rope.scaling.{next(iter(yarn))} beside rope.scaling.type {kind!r}")
    if kind in (NONE, LINEAR) and attention != 1.0:
        raise ValueError(f"rope.scaling.attn_factor {attention:g} beside rope.scaling.type {kind!r}")
    if kind == LONG:
        return _long(factors.get(SHORT_FACTORS), factors.get(LONG_FACTORS), original, attention)
    if kind == YARN:
        return _yarn(yarn, factor, original, attention)
    if FACTORS in factors:
        return _by_frequency(factors[FACTORS], base, original)
    return {"rope_type": "linear", "factor": factor} if kind == LINEAR and factor != 1.0 else {"rope_type": "default"}


def _long(short: Tensor | None, long: Tensor | None, original: int, attention: float) -> Rope:
    if short is None or long is None:
        raise ValueError(f"only one of {SHORT_FACTORS} and {LONG_FACTORS}")
    factors = {"short_factor": short.tolist(), "long_factor": long.tolist()}
    return {"rope_type": LONG, **factors, "original_max_position_embeddings": original, "attention_factor": attention}


def _yarn(scaling: Mapping[str, float], factor: float, original: int, attention: float) -> Rope:
    """llama.cpp multiplies the attention factor that transformers computes by the one in the file."""
    for key, usual in (("yarn_ext_factor", 1.0), ("yarn_attn_factor", 1.0), ("yarn_log_multiplier", 0.0)):
        if scaling.get(key, usual) != usual:
            raise ValueError(f"rope.scaling.{key} {scaling[key]:g}")
    betas = {key: scaling[f"yarn_{key}"] for key in ("beta_fast", "beta_slow") if scaling.get(f"yarn_{key}")}
    attention_factor = (
        {} if attention == 1.0 else {"attention_factor": attention * (0.1 * math.log(max(factor, 1.0)) + 1.0)}
    )
    return {
        "rope_type": YARN,
        "factor": factor,
        "original_max_position_embeddings": original,
        **betas,
        **attention_factor,
    }


def _by_frequency(factors: Tensor, base: float, original: int) -> Rope:
    """The `llama3` scaling that has these factors; else one that keeps the factors themselves."""
    lengths = 2 * math.pi * base ** (torch.arange(len(factors)).double() / len(factors))  # wavelengths in tokens
    for rope in _candidates(factors.double(), lengths, original):
        if torch.allclose(_factors(lengths, rope), factors.double(), rtol=CLOSE, atol=0):
            return rope
    return _long(factors, factors, original, 1.0)


def _candidates(factors: Tensor, lengths: Tensor, context: int) -> Iterator[Rope]:
    """Scalings that may have these factors, which show only ratios to the context; the usual ones come first."""
    if factors.max() <= 1 + CLOSE:
        yield {"rope_type": "default"}
    factor = float(factors.max())
    factor = float(round(factor)) if abs(factor - round(factor)) <= CLOSE * factor else factor
    between = (factors > 1 + CLOSE) & (factors < factor * (1 - CLOSE))
    for original in (*CONTEXTS, context):
        yield _llama3(factor, *USUAL, original)
    # where 1 / f is linear in 1 / length, the share that stays is (original / length - low) / (high - low)
    if between.sum() > 1:
        stays = (1 / factors[between] - 1 / factor) / (1 - 1 / factor)
        x = 1 / lengths[between]
        slope = float((stays[-1] - stays[0]) / (x[-1] - x[0]))
        low = float(slope * x[0] - stays[0])  # low / (high - low)
        if slope > 0 and low > 0:
            yield _llama3(factor, low * context / slope, (low + 1) * context / slope, context)


def _llama3(factor: float, low: float, high: float, original: int) -> Rope:
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }


def _factors(lengths: Tensor, rope: Rope) -> Tensor:
    """The factors that transformers divides the frequencies by."""
    if rope["rope_type"] == "default":
        return torch.ones_like(lengths)
    low, high, original = (
        rope[key] for key in ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    )
    stays = ((original / lengths - low) / (high - low)).clamp(0, 1)
    return 1 / (stays + (1 - stays) / rope["factor"])


def kind_of(config: Any) -> str:
    """The type of a model's rotary positions, as `Architecture.ropes` names them."""
    rope = config.rope_parameters
    if "rope_theta" not in rope:
        return "per layer type"
    kind = rope.get("rope_type", "default")
    if kind == LONG and rope["short_factor"] == rope["long_factor"] and rope.get("attention_factor") == 1.0:
        return "factors"
    return "partial" if rope.get("partial_rotary_factor", 1.0) != 1.0 else kind


def factors_of(config: Any, head_dim: int) -> Tensor:
    """The factors that the head_dim / 2 frequencies of plain RoPE are divided by.

    They are computed anew, since a cast may have rounded the model's buffer.
    """
    plain = config.rope_parameters["rope_theta"] ** (-torch.arange(0, head_dim, 2).float() / head_dim)
    scaled, _ = ROPE_INIT_FUNCTIONS[config.rope_parameters["rope_type"]](config, torch.device("cpu"))
    return plain / scaled
