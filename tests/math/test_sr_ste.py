"""Masks that move: what they keep, what passes them, and how masked weights decay."""

import pytest
import torch

from billhook.math import sr_ste
from billhook.math.pattern import parse

W = torch.tensor([[3.0, -1.0, 2.0, 0.5, 0.0, 0.0, -4.0, 0.0]])


@pytest.mark.parametrize(
    ("pattern", "kept"), [("2:4", [1, 0, 1, 0, 0, 0, 1, 1]), ("1:4", [1, 1, 1, 0, 0, 1, 1, 1]), ("6:8", [1] + 5 * [0])]
)
def test_the_largest_of_each_group_stay(pattern: str, kept: list[int]) -> None:
    mask = sr_ste.largest(W, parse(pattern))
    assert mask[0, : len(kept)].int().tolist() == kept
    assert sr_ste.holds(sr_ste.masked(W, mask), parse(pattern))
    assert not sr_ste.holds(W, parse("2:4"))


def test_norms_of_inputs_weigh() -> None:
    norms = torch.tensor([0.1, 1.0, 1.0, 4.0, 1.0, 1.0, 1.0, 1.0])
    assert sr_ste.largest(W, parse("2:4"), norms)[0, :4].int().tolist() == [0, 0, 1, 1]


def test_masked_weights_get_the_gradient_of_their_place() -> None:
    weight, x = torch.randn(3, 8, requires_grad=True), torch.randn(5, 8)
    mask = sr_ste.largest(weight, parse("2:4"))
    used = sr_ste.masked(weight, mask)
    assert torch.equal(used, weight * mask) and not torch.signbit(used[~mask]).any()
    (x @ used.T).sum().backward()
    torch.testing.assert_close(weight.grad, x.sum(0).expand(3, 8))


def test_the_decay_rises_in_a_line_and_pulls_masked_weights_alone() -> None:
    assert [sr_ste.annealed(0.4, step, 4) for step in (0, 1, 4, 9)] == pytest.approx([0, 0.1, 0.4, 0.4])
    mask, m = sr_ste.largest(W, parse("2:4")), torch.randn(1, 8)
    torch.testing.assert_close(sr_ste.update(m, W, mask, 0.3), m + 0.3 * W * ~mask)
