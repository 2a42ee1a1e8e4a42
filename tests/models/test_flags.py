"""Flags that training left in config.json: they stay there, and decide nothing that billhook does."""

import json
from pathlib import Path
from typing import Any

import pytest
import test_bad_input
import tiny
import torch
from folders import written
from test_bad_input import Bench

import billhook
from billhook.checkpoints import load

bench = test_bad_input.bench

FLAGS: dict[str, dict[str, Any]] = {
    "outputs": {
        **{"output_hidden_states": True, "output_attentions": True, "output_router_logits": True},
        **{"return_dict": False, "use_cache": False},
    },
    "eager": {"attn_implementation": "eager", "output_attentions": True},
}
METHODS = {
    "llama": ("fasp", "--ratio", 0.2, "--layout", "per_layer"),
    "mixtral": ("experts", "--ratio", 0.2),
    "gpt2": ("wanda", "--sparsity", 0.5),
    "qwen3": ("layerchop", "--ratio", 0.3, "--preset", "perplexity"),
}


@pytest.mark.covering
@pytest.mark.parametrize(
    ("asked", "family", "streamed"),
    [
        *[("outputs", family, False) for family in METHODS],
        *[("eager", family, False) for family in ("llama", "mixtral")],
        *[(asked, "mixtral", True) for asked in FLAGS],
    ],
)
def test_flags_of_a_config_stay_and_decide_nothing(asked: str, family: str, streamed: bool, bench: Bench) -> None:
    model, out = written(family, bench.tmp / "flagged"), bench.tmp / "out"
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | FLAGS[asked]))
    method, *how = METHODS[family]
    text = ("--calibration", bench.text, "--samples", 4, "--seq-len", 16)
    where = ("--stream-weights",) if streamed else ()
    code, _, err = bench.run("prune", model, "-o", out, "--method", method, *how, *text, *where)
    assert (code, err) == (0, "")
    written_config = json.loads((out / "config.json").read_text())
    assert {key: written_config.get(key) for key in FLAGS[asked]} == FLAGS[asked]
    by = load.load(out).config._attn_implementation
    assert by == ("eager" if asked == "eager" else "sdpa")
    given = ("--text", bench.text, "--seq-len", 16, "--windows", 2, "--parts", "none" if streamed else "texts")
    code, _, err = bench.run("evaluate", out, "--against", model, *given, "--new-tokens", 2, *where)
    assert (code, err) == (0, "")


def test_a_model_in_memory_may_give_tuples(text_file: Path, tmp_path: Path) -> None:
    given = {"calibration": str(text_file), "samples": 4, "seq_len": 16, "method": "layerchop", "ratio": 0.3}
    found = {}
    for named in (True, False):
        model = tiny.model("qwen3")
        model.config.return_dict = named
        result = billhook.prune(model, tokenizer=tiny.tokenizer(), preset="perplexity", **given)
        result.save(tmp_path / str(named))
        assert result.model.config.return_dict == named
        found[named] = result.model.state_dict()
    assert json.loads((tmp_path / "False" / "config.json").read_text())["return_dict"] is False
    assert all(torch.equal(value, found[False][key]) for key, value in found[True].items())
