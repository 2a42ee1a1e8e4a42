"""Values in a basis of their own: the same model, and the least that narrower values can lose."""

import copy
from typing import Any

import pytest
import tiny
import torch

import billhook
from billhook.cuts.values import turn_values
from billhook.errors import BillhookError
from billhook.math.shared_turn import fitted_turn, loss
from billhook.math.value_axes import principal_turn
from billhook.models.axes import axes
from billhook.models.plan import Plan
from billhook.runtime.run import Run

WITH_VALUES = [name for name in tiny.CONFIGS if tiny.has(name, "value")]


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("kept", [1, 5, 11])
def test_of_one_head_the_last_channels_are_the_least_that_can_be_lost(kept: int) -> None:
    A, W = drawn(200, 12) @ drawn(12, 12, seed=1), drawn(30, 12, seed=2)
    onto, back = principal_turn((A.mT @ A)[None], (W.mT @ W)[None], 0.0)
    torch.testing.assert_close(onto @ back, torch.eye(12, dtype=torch.float64))
    Z, turned = A @ onto.mT, W @ back
    torch.testing.assert_close(Z @ turned.mT, A @ W.mT)
    error = (A @ W.mT - Z[:, :kept] @ turned[:, :kept].mT).square().sum()
    least = torch.linalg.svdvals(A @ W.mT)[kept:].square().sum()
    assert float(error) == pytest.approx(float(least), rel=1e-9)
    lengths = turned.square().sum(0)
    torch.testing.assert_close(lengths, lengths.mean().expand(12))


def test_what_is_never_read_or_never_there_turns_back() -> None:
    A, W = drawn(50, 6), drawn(9, 6, seed=1)
    A[:, 2], W[:, 4] = 0, 0
    for moment, read in ((A.mT @ A, W.mT @ W), (A.mT @ A, 0 * W.mT @ W), (0 * A.mT @ A, W.mT @ W)):
        onto, back = principal_turn(moment[None], read[None], 1e-3)
        assert onto.isfinite().all()
        torch.testing.assert_close(onto @ back, torch.eye(6, dtype=torch.float64))


def test_of_heads_that_share_a_turn_a_fitted_one_loses_less() -> None:
    d, kept = 10, 5
    for heads in (1, 3):
        A = torch.cat([drawn(300, d) + drawn(300, d, seed=n) @ drawn(d, d, seed=n + 9) for n in range(heads)], 1)
        W = drawn(40, heads * d, seed=5)
        M, Q = A.mT @ A, W.mT @ W
        own = [slice(n * d, n * d + d) for n in range(heads)]
        onto, back = principal_turn(torch.stack([M[s, s] for s in own]), torch.stack([Q[s, s] for s in own]), 0.0)
        turn, undo = fitted_turn(onto, back, M, Q, kept)
        torch.testing.assert_close(turn @ undo, torch.eye(d, dtype=torch.float64))
        before, after = loss(onto[:kept], M, Q), loss(turn[:kept], M, Q)
        Z = torch.cat([A[:, s] @ turn[:kept].mT for s in own], 1)
        best = torch.linalg.lstsq(Z, A @ W.mT).solution
        assert after == pytest.approx(float((A @ W.mT - Z @ best).square().sum()), rel=1e-6)
        assert after == pytest.approx(before, rel=1e-6) if heads == 1 else after < 0.95 * before


@pytest.mark.covering(some={"family": 6})
@pytest.mark.parametrize("family", WITH_VALUES)
def test_a_turned_model_is_the_same_model(family: str) -> None:
    model, ids = tiny.model(family), tiny.tokens()
    before, weights = model(ids).logits, {name: value.clone() for name, value in model.state_dict().items()}
    turn_values(model, tiny.tokens(8, 16, seed=2), Run())
    plan = Plan({(axis.layer, "value"): axis.blocks * 3 for axis in axes(model, ("value",))})
    turn_values(model, tiny.tokens(8, 16, seed=2), Run(), plan)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, weights[name])}
    assert any(".v_proj." in name for name in changed)
    assert all(any(part in name for part in (".v_proj.", ".o_proj.", ".out_proj.")) for name in changed)
    assert torch.allclose(model(ids).logits, before, atol=1e-4)


def pruned(model: Any, **other: Any) -> Any:
    how = dict(method="fasp", axes=("value",), layout="per_layer", samples=8, seq_len=32, ratio=0.04, look=False)
    return billhook.prune(model, tokenizer=tiny.tokenizer(), **{**how, **other})


def test_turned_values_lose_less_than_chosen_channels(tmp_path: Any) -> None:
    text = tmp_path / "text.txt"
    text.write_text(tiny.text(3000))
    lost = {}
    for basis in ("principal", "channels"):
        found = pruned(tiny.model("llama"), value_basis=basis, calibration=str(text))
        lost[basis] = sum(cut["error"] for cut in found.record["cuts"])
    assert lost["principal"] < lost["channels"]


def test_one_process_turns() -> None:
    for given, words in (
        (dict(jobs=2, stream="dense"), "in one process: use value_basis channels"),
        (dict(value_basis="rotated"), "unknown value_basis 'rotated'"),
    ):
        with pytest.raises(BillhookError, match=words):
            pruned(copy.deepcopy(tiny.model("llama")), **given)
