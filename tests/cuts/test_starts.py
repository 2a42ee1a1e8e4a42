"""No solver ends further off than what it starts from, whatever its inputs are, in every family."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import tiny
import torch
from torch import Tensor

from billhook.calibration.linears import operators
from billhook.calibration.passage import Route
from billhook.cuts.masking import target_of
from billhook.math import admm, restore, sparsity
from billhook.math.layerwise import Settings, Target, squared_error
from billhook.math.pattern import Pattern
from billhook.math.solvers import SOLVERS
from billhook.models.experts import unfuse
from billhook.models.families import weight_of
from billhook.runtime.run import Run

OUT, IN, TOKENS = 16, 24, 200
HALF, TWO_FOUR = Pattern(sparsity=0.5), Pattern(zeros=2, group=4)
REFINING = ("fistapruner", "admm")
ROUNDING = 1e-6  # of what is put out: sweeps and iterations are float32
ROLES = [("down",), pytest.param(("q", "k", "v", "o", "gate", "up"), marks=pytest.mark.slow)]


def of(tokens: Tensor, share: float) -> Tensor:
    return torch.where(torch.arange(IN) % 4 < 4 * share, 0.0, tokens)


INPUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "none dead": lambda X: X,
    "one dead": lambda X: torch.where(torch.arange(IN) == 3, 0.0, X),
    "a quarter dead": lambda X: of(X, 0.25),
    "half dead": lambda X: of(X, 0.5),
    "three quarters dead": lambda X: of(X, 0.75),
    "one alive": lambda X: torch.where(torch.arange(IN) == 3, X, 0.0),
    "all dead": lambda X: 0 * X,
    "nearly dead": lambda X: torch.where(torch.arange(IN) < 6, 1e-9 * X, X),
    "dead but for rounding": lambda X: torch.where(torch.arange(IN) < 6, 1e-25 * X, X),
    "small, half dead": lambda X: 1e-4 * of(X, 0.5),
    "twins": lambda X: X[:, torch.arange(IN) // 2],
    "fewer tokens than inputs": lambda X: X[:5],
    "one token": lambda X: X[:1],
    "one loud": lambda X: torch.where(torch.arange(IN) == 3, 1e4 * X, X),
}


def drawn(kind: str, own: bool) -> tuple[Tensor, Target]:
    """A weight (out, in), and sums over inputs of a kind, whose output is wanted, or that of others; float64."""
    generator = torch.Generator().manual_seed(0)
    shapes = (TOKENS, IN), (IN, IN), (OUT, IN), (TOKENS, OUT)
    X, Q, W, E = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    X = INPUTS[kind](X @ Q)
    Y = X @ W.T
    Y = Y + 0.3 * Y.std() * E[: len(Y)] if len(Y) > 1 else Y
    return W, Target(X.T @ X) if own else Target(X.T @ X, Y.T @ X, Y.square().sum(0))


def off(V: Tensor, W: Tensor, wanted: Target) -> float:
    """||X V^T - Y|| / ||Y||."""
    whole = ((W @ wanted.gram) * W).sum() if wanted.energy is None else wanted.energy.sum()
    return float((squared_error(V, W, wanted).sum() / whole).sqrt()) if whole > 0 else 0.0


def start_of(name: str, found: Tensor, W: Tensor, wanted: Target, pattern: Pattern, settings: Settings) -> Tensor:
    """What a solver that ended at `found` began with: another's weight, its own before a refit, or W on the support."""
    if name in REFINING:
        init = settings.init or "sparsegpt"
        if init != "dense":
            return SOLVERS[init](W, wanted, pattern, replace(settings, refit=False, init=None)).weight
        scores = W.abs() * wanted.gram.diagonal().sqrt() if name == "admm" or settings.normalised else W.abs()
        return W * sparsity.keep_mask(scores, pattern, "matrix")
    if settings.refit:
        return SOLVERS[name](W, wanted, pattern, replace(settings, refit=False)).weight
    return W.masked_fill(found == 0, 0.0)


def settings_of(name: str) -> list[Settings]:
    plain = Settings(tokens=TOKENS, iterations=8, gradual=5, rounds=2, refit_iterations=5)
    kinds = [plain, replace(plain, refit=True, normalised=True), replace(plain, damping=0.0)]
    return kinds + [replace(plain, init=init) for init in ("dense", "wanda") if name in REFINING]


OTHER = ("none dead", "half dead", "dead but for rounding", "twins", "fewer tokens than inputs")
CASES = [(kind, True) for kind in INPUTS] + [(kind, False) for kind in OTHER]


@pytest.mark.parametrize(("kind", "own"), CASES)
@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.covering
def test_no_solver_ends_further_off_than_it_starts(name: str, kind: str, own: bool) -> None:
    W, wanted = drawn(kind, own)
    for pattern, some in ((HALF, settings_of(name)), (TWO_FOUR, settings_of(name)[:1])):
        for settings in some:
            V = SOLVERS[name](W, wanted, pattern, settings).weight
            assert V.isfinite().all() and (V == 0).sum() >= round(0.5 * W.numel())
            begun = start_of(name, V, W, wanted, pattern, settings)
            assert off(V, W, wanted) <= off(begun, W, wanted) + ROUNDING, (pattern, settings)


@pytest.mark.parametrize("kind", [kind for kind in INPUTS if "dead" in kind and "small" not in kind])
def test_alternating_directions_gain_as_much_where_inputs_are_dead(kind: str) -> None:
    """A dead input is as if it were not there: its weights are zeros that cost nothing, and those kept are what they
    were."""
    W, wanted = drawn(kind, own=True)
    idle = wanted.gram.diagonal() == 0
    V = admm.prune(W, wanted, HALF, Settings(tokens=TOKENS)).weight
    assert torch.equal(V[:, idle][V[:, idle] != 0], W[:, idle][V[:, idle] != 0])
    if (left := round(0.5 * W.numel()) - OUT * int(idle.sum())) > 0:
        assert not V[:, idle].any()
        alive = Target(wanted.gram[~idle][:, ~idle])
        share = Pattern(sparsity=left / (OUT * int((~idle).sum())))
        alone = admm.prune(W[:, ~idle], alive, share, Settings()).weight
        assert off(V, W, wanted) <= 1.1 * off(alone, W[:, ~idle], alive)
    else:
        assert off(V, W, wanted) <= ROUNDING


@pytest.mark.parametrize("kind", INPUTS)
def test_what_is_restored_is_no_further_off_than_what_was_kept(kind: str) -> None:
    (W, wanted), kept = drawn(kind, own=True), torch.arange(IN)[torch.arange(IN) % 3 > 0]
    for damping in (0.0, 1e-6, 1e-2):
        V, _ = restore.least_squares(W.float(), wanted.gram, kept, damping)
        before, after = (restore.squared_error(W.float(), one, wanted.gram, kept) for one in (None, V))
        assert after <= before + ROUNDING**2 * restore.energy(W, wanted.gram), damping


@pytest.mark.parametrize("roles", ROLES, ids=["down", "others"])
@pytest.mark.parametrize("family", tiny.CONFIGS)
@pytest.mark.covering(some={"family": 3})
def test_nor_in_any_family(family: str, roles: tuple[str, ...]) -> None:
    model, few = tiny.model(family), Settings(iterations=6, gradual=4, rounds=1)
    unfuse(model)
    groups = operators(model, tiny.tokens(1, 24), roles, Run(), Route(stream="dense", only=[1], held_out=0.0))
    one_each = {role: (name, group.fit) for group in groups for role, name in group.names.items()}
    for name, sums in one_each.values():
        W, alive = weight_of(model, name).double().contiguous(), (torch.arange(len(sums.gram)) % 4 > 0).double()
        gram = target_of(W, sums).gram
        for wanted in (Target(gram), Target(gram * alive * alive[:, None])):  # and with every fourth input dead
            begun = SOLVERS["sparsegpt"](W, wanted, HALF, few).weight
            for solver in REFINING:
                V = SOLVERS[solver](W, wanted, HALF, few).weight
                assert off(V, W, wanted) <= off(begun, W, wanted) + ROUNDING, (name, solver)
