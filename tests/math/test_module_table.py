"""A table of modules: parts, worths, ties, and which steps go first."""

import random
from itertools import pairwise

import pytest
import torch

from billhook.errors import BillhookError
from billhook.math.mope import HAIR, parts, ties_broken, worth
from billhook.math.ordering import Step, lowest_first


def test_parts_are_all_units_the_lowest_scores_first() -> None:
    scores = torch.rand(19, generator=torch.Generator().manual_seed(0))
    found = parts(scores, 8)
    assert len(found) == 8 and {len(part) for part in found} == {2, 3}
    assert torch.equal(scores[torch.cat(found)], scores.sort().values)
    assert [len(part) for part in parts(scores[:3], 8)] == [1, 1, 1]


def test_units_of_a_module_sum_to_its_loss_and_go_module_by_module() -> None:
    modules, losses = [[4, 0], [3, 1, 5], [2]], [0.5, -0.25, 0.1]
    found = worth(modules, losses)
    for units, loss in zip(modules, losses, strict=True):
        assert float(found[units].sum()) == pytest.approx(loss, rel=1e-12)
        assert found[units].tolist() == pytest.approx([loss / len(units)] * len(units), rel=HAIR)
    assert found.argsort().tolist() == [3, 1, 5, 2, 4, 0]


def test_ties_are_broken_and_nothing_else_is_moved() -> None:
    draw = random.Random(0)
    losses = [draw.randrange(-3, 9) / 100 for _ in range(200)]
    finer = [draw.random() for _ in losses]
    found = ties_broken(losses, finer)
    assert sorted(range(200), key=found.__getitem__) == sorted(range(200), key=lambda n: (losses[n], finer[n]))
    assert sum(found) - sum(losses) < 0.005  # half of the least difference
    assert ties_broken(losses, [0.0] * 200) == losses
    assert ties_broken([0.2, 0.2], [2.0, 1.0])[0] > ties_broken([0.2, 0.2], [2.0, 1.0])[1]


def steps(seed: int, whole: bool) -> list[Step]:
    draw, found = random.Random(seed), list[Step]()
    for layer in range(4):
        for kind, price in (("ffn", 3), ("groups", 7)):
            losses = sorted(draw.random() for _ in range(5))
            found += [Step(layer, kind, n + 1, price * (n + 1), loss) for n, loss in enumerate(losses)]
        found += [Step(layer, None, 0, 60, draw.random())] if whole else []
    return found


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_the_lowest_losses_go_first_until_the_budget_is_met(seed: int, whole: bool) -> None:
    found, savings = steps(seed, whole), dict[tuple[int, str, int], float]()
    savings = {(step.layer, step.kind, step.count): step.saving for step in found}
    for target in (10, 55, 120):
        counts, gone = lowest_first(found, target, 4)
        saved = sum(savings[(*place, count)] for place, count in counts.items()) + 60 * len(gone)
        assert abs(saved - target) <= (30 if whole else 3.5) and not {n for n, _ in counts} & set(gone)
        taken = [s for s in found if s.layer in gone or counts.get((s.layer, s.kind), 0) >= s.count > 0]
        left = [s for s in found if s not in taken and not s.whole and s.layer not in gone]
        cheap = [s for s in left if s.loss < max(t.loss for t in taken if not t.whole and t.layer not in gone)]
        # what is left out though it costs less would have led too far, or comes after one that would
        assert all(
            saved + savings[s.layer, s.kind, s.count] - savings.get((s.layer, s.kind, s.count - 1), 0) > target
            for s in cheap
        )
    assert [a.loss <= b.loss for a, b in pairwise(found[:5])] == [True] * 4  # of one axis


def test_one_layer_stays_and_too_large_a_budget_is_refused() -> None:
    whole = [Step(n, None, 0, 10, 0.1) for n in range(3)]
    assert lowest_first(whole, 20, 3) == ({}, [0, 1])
    with pytest.raises(BillhookError, match="can save at most 20"):
        lowest_first(whole, 30, 3)
