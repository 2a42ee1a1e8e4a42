"""A model in half precision is pruned as the float32 model of the same weights is, and its results are rounded once.

Mathematics is in float32 and float64; what a half-precision model's activations have lost before is what a type allows.
"""

import copy
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

import billhook
from billhook.calibration import gram
from billhook.models.surgery import cast

BFLOAT16, FLOAT16 = torch.bfloat16, torch.float16
SMALL: dict[str, Any] = dict(seq_len=16, samples=32, multiple_of=2, quiet=True)
ROUNDINGS = 10  # of one weight: its activations pass a few layers
AS_GOOD = 0.1  # solvers choose other zeros where scores are near each other
FITTED = {
    "fasp": ("llama", dict(method="fasp")),
    "fasp, dense": ("gpt2", dict(method="fasp", stream="dense")),
    "goa": ("llama", dict(method="goa")),
    "slicegpt": ("llama", dict(method="slicegpt")),
}
ZEROS = {
    "wanda": dict(method="wanda", pattern="2:4"),
    "sparsegpt": dict(method="sparsegpt", sparsity=0.5),
    "admm": dict(method="admm", pattern="2:4"),
}


def both(family: str, dtype: torch.dtype, text: Path, **how: Any) -> tuple[Any, Any]:
    """What becomes of a model in `dtype`, and of the float32 model of the same weights."""
    half = tiny.model(family)
    cast(half, dtype)
    whole = copy.deepcopy(half).float()
    how = {**SMALL, **how, "tokenizer": tiny.tokenizer(), "calibration": str(text)}
    return billhook.prune(half, **how), billhook.prune(whole, **how)


def distance(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


@pytest.mark.parametrize(
    ("name", "dtype"), [*((name, BFLOAT16) for name in FITTED), ("fasp", FLOAT16)], ids=lambda one: str(one)
)
def test_what_is_fitted_is_float32s_rounded(name: str, dtype: torch.dtype, text_file: Path) -> None:
    family, how = FITTED[name]
    half, whole = both(family, dtype, text_file, ratio=0.2, **how)
    found, known = half.model.state_dict(), whole.model.state_dict()
    assert found.keys() == known.keys()
    for key, one in known.items():
        assert found[key].shape == one.shape and found[key].dtype == dtype
        assert distance(found[key], one.to(dtype)) <= ROUNDINGS * torch.finfo(dtype).eps, key


@pytest.mark.parametrize("method", ZEROS)
def test_zeros_are_as_good_as_float32s(method: str, text_file: Path) -> None:
    half, whole = both("llama", BFLOAT16, text_file, ratio=None, **ZEROS[method])
    pairs = zip(half.record["zeros"]["operators"], whole.record["zeros"]["operators"], strict=True)
    for one, other in pairs:
        assert one["zeros"] == other["zeros"] and one["error"] == pytest.approx(other["error"], rel=AS_GOOD)


def test_weights_that_stay_stay_as_they_were(text_file: Path) -> None:
    """Wanda moves none: nothing is rounded at all."""
    before = tiny.model("llama")
    cast(before, BFLOAT16)
    half, _ = both("llama", BFLOAT16, text_file, ratio=None, **ZEROS["wanda"])
    for key, one in before.state_dict().items():
        now = half.model.state_dict()[key]
        assert torch.equal(now, torch.where(now == 0, 0, one)), key


@pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT16], ids=str)
def test_a_gram_of_halves_is_as_exact_as_one_of_float32(dtype: torch.dtype) -> None:
    x = (torch.randn(3 * gram.BATCH_TOKENS, 24, generator=torch.Generator().manual_seed(0)) + 1).to(dtype)
    exact = x.double().T @ x.double()
    ours, in_float32, in_half = gram.gram_of(x), gram.gram_of(x.float()), x.T @ x
    assert distance(ours, exact) <= 1e-6 and torch.equal(ours, in_float32)
    assert distance(in_half, exact) > 100 * distance(ours, exact)


def test_a_gpu_is_given_halves_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """And asked for float32, in which it sums: no GPU is at hand here, so that what it is asked is looked at."""
    asked: list[tuple[torch.dtype, torch.dtype | None]] = []

    class Elsewhere(Tensor):
        device = torch.device("cuda")  # type: ignore[assignment]

    def mm(a: Tensor, b: Tensor, out_dtype: torch.dtype | None = None) -> Tensor:
        asked.append((a.dtype, out_dtype))
        return a.float() @ b.float()

    monkeypatch.setattr(torch, "mm", mm)
    x = torch.randn(5, 3, dtype=BFLOAT16)
    found = gram.product(x.as_subclass(Elsewhere), x.as_subclass(Elsewhere))
    assert asked == [(BFLOAT16, torch.float32)]
    assert torch.equal(found.as_subclass(Tensor), x.float().T @ x.float())
    gram.product(x.float().as_subclass(Elsewhere), x.float().as_subclass(Elsewhere))
    assert len(asked) == 1  # float32 is multiplied in float32
