"""Grams of the dense stream, kept for other ratios and methods: no layer runs again, and nothing differs."""

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file

import billhook
from billhook.errors import BillhookError

FASP: dict[str, Any] = {"multiple_of": 2, "axes": ("ffn", "groups")}
GIVEN: dict[str, Any] = {"stream": "dense", "samples": 12, "seq_len": 16}
MASKS: dict[str, Any] = {"method": "sparsegpt"}


@pytest.fixture(scope="module", params=["llama", "qwen2_moe"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    tiny.model(request.param).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


def pruned(model: Path, text: Path, out: Path, **settings: Any) -> dict[str, torch.Tensor]:
    billhook.prune(model, calibration=str(text), **{"method": "fasp", **GIVEN, **settings}).save(out)
    return {key: one for file in out.glob("*.safetensors") for key, one in load_file(file).items()}


def made(model: Path, text: Path, **settings: Any) -> dict[str, torch.Tensor]:
    """The same in memory."""
    return billhook.prune(model, calibration=str(text), **{"method": "fasp", **GIVEN, **settings}).model.state_dict()


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def forbid_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    def enter(*_: Any, **__: Any) -> None:
        raise AssertionError("a forward pass")

    monkeypatch.setattr("billhook.calibration.passage.enter", enter)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({**FASP, "ratio": 0.2}, {**FASP, "ratio": 0.15}),
        ({**MASKS, "sparsity": 0.3}, {**MASKS, "pattern": "2:4"}),
        ({**MASKS, "sparsity": 0.3}, {"method": "wanda", "sparsity": 0.5, "targets": ("v", "down")}),
        ({**MASKS, "sparsity": 0.3}, {**FASP, "ratio": 0.2}),
    ],
)
@pytest.mark.covering(some={"second": 2})
def test_another_cut_runs_no_layer(
    first: dict[str, Any],
    second: dict[str, Any],
    model: Path,
    tmp_path: Path,
    text_file: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kept = tmp_path / "kept"
    plain = [made(model, text_file, **how) for how in (first, second)]
    assert same(plain[0], made(model, text_file, statistics=kept, **first))
    forbid_passes(monkeypatch)
    assert same(plain[1], made(model, text_file, statistics=kept, **second))


@pytest.mark.parametrize("how", [{**FASP, "ratio": 0.2}, {**MASKS, "sparsity": 0.3}], ids=["fasp", "zeros"])
@pytest.mark.covering
def test_workers_keep_and_take_them(
    how: dict[str, Any], tmp_path: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, kept = tmp_path / "model", tmp_path / "kept"
    tiny.model("llama").save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    given = {"statistics": kept, **how}
    a = pruned(folder, text_file, tmp_path / "a", jobs=2, **given)
    assert same(a, pruned(folder, text_file, tmp_path / "b", jobs=2, **given))
    with monkeypatch.context() as patch:
        forbid_passes(patch)
        assert same(a, pruned(folder, text_file, tmp_path / "c", **given))
    for file in kept.glob("gram*.safetensors"):
        file.write_bytes(b"")
    with pytest.raises(BillhookError, match="is damaged or truncated"):
        pruned(folder, text_file, tmp_path / "d", jobs=2, **given)


def test_a_streamed_model_shares_them(tmp_path: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, kept = tmp_path / "model", tmp_path / "kept"
    tiny.model("llama").save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    given = {"statistics": kept, "ratio": 0.2, **FASP}
    a = pruned(folder, text_file, tmp_path / "a", stream_weights=True, **given)
    forbid_passes(monkeypatch)
    assert same(a, pruned(folder, text_file, tmp_path / "b", **given))
    assert same(a, pruned(folder, text_file, tmp_path / "c", stream_weights=True, **given))


@pytest.mark.parametrize(
    "other", [{"seed": 1}, {"samples": 11}, {"dtype": "bfloat16"}, {"method": "wanda", "sparsity": 0.5}]
)
@pytest.mark.covering(some={"other": 2})
def test_what_they_do_not_belong_to_is_measured(other: dict[str, Any], tmp_path: Path, text_file: Path) -> None:
    """The last wants Grams of inputs that the first prune did not look at."""
    folder, kept = tmp_path / "model", tmp_path / "kept"
    tiny.model("llama").save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    made(folder, text_file, statistics=kept, ratio=0.2, **FASP)
    given = other if "method" in other else {"ratio": 0.2, **FASP, **other}
    before = set(kept.iterdir())
    found = made(folder, text_file, statistics=kept, **given)
    assert same(found, made(folder, text_file, **given))
    assert set(kept.iterdir()) > before


def test_a_damaged_one_is_named(tmp_path: Path, text_file: Path) -> None:
    folder, kept = tmp_path / "model", tmp_path / "kept"
    tiny.model("llama").save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    given = {"statistics": kept, "ratio": 0.2, **FASP}
    pruned(folder, text_file, tmp_path / "first", **given)
    broken = next(kept.glob("gram-*.safetensors"))
    broken.write_bytes(broken.read_bytes()[:100])
    with pytest.raises(BillhookError, match=f"{broken.name} is damaged or truncated .* delete it"):
        pruned(folder, text_file, tmp_path / "second", **given)
