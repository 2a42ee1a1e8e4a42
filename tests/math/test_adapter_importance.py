"""LoRAPrune's importance: what an adapter's step changes, and how many units are gone when."""

from itertools import pairwise

import torch

from billhook.math import loraprune


def test_the_estimate_is_what_one_step_of_the_adapter_changes() -> None:
    draw = torch.Generator().manual_seed(0)
    A, dA = torch.randn(2, 3, 7, generator=draw, dtype=torch.float64)
    B, dB = torch.randn(2, 5, 3, generator=draw, dtype=torch.float64)
    assert torch.allclose(B @ A - (B - dB) @ (A - dA), loraprune.estimated(A, B, dA, dB))


def test_units_sum_their_entries_to_a_vector_of_length_one() -> None:
    draw = torch.Generator().manual_seed(1)
    G, W = torch.randn(2, 6, 4, generator=draw)
    index = torch.tensor([[0, 3], [1, 4], [2, 5]])
    found = loraprune.importance(G, W, 0, index)
    each = torch.stack([(G[rows] * W[rows]).abs().sum() for rows in index]).double()
    assert torch.allclose(found, each / each.norm())
    assert torch.equal(loraprune.importance(0 * G, W, 1, torch.arange(4)[:, None]), torch.zeros(4, dtype=torch.float64))


def test_what_is_no_number_is_left_out() -> None:
    before, now = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 0.0])
    assert torch.equal(loraprune.averaged(before, now, first=True), now)
    assert torch.allclose(loraprune.averaged(before, now, first=False), torch.tensor([1.2, 1.8]))
    assert torch.equal(loraprune.averaged(before, now * float("nan"), first=False), before)


def test_more_goes_at_first_and_all_is_gone_before_the_end() -> None:
    shares = [loraprune.share_gone(step, 100) for step in range(101)]
    assert shares[:11] == [0.0] * 11 and shares[90:] == [1.0] * 11
    steps = [after - before for before, after in pairwise(shares[10:91])]
    assert all(step > 0 for step in steps) and steps == sorted(steps, reverse=True)
