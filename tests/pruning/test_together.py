"""Methods whose gates learn, by two processes as `accelerate launch` starts them; and what these refuse to share."""

import json
from pathlib import Path
from typing import Any

import pytest
from processes import by_hand

import billhook
from billhook.errors import BillhookError
from billhook.runtime.peers import Peers

SMALL: dict[str, Any] = dict(ratio=0.3, seq_len=32, samples=6, steps=12, windows=2, multiple_of=4, look=False)
MORE: dict[str, dict[str, Any]] = {"mlpruning": {"settling": 4}, "gates": {"restoration": False, "scaling": 4}}


def flags(given: dict[str, Any]) -> list[str]:
    """Settings as the command line has them."""
    said = []
    for name, value in given.items():
        flag = name.replace("_", "-")
        said += [f"--{flag if value else f'no-{flag}'}"] if isinstance(value, bool) else [f"--{flag}", str(value)]
    return said


@pytest.mark.parametrize(
    "method",
    ["loraprune", *(pytest.param(name, marks=pytest.mark.whole) for name in ("gates", "l0", "softtopk", "mlpruning"))],
)
def test_two_processes_learn_as_one(method: str, folder: Path, text: str, tmp_path: Path) -> None:
    given = {"method": method, "calibration": text, **SMALL, **MORE.get(method, {})}
    one = billhook.prune(str(folder), **given).record
    said = by_hand(["prune", str(folder), *flags(given), "-o", str(tmp_path / "out"), "--json"])
    two = json.loads(said)
    assert two[method]["losses"] == pytest.approx(one[method]["losses"], rel=1e-4, abs=1e-6)
    assert two[method]["tokens"] == 2 * 32 * (
        12 + MORE.get(method, {}).get("settling", 0) + (4 if method == "gates" else 0)
    )
    assert two["cuts"] and [cut["dropped"] for cut in two["cuts"]] == [cut["dropped"] for cut in one["cuts"]]
    assert (tmp_path / "out" / "model.safetensors").exists() and not (tmp_path / "out.unfinished").exists()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (dict(method="layerchop", ratio=0.3), "2 processes: layerchop works in one: start it without accelerate"),
        (dict(method="optishear", sparsity=0.5), "2 processes: optishear works in one: start it without accelerate"),
        (dict(method="fasp", ratio=0.3, statistics="kept"), "statistics: 2 processes of accelerate launch share"),
        (dict(method="wanda", sparsity=0.5, stream="dense", jobs=2), "jobs: 2 processes of accelerate launch share"),
        (dict(method="gates", ratio=0.3, windows=3), "2 processes: windows 3 of a step cannot be shared alike"),
        (dict(method="gates", speedup=1.2, windows=2), "2 processes: each would time the model for itself"),
    ],
)
def test_what_processes_cannot_share(given: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(BillhookError, match=words):
        billhook.prune("nowhere", **given, peers=Peers(0, 2), work=tmp_path / "run")
    assert not list(tmp_path.iterdir())


def test_processes_need_one_folder() -> None:
    with pytest.raises(BillhookError, match="name one folder for all, as work"):
        billhook.prune("nowhere", method="gates", ratio=0.3, peers=Peers(0, 2))
