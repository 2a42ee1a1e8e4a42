"""Weights on levels: what is trained is what is stored, and slopes are the paper's."""

import pytest
import torch

from billhook.math import grids, quantgpt
from billhook.math.grids import GRIDS

PLAIN = [name for name, grid in GRIDS.items() if not grid.offset]


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", PLAIN)
def test_a_weight_on_the_levels_is_found_there_to_the_bit(name: str) -> None:
    grid = GRIDS[name]
    W = drawn(12, 3 * grid.block)
    W[0] = 0.0
    W[1, grid.block + 8 :] = 0.0
    scales = grids.scales_of(grids.blocks(W, grid.block), grid)[0].float() * torch.rand(
        12, 3, generator=torch.Generator()
    )
    V = grids.quantised(W, -scales.half(), None, grid).values()  # some blocks reach neither end
    found = grids.exact(V, grid)
    assert found is not None and torch.equal(found.values(), V)
    V[3, 5] += V[3].abs().max() / 1000
    assert grids.exact(V, grid) is None


def test_no_grid_with_an_offset_has_weights_on_it() -> None:
    assert grids.exact(grids.nearest(drawn(2, 32), GRIDS["Q4_1"]).values(), GRIDS["Q4_1"]) is None


@pytest.mark.parametrize("name", PLAIN)
def test_trained_values_are_those_of_codes_and_scales(name: str) -> None:
    grid = GRIDS[name]
    W = grids.blocks(drawn(6, 2 * grid.block), grid.block)
    gamma = 0.3 * drawn(6, 2, 1, seed=1)
    V = quantgpt.nearest(W, gamma, grid.lowest, grid.highest).flatten(1)
    scales = (gamma * W.abs().mean(-1, keepdim=True)).half().squeeze(-1)
    assert torch.equal(V, grids.quantised(W.flatten(1), scales, None, grid).values())
    stored = grids.exact(V, grid)
    assert stored is not None and torch.equal(stored.values(), V)


def test_slopes_count_what_is_inside_and_outside_of_the_clip() -> None:
    w, gamma = torch.tensor([[0.9, -0.4, 3.0, 0.2]], requires_grad=True), torch.tensor([[0.5]], requires_grad=True)
    m = float(w.detach().abs().mean())
    d = float(torch.tensor(0.5 * m).half())
    g = torch.tensor([[1.0, 2.0, 4.0, 8.0]])
    (quantgpt.nearest(w, gamma, -2, 2) * g).sum().backward()
    assert w.grad is not None and gamma.grad is not None
    assert w.grad.tolist() == [[1.0, 2.0, 0.0, 8.0]]  # 3 is beyond two steps
    u = w.detach() / d
    q = u.round().clamp(-2, 2)
    by_hand = (g * torch.where(u.abs() <= 2, q - u, q)).sum() * m
    torch.testing.assert_close(gamma.grad.squeeze(), by_hand)


def test_a_block_of_zeros_has_no_slope_that_is_no_number() -> None:
    w, gamma = torch.zeros(1, 32, requires_grad=True), torch.ones(1, 1, requires_grad=True)
    quantgpt.nearest(w, gamma, -8, 7).sum().backward()
    assert w.grad is not None and bool(w.grad.isfinite().all()) and bool((gamma.grad == 0).all())


def test_contrast_is_least_where_each_state_is_its_own_teachers() -> None:
    teacher = torch.eye(16)[None]
    own = quantgpt.token_contrast(3 * teacher, teacher)
    other = quantgpt.token_contrast(teacher.roll(1, 1), teacher)
    same = quantgpt.token_contrast(torch.ones(1, 16, 16), torch.ones(1, 16, 16))
    assert own < 0.01 and other > 9 and same == pytest.approx(torch.tensor(16.0).log())
