"""What is kept on disk is found again by the same model and the same code, and by no other."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers as T

import billhook
from billhook.checkpoints import load
from billhook.evaluation import zeroshot
from billhook.runtime import cache
from billhook.search import evidence
from billhook.search.evaluator import evaluator_of
from billhook.training import teacher

LENGTH = 16
WINDOWS = tiny.tokens(4, LENGTH)
PRUNES: dict[str, dict[str, Any]] = {
    "gram": {"method": "fasp", "ratio": 0.2, "stream": "dense", "multiple_of": 2},
    "curves": {"method": "fasp", "ratio": 0.2, "allocation": "sensitivity", "layout": "per_layer", "multiple_of": 8},
    "depth": {"method": "layerchop", "layers": 2, "preset": "block-influence"},
}


def otherwise(theta: float = 10_000.0) -> T.PreTrainedModel:
    """The same weights whatever the rope."""
    rope = {"rope_theta": theta, "rope_type": "default"}
    torch.manual_seed(0)
    return T.AutoModelForCausalLM.from_config(tiny.CONFIGS["llama"](rope_parameters=rope)).eval().requires_grad_(False)


def pruned(name: str, model: T.PreTrainedModel, folder: Path, text: Path) -> None:
    given = {"calibration": str(text), "samples": 4, "probes": 2, "seq_len": LENGTH}
    billhook.prune(model, tokenizer=tiny.tokenizer(), statistics=folder, **given, **PRUNES[name])


KEPT: dict[str, Callable[[T.PreTrainedModel, Path, Path], Any]] = {
    **{name: lambda m, to, text, name=name: pruned(name, m, to, text) for name in PRUNES},
    "pool": lambda m, to, text: evidence.evidence(m, WINDOWS, torch.zeros(4, dtype=torch.long), ("ffn",), folder=to),
    "gates": lambda m, to, text: evidence.gate_fishers(m, WINDOWS, ("ffn",), folder=to),
    "trial": lambda m, to, text: evaluator_of(m, "nll", to).losses([{}], WINDOWS),
    "lessons": lambda m, to, text: teacher.fill_cache(m, WINDOWS, to, teacher.Lesson(4)),
    "tasks": lambda m, to, text: (to / zeroshot._model_hash(m, tiny.tokenizer())).touch(),
}


@pytest.mark.parametrize("kind", KEPT)
def test_nothing_is_found_by_another_model_or_by_other_code(
    kind: str, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = tmp_path / "kept"
    kept.mkdir()

    def files(model: T.PreTrainedModel) -> set[str]:
        before = {one.name for one in kept.iterdir()}
        KEPT[kind](model, kept, text_file)
        return {one.name for one in kept.iterdir()} - before

    first = files(otherwise())
    assert first and not files(otherwise())  # the same again: all is there
    assert len(files(otherwise(theta=500.0))) == len(first)
    monkeypatch.setattr(cache, "code_sha256", lambda: "of another version")
    assert len(files(otherwise())) == len(first)


@pytest.mark.parametrize("family", tiny.STRUCTURES)
def test_a_model_is_the_same_streamed_and_under_another_name(family: str, tmp_path: Path) -> None:
    out = tmp_path / family
    tiny.model(family).save_pretrained(out)
    tiny.tokenizer().save_pretrained(out)
    whole, streamed = (load.open_model(str(out), device="cpu", stream=stream).model for stream in (False, True))
    known = cache.model_sha256(whole)
    assert cache.model_sha256(streamed) == known
    whole.config._name_or_path, whole.config.use_cache = "elsewhere", False
    assert cache.model_sha256(whole) == known
    if whole.config.model_type != "bloom":
        whole.config._attn_implementation = "eager"
        assert cache.model_sha256(whole) != known


def test_every_field_that_decides_is_counted() -> None:
    model, seen = tiny.model("granite"), set()
    for key, value in {"residual_multiplier": 0.6, "attention_multiplier": 0.5, "rms_norm_eps": 0.1}.items():
        seen.add(cache.model_sha256(model))
        setattr(model.config, key, value)
    model.model.rotary_emb.inv_freq *= 2
    assert len(seen | {cache.model_sha256(model)}) == 4
