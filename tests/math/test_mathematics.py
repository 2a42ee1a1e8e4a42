"""Grams, scores, restoration, choice and budget against literal arithmetic on the activations themselves."""

import math

import pytest
import torch
from torch import Tensor

from billhook.calibration import forward
from billhook.calibration.gram import gram_of
from billhook.errors import BillhookError
from billhook.math import linalg, restore, scores
from billhook.math.knapsack import AxisChoices, even_widths
from billhook.math.linalg import damped, factor
from billhook.math.restore import least_squares
from billhook.math.scores import COLUMN_SCORES, energy_columns, obs_columns, wanda_columns
from billhook.math.selection import lowest

TINY_DAMPING = 1e-12


def draw(seed: int, tokens: int = 60, size: int = 9, out: int = 5) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """X (tokens, in), W (out, in), E (tokens, out) in float64, and about half of the columns, ascending."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (tokens, size), (out, size), (tokens, out)
    X, W, E = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    kept = torch.randperm(size, generator=generator)[: max(1, size // 2 + seed % 3)].sort().values
    return X * torch.linspace(0.3, 3, size, dtype=torch.float64), W, E, kept


def relative_error(
    W: Tensor, V: Tensor | None, G: Tensor, kept: Tensor, C: Tensor | None = None, lack: float = 0.0
) -> float:
    whole = restore.energy(W, G)
    return math.sqrt(restore.squared_error(W, V, G, kept, C, lack) / whole) if whole > 0 else 0.0


def close(found: Tensor, expected: Tensor, relative: float = 1e-5) -> bool:
    return bool((found.double() - expected).norm() <= relative * expected.norm())


@pytest.mark.parametrize("size", [1, 3, 4, 7, 33, 130])
@pytest.mark.parametrize("shape", [(1,), (50,), (3, 17), (2, 3, 11)])
def test_gram_is_the_float64_product(size: int, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    # so that even these are many chunks, the last one short
    monkeypatch.setattr("billhook.calibration.gram.BATCH_TOKENS", 4)
    x = torch.randn(*shape, size, generator=torch.Generator().manual_seed(size)) + 1
    G, flat = gram_of(x), x.double().view(-1, size)
    assert G.dtype == torch.float64 and torch.equal(G, G.T)
    assert close(G, flat.T @ flat)
    assert torch.equal(gram_of(x.bfloat16()), gram_of(x.bfloat16().float()))


def test_gram_sums_chunks_in_float64() -> None:
    rows = 2 * forward.BATCH_TOKENS
    large, small = torch.full((rows, 3), 1e4), torch.randn(100, 3, generator=torch.Generator().manual_seed(0))
    assert close(gram_of(torch.cat([large, small])) - gram_of(large), small.double().T @ small.double())


@pytest.mark.parametrize("lacking", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_least_squares_is_lstsq_on_the_activations(seed: int, lacking: bool) -> None:
    X, W, E, kept = draw(seed)
    C, target = (E.T @ X, X @ W.T + E) if lacking else (None, X @ W.T)
    V, used = least_squares(W, X.T @ X, kept, TINY_DAMPING, C)
    assert used == TINY_DAMPING
    assert close(V, torch.linalg.lstsq(X[:, kept], target).solution.T, 1e-8)


def test_damping_draws_toward_the_kept_weights() -> None:
    X, W, _, kept = draw(0)
    found = [least_squares(W, X.T @ X, kept, damping)[0] for damping in (1e-6, 1e-2, 1.0, 1e2, 1e9)]
    away = [float((V - W[:, kept]).norm()) for V in found]
    assert away == sorted(away, reverse=True) and away[0] > 0.1
    assert close(found[-1], W[:, kept], 1e-7)


@pytest.mark.parametrize("seed", range(40))
def test_restoration_never_does_harm_where_it_was_fitted(seed: int) -> None:
    X, W, E, kept = draw(seed, tokens=3 + 2 * seed, size=2 + seed % 13)  # wide and tall, full rank and not
    C, energy = (E.T @ X, float(E.square().sum())) if seed % 2 else (None, 0.0)
    G, before = X.T @ X, W.clone()
    V, _ = least_squares(W, G, kept, 10.0 ** -(seed % 7), C)
    without = relative_error(W, W[:, kept], G, kept, C, energy)
    assert relative_error(W, V, G, kept, C, energy) <= without * (1 + 1e-9) + 1e-12
    assert torch.equal(W, before)


@pytest.mark.parametrize("lacking", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_relative_error_is_that_of_the_activations(seed: int, lacking: bool) -> None:
    X, W, E, kept = draw(seed)
    V = torch.randn(len(W), len(kept), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    E = E * lacking
    direct = float((X[:, kept] @ V.T - X @ W.T - E).norm() / (X @ W.T).norm())
    C, energy = (E.T @ X, float(E.square().sum())) if lacking else (None, 0.0)
    assert relative_error(W, V, X.T @ X, kept, C, energy) == pytest.approx(direct, rel=1e-9)
    assert relative_error(W, W, X.T @ X, torch.arange(W.shape[1])) == 0
    as_they_were = relative_error(W, W[:, kept], X.T @ X, kept, C, energy)
    assert relative_error(W, None, X.T @ X, kept, C, energy) == pytest.approx(as_they_were, rel=1e-9)


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    X, W, E, kept = draw(3, size=11, out=7)
    G, C = X.T @ X, E.T @ X

    def found() -> list[Tensor]:
        numbers = [restore.energy(W, G), restore.squared_error(W, W[:, kept] * 0.9, G, kept, C, 2.0)]
        return [obs_columns(W, G, 1e-3), least_squares(W, G, kept, 1e-3, C)[0], torch.tensor(numbers)]

    whole = found()
    monkeypatch.setattr(restore, "ROWS", 3)
    monkeypatch.setattr(scores, "ROWS", 2)
    monkeypatch.setattr(scores, "BLOCK", 4)
    assert all(close(a, b, 1e-9) for a, b in zip(found(), whole, strict=True))


@pytest.mark.parametrize("damping", [TINY_DAMPING, 1e-2])
def test_obs_is_the_error_after_the_best_repair(damping: float) -> None:
    X, W, _, _ = draw(1)
    G = X.T @ X
    ridge = (damping * G.diagonal().mean()).sqrt() * torch.eye(len(G), dtype=G.dtype)
    rows = torch.cat([X, ridge])  # the ridge as so many more tokens
    for j, found in enumerate(obs_columns(W, G, damping)):
        others = [k for k in range(len(G)) if k != j]
        repair = torch.linalg.lstsq(rows[:, others], rows @ W.T).solution
        assert float(found) == pytest.approx(float((rows[:, others] @ repair - rows @ W.T).square().sum()), rel=1e-6)


def test_wanda_and_energy_are_their_double_loops() -> None:
    X, W, _, _ = draw(2)
    G = X.T @ X
    for j in range(len(G)):
        norm = sum(float(x) ** 2 for x in X[:, j]) ** 0.5
        wanda = sum(abs(float(W[i, j])) * norm for i in range(len(W)))
        energy = sum((float(W[i, j]) * norm) ** 2 for i in range(len(W)))
        assert float(wanda_columns(W, G)[j]) == pytest.approx(wanda, rel=1e-12)
        assert float(energy_columns(W, G)[j]) == pytest.approx(energy, rel=1e-12)


@pytest.mark.parametrize("case", ["twins", "dead", "few tokens", "silence"])
def test_degenerate_activations_give_numbers(case: str) -> None:
    X, W, _, _ = draw(3, tokens=4 if case == "few tokens" else 60)
    kept = torch.tensor([0, 1, 3, 4, 5, 6, 7, 8])  # all but column 2
    if case == "twins":
        X[:, 2] = X[:, 3]
    X = X * {"dead": (torch.arange(9) != 2).double(), "silence": 0.0}.get(case, 1.0)
    G = X.T @ X
    for name, score in COLUMN_SCORES.items():
        found = score(W, G, 1e-6)
        assert found.isfinite().all() and (found >= 0).all()
        if case == "dead":
            assert found.argmin() == 2 and found[2] <= 1e-4 * found.sum(), name
    assert case != "twins" or obs_columns(W, G, 1e-6)[2] < 1e-4 * energy_columns(W, G)[2]  # its twin stands in for it
    V, _ = least_squares(W, G, kept, 1e-6)
    assert V.isfinite().all()
    assert relative_error(W, V, G, kept) < 1e-2  # in each of these cases nothing is lost


def indefinite(lowest_eigenvalue: float) -> Tensor:
    basis = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)).Q
    values = torch.ones(6, dtype=torch.float64)
    values[0] = lowest_eigenvalue
    symmetric = basis @ values.diag() @ basis.T
    return (symmetric + symmetric.T) / 2


@pytest.mark.parametrize(("value", "used"), [(0.5, 1e-3), (-0.005, 1e-2), (-0.05, 1e-1), (-0.5, 1.0)])
def test_factor_takes_the_damping_that_it_needs(value: float, used: float) -> None:
    gram = indefinite(value)
    lower, damping = factor(gram, 1e-3)
    assert damping == pytest.approx(used)
    torch.testing.assert_close(lower @ lower.T, damped(gram, damping))


@pytest.mark.parametrize("gram", [indefinite(-5.0), -torch.eye(4).double() * 3, torch.eye(3).double() * torch.nan])
def test_factor_refuses_what_is_no_gram(gram: Tensor) -> None:
    with pytest.raises(BillhookError, match="cannot be factored"):
        factor(gram, 1e-3)


def test_factor_without_damping_comes_to_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    tries = iter(range(400))  # a StopIteration is a factor that would not have ended
    monkeypatch.setattr(linalg, "damped", lambda gram, damping, _: damped(gram + 0 * next(tries), damping))
    lower, used = factor(indefinite(-0.005), 0.0)
    assert lower.isfinite().all() and 0 < used <= linalg.DAMPING_LIMIT


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_restored_weights_round_once(dtype: torch.dtype) -> None:
    X, W, _, kept = draw(4)
    V, _ = least_squares(W.to(dtype), X.T @ X, kept, 1e-3)
    exact, _ = least_squares(W.to(dtype).double(), X.T @ X, kept, 1e-3)
    assert V.dtype == dtype and torch.equal(V, exact.to(dtype))


@pytest.mark.parametrize("blocks", [1, 3])
@pytest.mark.parametrize("values", [1, 2, 1000])  # all tied, most tied, hardly any
@pytest.mark.parametrize("drop", [0, 3, 9, 21])
def test_lowest_takes_exactly_so_many_from_each_block(drop: int, values: int, blocks: int) -> None:
    scores = torch.randint(values, (24,), generator=torch.Generator().manual_seed(drop)).double()
    gone, kept = lowest(scores, drop, blocks)
    assert len(gone) == drop
    assert sorted([*gone.tolist(), *kept.tolist()]) == list(range(24))
    assert gone.tolist() == sorted(gone.tolist()) and kept.tolist() == sorted(kept.tolist())
    size = 24 // blocks
    for start in range(0, 24, size):
        order = sorted(range(start, start + size), key=lambda n: (scores[n].item(), n))
        assert {n for n in gone.tolist() if start <= n < start + size} == set(order[: drop // blocks])


@pytest.mark.parametrize(("units", "step"), [(48, 1), (1536, 32), (100, 32), (9, 3)])
def test_solve_takes_the_nearest_cut_of_one_axis(units: int, step: int) -> None:
    drops = [0, *(d for d in range(1, units) if (units - d) % step == 0)]
    axis = AxisChoices("ffn", units, 1000, drops)
    for target in torch.linspace(drops[1] * 501.0, drops[-1] * 1000.0, 97).tolist():
        miss = abs(even_widths([axis], target)["ffn"] * 1000 - target)
        assert miss == min(abs(d * 1000 - target) for d in drops)


@pytest.mark.parametrize(
    "heads", [AxisChoices("heads", 9, 2200, [0, 3, 6]), AxisChoices("groups", 4, 9000, [0, 1, 2, 3])]
)
@pytest.mark.parametrize("ffn", [AxisChoices("ffn", n, 50, range(0, n, 8)) for n in (2048, 1024, 400, 160)])
def test_solve_hits_what_two_axes_can_hit(heads: AxisChoices, ffn: AxisChoices) -> None:
    half = ffn.price * 8 / 2
    totals = [a * heads.price + b * ffn.price for a in heads.drops for b in ffn.drops]
    missed = []
    for target in torch.linspace(2 * half, max(totals), 150).tolist():
        found = even_widths([heads, ffn], target)
        total = found[heads.kind] * heads.price + found["ffn"] * ffn.price
        assert found[heads.kind] in heads.drops and found["ffn"] in ffn.drops
        if min(abs(t - target) for t in totals) <= half < abs(total - target):
            missed.append((target, total))
    assert missed == []


def test_solve_refuses_too_much_and_too_little() -> None:
    both = [AxisChoices("heads", 9, 2200, [0, 3, 6]), AxisChoices("ffn", 100, 50, range(0, 100, 10))]
    most = 6 * 2200 + 90 * 50
    assert even_widths(both, most + 249.0) == {"heads": 6, "ffn": 90}
    with pytest.raises(BillhookError, match=f"at most {most:,} before"):
        even_widths(both, most + 251.0)
    with pytest.raises(BillhookError, match=r"smallest step \(500 parameters\)"):
        even_widths(both, 249.0)
    with pytest.raises(BillhookError, match="at most 0"):
        even_widths([AxisChoices("ffn", 1, 50, [0])], 10.0)
