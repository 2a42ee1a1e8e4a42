"""Every method on every family, in bfloat16, by what docs/families.md says; and that page is fresh."""

from pathlib import Path
from typing import Any

import families_page
import pytest
import tiny
import torch

import billhook
from billhook.choices import MIXED
from billhook.errors import BillhookError
from billhook.models import limits
from billhook.models.families import FAMILIES, layers

PAGE = Path(__file__).parents[2] / "docs" / "families.md"
CASES: dict[str, dict[str, Any]] = {
    **{f"fasp {kind}": {"axes": (kind,)} for kind in ("ffn", "heads", "groups", "expert_ffn", "shared")},
    "fasp value": {"axes": ("value",), "layout": "per_layer"},
    "fasp by gradients": {"axes": ("ffn",), "score": "taylor2_element"},
    **{f"goa {kind}": {"method": "goa", "axes": (kind,)} for kind in ("ffn", "heads", "groups")},
    "adapruner": {"method": "adapruner", "trials": 3, "pool": 24, "pool_len": 32},
    "adapruner groups": {"method": "adapruner", "trials": 3, "pool": 24, "pool_len": 32, "axes": ("groups",)},
    "layerchop": {"method": "layerchop", "layers": 2},
    "experts": {"method": "experts"},
    "experts uncurl": {"method": "experts", "experts": "uncurl"},
    "slicegpt": {"method": "slicegpt", "ratio": 0.2},
    "slicegpt unturned": {"method": "slicegpt", "ratio": 0.2, "rotate": False},
}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text(tiny.text(2000, 300))
    return str(path)


def test_the_page_is_fresh() -> None:
    found = families_page.text()
    assert PAGE.read_text() == found, "make families"
    assert "|  |" not in found


def axis_of(case: str) -> str:
    method, _, kind = case.partition(" ")
    own = {"layerchop": "layers", "experts": "experts", "slicegpt": "residual"}
    return own.get(method) or ("ffn" if kind in ("", "by gradients") else kind)


def makes_sense(family: str, case: str) -> bool:
    """Not twice what tests/models/test_experts.py refuses of a dense model; searches take a second each."""
    if case.startswith("adapruner"):
        return family in (tiny.STRUCTURES if case == "adapruner" else tiny.MIXTURES[:1])
    return family in tiny.MIXTURES or axis_of(case) not in MIXED


def runs(family: str, case: str) -> bool:
    """Whether a method has something to do there, and does not say why not."""
    axis = axis_of(case)
    if axis == "residual":
        stock = family not in tiny.LAYER_NORM + tiny.MIXTURES + tiny.ONLY_FFNS
        return stock and (case == "slicegpt unturned" or family not in tiny.POST_NORM)
    return axis == "layers" or tiny.has(family, axis)


@pytest.mark.covering(first=runs, some={"family": 6, "case": 2})
@pytest.mark.parametrize(
    ("family", "case"), [(family, case) for family in FAMILIES for case in CASES if makes_sense(family, case)]
)
def test_every_method_runs_or_says_why_not(family: str, case: str, text: str) -> None:
    model = tiny.model(family).bfloat16()
    before = sum(p.numel() for p in layers(model).parameters())
    shares = {row["axis"]: row["share_of_decoder"] for row in limits.anatomy(tiny_opened(family))["axes"]}
    given = {"calibration": text, "samples": 10, "seq_len": 32, "multiple_of": 8, **CASES[case]}
    if not {"ratio", "layers"} & set(given):  # half of the units of that axis, or a third of the experts
        given["ratio"] = (shares.get(axis_of(case)) or 0.2) * (0.34 if axis_of(case) == "experts" else 0.5)
    try:
        found = billhook.prune(model, tokenizer=tiny.tokenizer(), **{"method": "fasp", **given})
    except BillhookError as error:
        if "attention sinks" in str(error):
            assert case.startswith("goa")  # which compares attention maps
            return
        words = families_page.axis_cell(tiny_opened(family), axis_of(case), family, families_page.Notes())
        assert words.startswith(("no", "per_layer", "yes, not rotated")), (words, error)
        return
    assert found.model.dtype == torch.bfloat16
    assert sum(p.numel() for p in layers(found.model).parameters()) < before
    assert found.model(tiny.tokens()).logits.isfinite().all()


tiny_opened = families_page.opened
