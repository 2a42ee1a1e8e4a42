"""Sparsity patterns, refits on a support and the solvers of one linear layer, against arithmetic on the activations."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import Tensor

from billhook.errors import BillhookError
from billhook.math import admm, fistapruner, layerwise, magnitude, sparsegpt, sparsity, wanda
from billhook.math.layerwise import Settings, SparseWeight, Target, squared_error
from billhook.math.linalg import damped
from billhook.math.pattern import Pattern, block_side, parse

OUT, IN, TOKENS = 24, 32, 400
HALF, TWO_FOUR = Pattern(sparsity=0.5), Pattern(zeros=2, group=4)
PAIRS = Pattern(sparsity=0.5, side=2)
PATTERNS = [HALF, Pattern(sparsity=0.3), TWO_FOUR, Pattern(zeros=1, group=4), Pattern(zeros=5, group=8), PAIRS]
INITS = ["dense", "magnitude", "wanda", "sparsegpt"]
PLAIN = Settings(damping=1e-3)
Prune = Callable[[Tensor, Target, Pattern, Settings], SparseWeight]
METHODS: dict[str, Prune] = {
    "magnitude": magnitude.prune,
    "wanda": wanda.prune,
    "sparsegpt": sparsegpt.prune,
    "fistapruner": fistapruner.prune,
    "admm": admm.prune,
}


@cache
def draw(seed: int = 0, out: int = OUT, size: int = IN, tokens: int = TOKENS) -> tuple[Tensor, Tensor, Tensor]:
    """X (tokens, in) with a power law of directions and two outlier inputs, W (out, in), Y (tokens, out): float64."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (tokens, size), (size, size), (out, size), (tokens, out)
    X, Q, W, E = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    X = X * torch.arange(1, size + 1, dtype=torch.float64) ** -0.6 @ torch.linalg.qr(Q).Q
    X[:, :2] *= 20
    return X, W, X @ W.T + 0.5 * E


def own(X: Tensor) -> Target:
    """The dense weight's own output on the same input."""
    return Target(X.T @ X)


def other(X: Tensor, Y: Tensor) -> Target:
    return Target(X.T @ X, Y.T @ X, Y.square().sum(0))


def target(kind: str) -> Target:
    X, _, Y = draw()
    return own(X) if kind == "own" else other(X, Y)


def error(V: Tensor, W: Tensor, wanted: Target) -> float:
    return float(squared_error(V, W, wanted).sum().sqrt())


def zeros_per_group(V: Tensor, group: int) -> set[int]:
    return set((V.reshape(-1, group) == 0).sum(1).tolist())


def close(found: Tensor, expected: Tensor, relative: float) -> bool:
    return bool((found.double() - expected).norm() <= relative * expected.norm())


# -- patterns --------------------------------------------------------------------------------------------------------


def test_a_pattern_says_its_share() -> None:
    found = parse("2:4")
    assert (found.zeros, found.group, found.share, str(found)) == (2, 4, 0.5, "2:4")
    assert parse("1:4").share == 0.25
    assert str(HALF) == "50%" and str(Pattern(sparsity=0.625)) == "62.5%"
    assert block_side("block16") == 16 and str(Pattern(sparsity=0.5, side=16)) == "50% block16"
    assert not any(map(block_side, ("2:4", "block", "block0", "block-4", "block1.5", "16")))


@pytest.mark.parametrize("text", ["", "2", "2:", "a:b", "2:4:8", "-1:4", "1.5:4", "0:4", "4:4", "5:4"])
def test_a_bad_pattern_is_said_in_one_line(text: str) -> None:
    with pytest.raises(BillhookError) as caught:
        parse(text)
    assert "\n" not in str(caught.value) and (text in str(caught.value))


def test_other_bad_patterns() -> None:
    for build in (
        lambda: Pattern(),
        lambda: Pattern(sparsity=0.5, zeros=2, group=4),
        lambda: Pattern(zeros=2),
        lambda: Pattern(sparsity=1.5),
        lambda: Pattern(zeros=2, group=4, side=2),
        lambda: Pattern(sparsity=0.5, side=0),
        lambda: sparsity.keep_mask(torch.ones(2, 2), HALF, "column"),
    ):
        with pytest.raises(BillhookError):
            build()


def test_groups_have_to_tile_the_input() -> None:
    sparsity.check(TWO_FOUR, (3, 12), "layer")
    sparsity.check(HALF, (3, 7), "layer")
    sparsity.check(PAIRS, (4, 6), "layer")
    with pytest.raises(BillhookError, match=r"layers\.3\.mlp\.down_proj has 30 inputs"):
        sparsity.check(TWO_FOUR, (4, 30), "layers.3.mlp.down_proj")
    for shape in ((3, 8), (8, 3)):
        with pytest.raises(BillhookError, match="inputs, which 2 weights of a block do not divide"):
            sparsity.check(PAIRS, shape, "layer")


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("levels", [1, 2, 1000])
def test_counts_are_exact_with_ties(levels: int, pattern: Pattern) -> None:
    scores = torch.randint(levels, (10, 40), generator=torch.Generator().manual_seed(0)).float()
    rows = sparsity.keep_mask(scores, pattern, "row")
    whole = sparsity.keep_mask(scores, pattern, "matrix")
    assert (~rows).sum(1).tolist() == [round(pattern.share * 40)] * 10
    assert (~whole).sum() == round(pattern.share * 400)
    if pattern.group is not None:
        assert (
            zeros_per_group(rows.int(), pattern.group) == zeros_per_group(whole.int(), pattern.group) == {pattern.zeros}
        )
    elif pattern.side == 1:
        assert scores[~whole].max() <= scores[whole].min()
        # a stable sort is the plain way to the same choice
        order = scores.flatten().argsort(stable=True)
        assert torch.equal((~whole).flatten().nonzero().flatten(), order[: round(pattern.share * 400)].sort().values)


@pytest.mark.parametrize("within", sparsity.WITHIN)
def test_blocks_of_the_lowest_means_go_whole(within: str) -> None:
    scores = torch.rand(8, 24, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    zeros = torch.zeros_like(scores).bool()
    zeros[:4, 8:12] = zeros[5, 5] = True  # a block, and a weight of another
    stay = sparsity.keep_mask(scores, Pattern(sparsity=0.5, side=4), within, zeros)
    means = {
        (i, j): -1.0 if (i, j) == (0, 8) else float(scores[i : i + 4, j : j + 4].mean())
        for i in (0, 4)
        for j in range(0, 24, 4)
    }
    gone = (
        sorted(means, key=means.__getitem__)[:6]
        if within == "matrix"
        else [place for i in (0, 4) for place in sorted((p for p in means if p[0] == i), key=means.__getitem__)[:3]]
    )
    expected = ~zeros
    for i, j in gone:
        expected[i : i + 4, j : j + 4] = False
    assert (0, 8) in gone and torch.equal(stay, expected)


def test_nothing_or_everything_goes() -> None:
    assert sparsity.keep_mask(torch.ones(3, 5), Pattern(sparsity=0.0)).all()
    assert not sparsity.keep_mask(torch.ones(3, 5), Pattern(sparsity=1.0), "matrix").any()


def test_known_zeros_count_first_and_stay() -> None:
    scores = torch.arange(1.0, 9.0).view(1, 8)
    zeros = torch.tensor([[0, 0, 0, 0, 0, 0, 1, 1]]).bool()
    assert sparsity.keep_mask(scores, HALF, zeros=zeros).tolist() == [
        [False, False, True, True, True, True, False, False]
    ]
    assert (~sparsity.keep_mask(scores, Pattern(sparsity=0.125), zeros=zeros)).nonzero()[:, 1].tolist() == [6, 7]
    zeros = torch.tensor([[1, 1, 1, 0, 0, 0, 0, 1]]).bool()
    assert (~sparsity.keep_mask(scores, TWO_FOUR, zeros=zeros)).nonzero()[:, 1].tolist() == [0, 1, 2, 4, 7]


# -- errors and refits -----------------------------------------------------------------------------------------------


def test_errors_are_those_on_the_activations() -> None:
    X, W, Y = draw()
    V = W * sparsity.keep_mask(W.abs(), HALF)
    assert close(squared_error(V, W, own(X)), (X @ (V - W).T).square().sum(0), 1e-10)
    assert close(squared_error(V, W, other(X, Y)), (X @ V.T - Y).square().sum(0), 1e-10)
    dense, moved, scale = layerwise.scaled(W, other(X, Y))
    assert close(moved.gram.diagonal(), torch.ones(IN), 1e-10)
    assert close(squared_error(V * scale, dense, moved), squared_error(V, W, other(X, Y)), 1e-10)


def test_a_target_needs_both_or_neither() -> None:
    X, _, Y = draw()
    with pytest.raises(ValueError, match="energy"):
        Target(X.T @ X, Y.T @ X)


@pytest.mark.parametrize("kind", ["own", "other"])
@pytest.mark.parametrize("damping", [1e-4, 1e-1])
def test_refit_is_the_direct_solution_of_every_row(damping: float, kind: str) -> None:
    (X, W, Y), wanted = draw(), target(kind)
    mask = sparsity.keep_mask(W.abs(), HALF, "matrix")
    V = layerwise.refit(W, wanted, mask, damping, iterations=200)
    G, output = X.T @ X, X @ W.T if kind == "own" else Y
    delta = damping * float(G.diagonal().mean())
    expected = torch.zeros_like(W)
    for i, row in enumerate(mask):
        S = row.nonzero().flatten()
        pull = (output.T @ X)[i, S] + delta * W[i, S]
        expected[i, S] = torch.linalg.solve(G[S][:, S] + delta * torch.eye(len(S), dtype=G.dtype), pull)
    worse = squared_error(expected, W, wanted) > squared_error(W * mask, W, wanted)
    expected[worse] = (W * mask)[worse]
    assert close(V, expected, 1e-7)
    assert not V[~mask].any()


@pytest.mark.parametrize("iterations", [0, 1, 5])
def test_a_refit_never_makes_a_row_worse(iterations: int) -> None:
    wanted, W = target("other"), draw()[1]
    mask = sparsity.keep_mask(W.abs(), TWO_FOUR)
    # a start that has no reason to be near, and a ridge that draws away from it
    begun = layerwise.refit(W, wanted, mask, 1e-8, iterations=100)
    V = layerwise.refit(W, wanted, mask, 10.0, begun, iterations)
    assert (squared_error(V, W, wanted) <= squared_error(begun, W, wanted)).all()
    V = layerwise.refit(W, wanted, mask, 1e-3, iterations=iterations)
    assert (squared_error(V, W, wanted) <= squared_error(W * mask, W, wanted)).all()
    assert iterations == 0 or error(V, W, wanted) < error(W * mask, W, wanted)


def test_refit_of_an_empty_row_and_a_dead_input() -> None:
    X, W, _ = draw()
    X = X.clone()
    X[:, 3] = 0
    mask = torch.ones_like(W, dtype=torch.bool)
    mask[0], mask[1:, 5] = False, False
    V = layerwise.refit(W, own(X), mask, 0.0, iterations=200)
    assert not V[0].any() and torch.equal(V[1:, 3], W[1:, 3])


# -- every method ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["own", "other"])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("name", METHODS)
def test_zeros_are_counted_exactly(name: str, pattern: Pattern, kind: str) -> None:
    W = draw()[1].float()
    for refit in (False, True):
        found = METHODS[name](W, target(kind), pattern, replace(PLAIN, refit=refit))
        assert found.weight.dtype == torch.float64 and found.weight.isfinite().all()
        if pattern.group is not None:
            assert zeros_per_group(found.weight, pattern.group) == {pattern.zeros}
        elif name == "wanda":
            assert (found.weight == 0).sum(1).tolist() == [round(pattern.share * IN)] * OUT
        else:
            assert (found.weight == 0).sum() == round(pattern.share * W.numel())


@pytest.mark.parametrize("name", METHODS)
def test_zeros_fill_blocks(name: str) -> None:
    """As many as the share says, beside zeros that were there, which are in blocks or not."""
    W, pattern = draw()[1], Pattern(sparsity=0.25, side=8)
    zeros = torch.zeros_like(W).bool()
    zeros[:8, :8] = zeros[3, 20] = True
    for known in (None, zeros):
        settings = Settings(damping=1e-3, zeros=known, refit=True, block=20)
        V = METHODS[name](W if known is None else W.masked_fill(zeros, 0.0), target("other"), pattern, settings).weight
        gone = sparsity.whole_blocks(V == 0, 8)
        assert gone.sum() == round(0.25 * gone.numel()) and (known is None or gone[0, 0])
        others = (V == 0) & ~sparsity.spread(gone, 8)
        assert others.nonzero().tolist() in ([], [[3, 20]])


@pytest.mark.parametrize("pattern", [HALF, TWO_FOUR], ids=str)
@pytest.mark.parametrize("name", METHODS)
def test_known_zeros_stay_zero(name: str, pattern: Pattern) -> None:
    W = draw()[1]
    zeros = torch.rand(W.shape, generator=torch.Generator().manual_seed(1)) < 0.2
    zeros[:, -8:-6] = True  # and two inputs, whole
    for settings in (Settings(zeros=zeros), Settings(zeros=zeros, refit=True, normalised=True)):
        V = METHODS[name](W.masked_fill(zeros, 0.0), target("other"), pattern, settings).weight
        assert not V[zeros].any()
        if pattern.group is None:
            assert (V == 0).sum() == round(0.5 * W.numel())
        else:
            assert min(zeros_per_group(V, 4)) == 2


@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize("name", METHODS)
def test_a_dead_input_does_no_harm(name: str, normalised: bool) -> None:
    X, W, _ = draw()
    X = X.clone()
    X[:, 3] = 0
    found = METHODS[name](W, own(X), HALF, Settings(normalised=normalised))
    assert found.weight.isfinite().all()
    assert (found.weight == 0).sum() >= round(0.5 * W.numel())
    if name == "sparsegpt":
        assert not found.weight[:, 3].any() and found.note["dead"] == 1


@pytest.mark.parametrize("pattern", [HALF, TWO_FOUR, Pattern(sparsity=0.5, side=4)], ids=str)
def test_the_order_of_the_field(pattern: Pattern) -> None:
    X, W, _ = draw(1, 96, 64, 2000)
    errors = {name: error(METHODS[name](W, own(X), pattern, PLAIN).weight, W, own(X)) for name in METHODS}
    assert errors["fistapruner"] <= errors["sparsegpt"] < errors["wanda"] < errors["magnitude"]
    assert errors["admm"] < errors["wanda"]
    refitted = replace(PLAIN, refit=True)
    for name in ("magnitude", "wanda", "sparsegpt", "admm"):
        assert error(METHODS[name](W, own(X), pattern, refitted).weight, W, own(X)) < errors[name]


def test_wanda_and_magnitude_keep_the_largest_of_their_scores() -> None:
    X, W, _ = draw()
    V = wanda.prune(W, own(X), HALF, PLAIN).weight
    for row, found in zip(W, V, strict=True):
        kept = (row.abs() * X.norm(dim=0)).topk(IN // 2).indices
        assert set(kept.tolist()) == set(found.nonzero().flatten().tolist())
        assert torch.equal(found[kept], row[kept])
    V = magnitude.prune(W, own(X), HALF, PLAIN).weight
    assert W[V == 0].abs().max() < W[V != 0].abs().min() and torch.equal(V[V != 0], W[V != 0])


# -- SparseGPT -------------------------------------------------------------------------------------------------------


def test_the_factor_is_the_upper_root_of_the_inverse() -> None:
    G = draw()[0].T @ draw()[0]
    U, used = sparsegpt.inverse_factor(G, 1e-2)
    assert used == 1e-2 and torch.equal(U, U.triu())
    assert close(U.T @ U, torch.linalg.inv(damped(G, 1e-2)), 1e-9)


def test_a_diagonal_gram_leaves_what_stays_as_it_was() -> None:
    W = draw()[1].float()
    diagonal = torch.linspace(1, 9, IN, dtype=torch.float64)
    scores = W.double().square() * diagonal
    settings = Settings(damping=0.0)
    found = sparsegpt.prune(W, Target(torch.diag(diagonal)), HALF, settings).weight
    assert torch.equal(found, W.double() * sparsity.keep_mask(scores, HALF, "matrix"))
    found = sparsegpt.prune(W, Target(torch.diag(diagonal)), TWO_FOUR, settings).weight
    assert torch.equal(found, W.double() * sparsity.keep_mask(scores, TWO_FOUR))


@pytest.mark.parametrize("pattern", [HALF, TWO_FOUR, PAIRS], ids=str)
def test_the_sweep_is_optimal_brain_surgery_column_by_column(pattern: Pattern) -> None:
    X, W, _ = draw()
    G = damped(X.T @ X, 1e-2)
    found = sparsegpt.prune(W, own(X), pattern, Settings(block=8)).weight
    # with the support known, column j's error goes to the columns right of it by least squares on those
    V, stay = W.clone(), found != 0
    for j in range(IN):
        lost = V[:, j] * ~stay[:, j]
        V[:, j] -= lost
        if j + 1 < IN:
            V[:, j + 1 :] += lost[:, None] * torch.linalg.solve(G[j + 1 :, j + 1 :], G[j + 1 :, j])
    assert close(found, V, 1e-4)


@pytest.mark.parametrize("share", [0.37, 0.5])
@pytest.mark.parametrize("block", [5, 7, 32, 128])
def test_blocks_share_the_zeros_out(block: int, share: float) -> None:
    X, W, _ = draw()
    V = sparsegpt.prune(W, own(X), Pattern(sparsity=share), Settings(block=block)).weight
    assert (V == 0).sum() == round(share * W.numel())
    counts = [int((part == 0).sum()) for part in V.split(block, dim=1)]
    assert all(abs(n - share * part.numel()) <= 1 for n, part in zip(counts, V.split(block, dim=1), strict=True))


def test_another_target_is_another_weight() -> None:
    X, W, Y = draw()
    moved = torch.linalg.lstsq(X, Y).solution.T
    settings = Settings(damping=1e-9)
    found = sparsegpt.prune(W, other(X, Y), HALF, settings).weight
    assert close(found, sparsegpt.prune(moved, own(X), HALF, settings).weight, 1e-4)
    assert error(found, W, other(X, Y)) < error(sparsegpt.prune(W, own(X), HALF, settings).weight, W, other(X, Y))


# -- FISTAPruner -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["own", "other"])
@pytest.mark.parametrize("pattern", [HALF, TWO_FOUR], ids=str)
@pytest.mark.parametrize("refit", [False, True])
@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize("init", INITS)
def test_fista_is_never_worse_than_its_start(
    init: str, normalised: bool, refit: bool, pattern: Pattern, kind: str
) -> None:
    W, wanted = draw()[1], target(kind)
    settings = replace(PLAIN, init=init, normalised=normalised, refit=refit)
    found = fistapruner.prune(W, wanted, pattern, settings)
    begun = W if init == "dense" else METHODS[init](W, wanted, pattern, PLAIN).weight
    scores = begun.abs() * wanted.gram.diagonal().sqrt() if normalised else begun.abs()
    begun = begun * sparsity.keep_mask(scores, pattern, "matrix")
    assert error(found.weight, W, wanted) <= error(begun, W, wanted) * (1 + 1e-9)
    assert error(found.weight, W, wanted) <= found.note["error"] * (1 + 1e-9)
    assert found.note["gains"] <= found.note["runs"] <= settings.rounds


def smooth(W: Tensor, wanted: Target) -> fistapruner.Smooth:
    lack = layerwise.target_cross(W, wanted) - W @ wanted.gram
    return fistapruner.Smooth(W, wanted.gram, lack, fistapruner.largest_eigenvalue(wanted.gram))


def test_a_penalty_of_the_largest_correlation_leaves_nothing() -> None:
    W, wanted = draw()[1], target("other")
    top, nothing = float(layerwise.target_cross(W, wanted).abs().max()), torch.zeros_like(W)
    # (the gradient is formed as a difference, hence a hair above the bound for exact zeros)
    assert not fistapruner.fista(nothing, smooth(W, wanted), top * (1 + 1e-9), 50).any()
    assert fistapruner.fista(nothing, smooth(W, wanted), top * 0.9, 50).any()


def test_without_a_penalty_fista_is_least_squares() -> None:
    X, W, Y = draw()
    X = X.clone()
    X[:, :2] /= 20  # conditioned well enough to be solved by gradients
    wanted = other(X, Y)
    V = fistapruner.fista(torch.zeros_like(W), smooth(W, wanted), 1e-9, 3000)
    assert close(V, torch.linalg.lstsq(X, Y).solution.T, 1e-4)


def test_fista_reaches_the_optimality_conditions() -> None:
    X, W, Y = draw()
    X = X.clone()
    X[:, :2] /= 20
    wanted = other(X, Y)
    penalty = 0.05 * float((Y.T @ X).abs().max())
    V = fistapruner.fista(W, smooth(W, wanted), penalty, 3000)
    gradient, free = V @ wanted.gram - Y.T @ X, V != 0
    assert 0 < free.sum() < free.numel()
    assert close(gradient[free], -penalty * V[free].sign(), 1e-4)
    assert gradient[~free].abs().max() <= penalty * (1 + 1e-6)


def test_the_step_covers_the_largest_eigenvalue() -> None:
    for gram in (target("own").gram, torch.diag(torch.tensor([1.0, 5, 2, 5], dtype=torch.float64))):
        largest = float(torch.linalg.eigvalsh(gram)[-1])
        assert largest <= fistapruner.largest_eigenvalue(gram) <= 1.02 * largest
    assert fistapruner.largest_eigenvalue(torch.zeros(3, 3, dtype=torch.float64)) == 1.0


def test_filling_the_support_cannot_hurt() -> None:
    W, wanted = draw()[1], target("other")
    mask = sparsity.keep_mask(W.abs(), HALF)
    V = W * sparsity.keep_mask(W.abs(), Pattern(sparsity=0.75))
    found = fistapruner.filled(V, W, wanted, mask, fistapruner.largest_eigenvalue(wanted.gram))
    assert torch.equal(found != 0, mask) and torch.equal(found[V != 0], V[V != 0])
    assert error(found, W, wanted) < error(V, W, wanted)


def test_an_unknown_start_is_said_in_one_line() -> None:
    for prune in (fistapruner.prune, admm.prune):
        with pytest.raises(BillhookError, match="did you mean 'wanda'"):
            prune(draw()[1], target("own"), HALF, Settings(init="wnda"))


def test_an_input_of_zeros_is_pruned_all_the_same() -> None:
    W = draw()[1]
    nothing = Target(torch.zeros(IN, IN, dtype=torch.float64))
    for prune in METHODS.values():
        found = prune(W, nothing, HALF, Settings(refit=True))
        assert found.weight.isfinite().all() and (found.weight == 0).sum() >= round(0.5 * W.numel())


# -- ADMM ------------------------------------------------------------------------------------------------------------


def test_the_mask_rises_to_the_pattern() -> None:
    V = draw()[1]
    for pattern in PATTERNS:
        before = sparsity.keep_mask(V.abs(), Pattern(sparsity=0.0))
        for part in (0.2, 0.6, 1.0):
            mask = admm.rising(V, pattern, Pattern(sparsity=part * pattern.share), None)
            assert (~mask).sum() == round(part * pattern.share * V.numel())
            assert not (mask & ~before).any()
            before = mask
        assert torch.equal(before, sparsity.keep_mask(V.abs(), pattern, "matrix"))


def test_on_a_fixed_mask_admm_ends_at_the_refit() -> None:
    W, wanted = draw()[1], target("other")
    long = Settings(damping=1e-2, iterations=3000)
    V = admm.prune(W, wanted, HALF, long).weight
    dense, moved, scale = layerwise.scaled(W, wanted)
    expected = layerwise.refit(dense, moved, V != 0, 1e-2, V * scale, iterations=300) / scale
    assert close(V * scale, expected * scale, 1e-3)
