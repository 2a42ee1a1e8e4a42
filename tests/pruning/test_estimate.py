"""What --dry-run says, against the prune itself."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

import billhook
from billhook import cli
from billhook.checkpoints.load import Opened
from billhook.errors import BillhookError
from billhook.math import scores
from billhook.planning import texts
from billhook.pruning import rehearsal
from billhook.pruning.dry_run import estimate
from billhook.pruning.recipe import recipe
from billhook.runtime.run import Run

WAYS: dict[str, dict[str, Any]] = {
    "ffn": {"ratio": 0.1},
    "dense, heads too": {"ratio": 0.1, "stream": "dense", "axes": ("ffn", "heads")},
    "layers": {"method": "layerchop", "drop": "1"},
    "first spared": {"ratio": 0.1, "allocation": "skip:1,0", "layout": "per_layer"},
    "wanda": {"method": "wanda", "sparsity": 0.5, "layer_sparsity": {2: 0.3}},
    "sparsegpt": {"method": "sparsegpt", "pattern": "2:4"},
}
ON = torch.float32, torch.device("cpu")
GIVEN: dict[str, Any] = {"look": False, "method": "fasp", "samples": 20, "seq_len": 32, "multiple_of": 1}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {}
    for name in ("llama", "gpt2", "qwen2_moe"):
        made[name] = tmp_path_factory.mktemp(name)
        tiny.model(name).save_pretrained(made[name])
        tiny.tokenizer().save_pretrained(made[name])
        (made[name] / "text.txt").write_text(tiny.text())
    return made


@pytest.mark.parametrize(
    "family, way", [*(("llama", way) for way in WAYS), ("gpt2", "ffn"), ("gpt2", "wanda"), ("qwen2_moe", "ffn")]
)
@pytest.mark.covering(some={"way": 2})
def test_sizes_and_stages_are_those_of_the_prune(
    family: str, way: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    given = {"calibration": str(folders[family] / "text.txt"), **GIVEN, **WAYS[way]}
    said = estimate(str(folders[family]), recipe(**given), tmp_path / "out")
    found = billhook.prune(folders[family], work=tmp_path / "work", **given).record
    sizes = found["sizes"]
    for part in ("parameters", "decoder_parameters"):
        assert said[part] == {when: sizes[when][part] for when in ("before", "after")}
    stages = set(found["seconds"]) - {"layers"}
    assert stages <= set(said["stages"])
    assert said["peak_bytes"] > 0 and said["seconds"] > 0
    assert (said["flops"] > 0) == bool(stages)


def test_the_look_is_told_of_where_there_is_one(folders: dict[str, Path], tmp_path: Path) -> None:
    given = {"calibration": str(folders["llama"] / "text.txt"), **GIVEN, "ratio": 0.1}
    with_look, without = (
        estimate(str(folders["llama"]), recipe(**{**given, "look": look}), tmp_path / "o")["stages"]
        for look in (True, False)
    )
    assert with_look["look"]["seconds"] > 0 and "look" not in without


def test_operations_grow_with_the_text_where_they_do(folders: dict[str, Path], tmp_path: Path) -> None:
    given = {"calibration": str(folders["llama"] / "text.txt"), **GIVEN, "stream": "dense", "ratio": 0.3}
    few, many = (
        estimate(str(folders["llama"]), recipe(**{**given, "samples": n}), tmp_path / "o")["stages"] for n in (10, 40)
    )
    assert many["forward"]["flops"] == pytest.approx(4 * few["forward"]["flops"])
    assert many["gram"]["flops"] == pytest.approx(4 * few["gram"]["flops"])
    assert many["restoration"]["flops"] == pytest.approx(few["restoration"]["flops"])
    tokens, weights = 40 * 32, 3 * (32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 48)
    attention = 3 * 2 * 2 * 32 * 32 * tokens  # layers, products, operations, tokens and channels of a window
    assert many["forward"]["flops"] == pytest.approx(2 * tokens * weights + attention, rel=1e-6)


@pytest.mark.parametrize(
    "flags, says",
    [
        (
            ["--allocation", "sensitivity", "--layout", "per_layer"],
            "allocation sensitivity tries cuts on the whole model",
        ),
        (["--method", "adapruner"], "a search runs as long as its trials do"),
        (["--method", "layerchop", "--preset", "angular"], "presets other than by position try layers"),
        (["--method", "slicegpt"], "slicegpt cuts all layers at once"),
        (["--samples", "10000"], "10000"),
        (["--jobs", "2"], "it tells what one process takes"),
    ],
)
def test_what_cannot_be_told_is_refused(flags: list[str], says: str, folders: dict[str, Path], tmp_path: Path) -> None:
    text = str(folders["llama"] / "text.txt")
    given = ["prune", str(folders["llama"]), "--ratio", "0.3", "--calibration", text, "--seq-len", "32"]
    error = (
        CliRunner()
        .invoke(cli.app, [*given, "--method=fasp", *flags, "--dry-run", "-o", str(tmp_path / "out")])
        .exception
    )
    assert isinstance(error, BillhookError) and says in str(error)


def test_a_mixture_whose_first_layer_has_no_experts_is_rehearsed_by_its_last(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    given = {"calibration": str(folders["qwen2_moe"] / "text.txt"), **GIVEN, "ratio": 0.25, "axes": ("expert_ffn",)}
    given["multiple_of"] = 8
    stages = estimate(str(folders["qwen2_moe"]), recipe(**given), tmp_path / "o")["stages"]
    assert stages["gram"]["flops"] > 0 and stages["restoration"]["flops"] > 0


def test_what_the_prune_would_refuse_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(folders["qwen2_moe"], model)
    joined = {key: one.contiguous() for key, one in tiny.model("qwen2_moe").state_dict().items()}
    save_file(joined, model / "model.safetensors", {"format": "pt"})
    given = ["prune", str(model), "--method", "wanda", "--sparsity", "0.5", "--dry-run"]
    given += ["--calibration", str(folders["llama"] / "text.txt"), "--seq-len", "32"]
    taken = CliRunner().invoke(cli.app, [*given, "-o", str(folders["llama"])]).exception
    streamed = CliRunner().invoke(cli.app, [*given, "--stream-weights", "-o", str(tmp_path / "o")]).exception
    assert isinstance(taken, BillhookError) and isinstance(streamed, BillhookError)
    assert "stored under another name or in one with others" in str(streamed)


def test_nothing_is_written(folders: dict[str, Path], tmp_path: Path) -> None:
    text = str(folders["llama"] / "text.txt")
    given = ["prune", str(folders["llama"]), "--ratio", "0.3", "--calibration", text, "--seq-len", "32"]
    done = CliRunner().invoke(
        cli.app, [*given, "--method=fasp", "--multiple-of", "1", "--dry-run", "-o", str(tmp_path / "out")]
    )
    assert done.exit_code == 0 and "in all" in done.output
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("way", ["ffn", pytest.param("sparsegpt", marks=pytest.mark.whole)])
def test_operations_of_a_narrowed_rehearsal_are_those_of_the_whole_width(
    way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = tiny.model("llama", intermediate_size=512)
    given = recipe(**{**GIVEN, **WAYS[way]})
    none = torch.zeros(0, 32, dtype=torch.long)
    opened = Opened(whole, None, "tiny", None, torch.float32)
    plan = given.method.plan(opened, given, texts.Texts(none, none), Run())
    found = []
    monkeypatch.setattr(scores, "BLOCK", 32)  # below which operations are no polynomial
    monkeypatch.setattr(rehearsal, "LARGEST", 4)  # then 8, 16 and 32: no narrower than that
    for about, shrunk in ((1e9, 1), (0.0, 4)):
        monkeypatch.setattr(rehearsal, "ABOUT", about)
        monkeypatch.setattr(rehearsal, "SHORTEST", 32)
        found.append(rehearsal.rehearse(whole, (given.samples, given.calibration.seq_len), (given.method, plan), *ON))
        assert found[-1].shrunk == shrunk
    for stage, expected in found[0].further.items():
        if stage not in rehearsal.BY_TOKEN:  # which count from shorter windows and by weights and squares
            assert found[1].further[stage].flops == pytest.approx(expected.flops, rel=0.1), stage


def test_what_counts_no_operation_grows_with_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rehearsal, "ABOUT", 0.0)  # so that the FFN is narrowed
    monkeypatch.setattr(rehearsal, "_timed", lambda *_: ({"forward": 1.0, "gram": 1.0, "solver": 2.0}, 0))
    whole = tiny.model("llama", intermediate_size=2048)
    given = recipe(**{**GIVEN, **WAYS["wanda"]})
    plan = given.method.plan(whole, given, None, Run())
    found = rehearsal.rehearse(whole, (given.samples, given.calibration.seq_len), (given.method, plan), *ON)
    weights = [2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * width + 2 * 32 for width in (2048, 256)]  # attention, FFN, norms
    assert found.shrunk == 8 and found.further["solver"].seconds == pytest.approx(weights[0] / weights[1])
