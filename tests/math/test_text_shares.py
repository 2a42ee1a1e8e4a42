"""Shares of texts by distributionally robust optimisation: what holds for any losses."""

import pytest
import torch

from billhook.math import mixture

SEEDS = range(5)


def drawn(seed: int, texts: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    """Base shares and excesses."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.rand(texts, generator=generator, dtype=torch.float64) + 0.05
    return base / base.sum(), torch.randn(texts, generator=generator, dtype=torch.float64)


def distance(base: torch.Tensor, q: torch.Tensor) -> float:
    return float((base * (q / base - 1) ** 2).sum()) / 2


@pytest.mark.parametrize("seed", SEEDS)
def test_shares_sum_to_one_within_the_radius_and_prefer_what_lags(seed: int) -> None:
    base, excess = drawn(seed)
    q = mixture.robust(base, excess)
    assert q.sum().item() == pytest.approx(1) and distance(base, q) <= mixture.RADIUS + 1e-9
    assert (q @ excess) >= (base @ excess) and (q <= mixture.largest(base)).all()
    order = excess.argsort()
    tilt = (q / base)[order]
    least = q[order] <= base.min() * (1 + 1e-9)  # raised to the least share, whatever they weigh
    assert (tilt[~least].diff() >= -1e-9).all()


def test_the_whole_radius_is_used_where_no_bound_stands_before_it() -> None:
    base = torch.full((4,), 0.25, dtype=torch.float64)
    above = torch.tensor([0.9, 1.0, 1.1, 1.2], dtype=torch.float64)
    tilted = [mixture._tilted(base, above, eta) for eta in torch.linspace(-5, 1.19, 40).tolist()]
    apart = [distance(base, q) for q in tilted]
    assert apart == sorted(apart)  # so halving finds the radius
    assert distance(base, mixture.robust(base, above)) <= mixture.RADIUS


def test_what_all_texts_have_in_common_changes_no_share() -> None:
    base, excess = drawn(0)
    torch.testing.assert_close(mixture.robust(base, excess), mixture.robust(base, excess - 7.0), atol=1e-6, rtol=0)
    assert torch.equal(mixture.robust(base, torch.zeros_like(base)), base / base.sum())


@pytest.mark.parametrize("seed", SEEDS)
def test_base_shares_stay_within_their_bounds(seed: int) -> None:
    first, excess = drawn(seed)
    base = first
    for _ in range(50):  # the same text lags all the time
        base = mixture.follow(base, mixture.robust(base, excess), first)
        assert base.sum().item() == pytest.approx(1)
        assert (base >= first / 2 - 1e-9).all() and (base <= 2 * first + 1e-9).all()
        assert base.min() >= first.min() - 1e-9 and base.max() <= first.max() + 1e-9
        assert (mixture.robust(base, excess) <= mixture.largest(first) + 1e-9).all()
    assert not torch.allclose(base, first)
