"""Grids of few bits, and GPTQ on them: the levels are ggml's, zeros stay, and no sweep is worse than rounding."""

import gguf
import numpy as np
import pytest
import torch

from billhook.checkpoints.gguf.blocks import packed
from billhook.choices import NOT_GGML
from billhook.errors import BillhookError
from billhook.math import gptq, grids
from billhook.math.grids import GRIDS
from billhook.math.layerwise import Settings, Target, squared_error

ROWS, COLUMNS = 24, 96
GGML = [name for name in GRIDS if name not in NOT_GGML]


def columns(name: str) -> int:
    """Whole blocks of a type."""
    return max(COLUMNS, GRIDS[name].block)


def weight(name: str = "Q4_0") -> torch.Tensor:
    W = torch.randn(ROWS, columns(name), generator=torch.Generator().manual_seed(0))
    W[0] = 0.0  # a row of zeros has a scale of zero
    W[1] = 1.0  # and one of equal entries no range
    return W


def inputs(name: str = "Q4_0") -> torch.Tensor:
    """What enters it."""
    generator, width = torch.Generator().manual_seed(1), columns(name)
    mixing = torch.randn(width, width, generator=generator, dtype=torch.float64)
    X = torch.randn(256, width, generator=generator, dtype=torch.float64) @ mixing
    X[:, 5] = 0.0  # a dead input
    return X


@pytest.mark.parametrize("name", GGML)
def test_rounding_is_what_ggml_does(name: str) -> None:
    W, kind = weight(name), gguf.GGMLQuantizationType[name]
    ours = grids.nearest(W, GRIDS[name]).values().numpy()
    theirs = gguf.quants.dequantize(gguf.quants.quantize(W.numpy(), kind), kind)
    # ggml takes codes by the scale before float16, and we by the one that is stored: at most as far off
    assert np.square(ours - W.numpy()).sum() <= np.square(theirs - W.numpy()).sum() * (1 + 1e-6)
    assert np.abs(ours - theirs).mean() < 0.02 * np.abs(theirs).mean()


@pytest.mark.parametrize("name", GGML)
@pytest.mark.parametrize("method", ["gptq", "rtn"])
def test_a_gguf_holds_the_very_values(name: str, method: str) -> None:
    W, grid, G = weight(name), GRIDS[name], inputs(name).T @ inputs(name)
    found = gptq.quantise(W, Target(G), grid, Settings())[0] if method == "gptq" else grids.nearest(W, grid)
    stored = packed(found)
    assert stored.nbytes == found.bytes
    read = gguf.quants.dequantize(stored, gguf.GGMLQuantizationType[name])
    assert np.array_equal(read, found.values().numpy())


@pytest.mark.parametrize("name", GRIDS)
def test_gptq_is_no_further_off_than_rounding(name: str) -> None:
    W, X = weight(name), inputs(name)
    target = Target(X.T @ X)
    swept, _ = gptq.quantise(W, target, GRIDS[name], Settings())
    plain = grids.nearest(W, GRIDS[name])
    errors = [float(squared_error(one.values(), W, target).sum()) for one in (swept, plain)]
    assert errors[0] < 0.7 * errors[1]


def test_gptq_meets_a_target_of_its_own() -> None:
    W, X, generator = weight(), inputs(), torch.Generator().manual_seed(2)
    Y = X @ W.double().T + torch.randn(256, ROWS, generator=generator, dtype=torch.float64)
    followed = Target(X.T @ X, Y.T @ X, Y.square().sum(0))
    aimed, _ = gptq.quantise(W, followed, GRIDS["Q8_0"], Settings(damping=1e-6))
    blind, _ = gptq.quantise(W, Target(X.T @ X), GRIDS["Q8_0"], Settings(damping=1e-6))
    assert squared_error(aimed.values(), W, followed).sum() < squared_error(blind.values(), W, followed).sum()


@pytest.mark.parametrize("name", [name for name, grid in GRIDS.items() if not grid.offset])
def test_zeros_stay(name: str) -> None:
    W = weight(name)
    W[:, ::2] = 0.0
    zeros, X = W == 0, inputs(name)
    swept, _ = gptq.quantise(W, Target(X.T @ X), GRIDS[name], Settings(zeros=zeros))
    for found in (swept, grids.nearest(W, GRIDS[name], zeros)):
        assert bool((found.values()[zeros] == 0).all())
        assert bool((found.values()[2:, 1::2] != 0).any())


def test_a_scale_beyond_float16_is_refused() -> None:
    with pytest.raises(BillhookError, match="beyond float16"):
        grids.nearest(torch.full((1, 32), 1e7), GRIDS["Q4_0"])
