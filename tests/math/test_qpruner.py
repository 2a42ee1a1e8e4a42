"""Bits from mutual information: what is known of it, and the greedy start by hand."""

import math

import pytest
import torch

from billhook.math import qpruner

MANY = 4096


def drawn(seed: int) -> torch.Tensor:
    return torch.randn(MANY, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_what_is_the_same_tells_all_and_what_is_apart_nothing() -> None:
    x, y = drawn(0), drawn(1)
    assert qpruner.mutual_information(x, -3 * x) == pytest.approx(math.log(qpruner.BINS), abs=0.02)
    assert qpruner.mutual_information(x, y) < 0.01
    half = [qpruner.mutual_information(x, x + noise * y) for noise in (0.3, 1.0, 3.0)]
    assert half[0] > half[1] > half[2] > 0.01


def test_correlated_normal_numbers_tell_what_theory_says() -> None:
    x, y, r = drawn(0), drawn(1), 0.8
    found = qpruner.mutual_information(x, r * x + math.sqrt(1 - r * r) * y)
    assert found == pytest.approx(-math.log(1 - r * r) / 2, rel=0.1)


def test_the_principal_direction_is_that_of_most_spread() -> None:
    t = drawn(0)
    X = torch.stack([3 * t + 5, 0.1 * drawn(1), -4 * t], 1)
    along = qpruner.principal(X)
    assert abs(float(torch.corrcoef(torch.stack([along, t]))[0, 1])) > 0.999
    assert float(along.std()) == pytest.approx(5 * float(t.std()), rel=0.01)


def test_layers_are_raised_by_what_they_are_worth_a_byte() -> None:
    bits, sizes = (4.0, 8.0), [[10, 20], [10, 20], [100, 200]]
    assert qpruner.raised([1.0, 2.0, 5.0], bits, sizes, 120) == [0, 0, 0]
    assert qpruner.raised([1.0, 2.0, 5.0], bits, sizes, 135) == [0, 1, 0]
    assert qpruner.raised([1.0, 2.0, 500.0], bits, sizes, 235) == [0, 1, 1]
    assert qpruner.raised([1.0, 1.0, 0.0], bits, sizes, 10**6) == [1, 1, 1]
