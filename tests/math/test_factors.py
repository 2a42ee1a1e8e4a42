"""A weight as two thin ones: what the factors lose is what their moment says, and no product of the rank loses less."""

import pytest
import torch
from torch import Tensor

from billhook.math import low_rank
from billhook.math.low_rank import MOMENTS, InputSums, block_sums

TALL, WIDE = (20, 12), (12, 20)
BLOCKS = 4


def data(outputs: int, inputs: int) -> tuple[Tensor, Tensor]:
    """A weight, and inputs (blocks, rows, in) whose directions differ in energy and whose blocks differ in mean."""
    made = torch.Generator().manual_seed(outputs)
    W = torch.randn(outputs, inputs, generator=made, dtype=torch.float64)
    X = torch.randn(BLOCKS, 30, inputs, generator=made, dtype=torch.float64) * torch.linspace(0.1, 3, inputs)
    return W, X + torch.randn(BLOCKS, 1, inputs, generator=made, dtype=torch.float64)


def sums_of(X: Tensor) -> InputSums:
    first, *others = (block_sums(x.mT @ x, x.sum(0), len(x)) for x in X)
    return sum(others, first)


def lost(W: Tensor, X: Tensor, moment: str, rank: int) -> Tensor:
    """||Y - Y_r||^2 of all rows, by the outputs themselves."""
    expand, reduce, added = low_rank.factors(W, sums_of(X), moment).at(rank)
    return (X @ W.mT - X @ (expand @ reduce).mT - added).square().sum()


def variation(X: Tensor, W: Tensor, moment: str) -> Tensor:
    """The matrix whose squared singular values are the moment's eigenvalues."""
    Y = X @ W.mT
    about = {"plain": 0.0 * Y, "whitened": 0.0 * Y, "centred": Y.mean((0, 1)), "pooled": Y.mean(1, keepdim=True)}
    return W if moment == "plain" else (Y - about[moment]).flatten(0, 1)


@pytest.mark.parametrize("shape", [TALL, WIDE])
@pytest.mark.parametrize("moment", ["whitened", "centred"])
def test_the_error_is_the_eigenvalues_that_are_dropped(moment: str, shape: tuple[int, int]) -> None:
    W, X = data(*shape)
    squares = torch.linalg.svdvals(variation(X, W, moment)).square()
    for rank in (1, 5, 11, 12):
        assert torch.allclose(lost(W, X, moment, rank), squares[rank:].sum(), rtol=1e-9, atol=1e-9 * squares.sum())


@pytest.mark.parametrize("shape", [TALL, WIDE])
def test_no_product_of_the_rank_loses_less_on_the_text(shape: tuple[int, int]) -> None:
    W, X = data(*shape)
    for rank in (1, 5, 11):
        found = {moment: float(lost(W, X, moment, rank)) for moment in MOMENTS}
        assert found["centred"] <= found["whitened"] * (1 + 1e-12) < found["plain"]
        assert found["centred"] <= found["pooled"] * (1 + 1e-12)


@pytest.mark.parametrize("moment", MOMENTS)
def test_axes_are_those_of_the_moment_and_the_whole_rank_is_the_weight(moment: str) -> None:
    for W, X in (data(*TALL), data(*WIDE)):
        found = low_rank.factors(W, sums_of(X), moment)
        expand, reduce, added = found.at(min(W.shape))
        assert torch.allclose(expand @ reduce, W) and added.abs().max() < 1e-9
        assert torch.allclose(expand.mT @ expand, torch.eye(expand.shape[1], dtype=torch.float64))
        squares = torch.linalg.svdvals(variation(X, W, moment)).square()[: min(W.shape)]
        seen = torch.linalg.vector_norm(variation(X, expand.mT @ W, moment), dim=0).square()
        if moment != "plain":
            assert torch.allclose(seen, squares)


@pytest.mark.parametrize("moment", ["centred", "pooled"])
def test_the_mean_output_stays(moment: str) -> None:
    W, X = data(*TALL)
    expand, reduce, added = low_rank.factors(W, sums_of(X), moment).at(3)
    rows = X.flatten(0, 1)
    assert torch.allclose((rows @ (expand @ reduce).mT + added).mean(0), (rows @ W.mT).mean(0))


@pytest.mark.parametrize("moment", MOMENTS)
def test_the_error_that_is_told_is_that_of_the_outputs(moment: str) -> None:
    W, X = data(*WIDE)
    found = low_rank.factors(W, sums_of(X), moment).at(4)
    told = low_rank.output_error(W, found, sums_of(X))
    assert told == pytest.approx(float((lost(W, X, moment, 4) / (X @ W.mT).square().sum()).sqrt()), rel=1e-9)


def test_ranks_are_those_of_the_paper() -> None:
    assert low_rank.rank_for(0.46, 4096, 4096) == 936  # 942.08 in eights
    for outputs, inputs in ((576, 576), (1536, 576), (192, 576)):
        rank = low_rank.rank_for(0.5, outputs, inputs)
        assert rank % 8 == 0 and rank * (outputs + inputs) <= 0.5 * outputs * inputs < (rank + 8) * (outputs + inputs)
