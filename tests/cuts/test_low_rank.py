"""Weights as two thin ones in a model: what is counted, what loads, what is refused, what ranks are given."""

import copy
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from folders import pruned, written

import billhook
from billhook.checkpoints.gguf.write import write_gguf
from billhook.checkpoints.result import Result
from billhook.cuts import low_rank
from billhook.cuts.settings import Factoring
from billhook.errors import BillhookError
from billhook.methods import bolaco, rom
from billhook.models import sizes
from billhook.models.families import ranks
from billhook.models.plan import Plan
from billhook.planning import rank_plan
from billhook.runtime.run import Run

ROM: dict[str, Any] = dict(method="rom", ratio=0.2, layout="per_layer", look=False)
SETTINGS = {"samples": 10, "seq_len": 32, **ROM}
TOKENS = tiny.tokens(8, 24)


def factored(model: Any, text: Path, **more: Any) -> Result:
    return billhook.prune(model, tokenizer=tiny.tokenizer(), calibration=str(text), **{**SETTINGS, **more})


@pytest.mark.covering(some={"family": 6})
@pytest.mark.parametrize("family", tiny.DENSE)
def test_what_is_left_is_what_is_counted_and_it_loads(family: str, tmp_path: Path, text_file: Path) -> None:
    whole = tiny.model(family)
    result = factored(copy.deepcopy(whole), text_file)
    out = result.save(tmp_path / "out")
    size, planned = result.record["sizes"], result.record["low_rank"]
    paths = {(n, role): path for path, (n, role) in rank_plan.weights(whole).items()}
    plan = Plan(ranks={paths[one["layer"], one["role"]]: one["rank"] for one in planned})
    assert size["after"]["parameters"] == size["before"]["parameters"] - sizes.saved_by(whole, plan)
    assert size["achieved_ratio"] >= 0.2 and not ranks(result.model, 0) and ranks(result.model, 2)
    again = billhook.load(out)
    assert ranks(again, 2) == ranks(result.model, 2)
    assert torch.equal(again(TOKENS).logits, result.model(TOKENS).logits)


@torch.no_grad()
def test_whole_ranks_change_nothing_and_trials_are_undone() -> None:
    model = tiny.model("llama")
    before, state = model(TOKENS).logits, copy.deepcopy(model.state_dict())
    paths = list(rank_plan.weights(model))
    known = low_rank.factors_of(model, TOKENS, paths, Factoring("pooled", "dense"), Run())
    with low_rank.factored(model, known, dict.fromkeys(paths, 32)):
        assert ranks(model, 1) and torch.allclose(model(TOKENS).logits, before, atol=1e-5)
    with low_rank.factored(model, known, dict.fromkeys(paths, 4)):
        tried = model(TOKENS).logits
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    low_rank.factorise(model, TOKENS, dict.fromkeys(paths, 4), Factoring("pooled", "dense"), Run())
    assert torch.allclose(model(TOKENS).logits, tried, atol=1e-4) and not torch.allclose(tried, before, atol=1e-2)


@torch.no_grad()
def test_layers_see_those_before_and_text_beats_no_text() -> None:
    errors = {}
    for moment, stream in (("whitened", "sequential"), ("whitened", "dense"), ("plain", "dense")):
        model = tiny.model("llama")
        plan = dict.fromkeys(rank_plan.weights(model), 6)
        errors[moment, stream] = low_rank.factorise(model, TOKENS, plan, Factoring(moment, stream), Run())
    whitened, dense, plain = errors.values()
    assert all(a.error < b.error for a, b in zip(dense, plain, strict=True))
    assert [a.error == b.error for a, b in zip(whitened, dense, strict=True)] == [True] * 7 + [False] * 14


def test_the_last_layers_go_as_published() -> None:
    model = tiny.model("llama", num_hidden_layers=16, hidden_size=128, intermediate_size=256)
    every, decoder = rank_plan.weights(model), sizes.decoder_parameters(model)
    for kept, last in ((0.9, 4), (0.8, 6), (0.5, 12)):
        plan = rom.planner(model, None).make((1 - kept) * decoder)
        assert {every[path][0] for path in plan.ranks} == set(range(16 - last, 16))
        assert 1 - kept <= sizes.saved_by(model, plan) / decoder < 1 - kept + 0.06


def test_a_search_is_taken_only_where_it_beats_equal_shares(text_file: Path) -> None:
    for rounds in (1, 4):
        result = factored(tiny.model("llama"), text_file, method="bolaco", rounds=rounds, probes=4)
        told, found = result.record["bolaco"], result.record["low_rank"]
        assert len(told["trials"]) == rounds and result.record["sizes"]["achieved_ratio"] >= 0.2
        assert told["taken"] == (told["searched"] < told["equal"])
        assert "v" not in {one["role"] for one in found}
        if rounds == 1:
            assert not told["taken"] and len({one["rank"] for one in found if one["role"] in ("gate", "up")}) == 1


def test_shares_are_scaled_and_bounded() -> None:
    kinds = {"a": "qk", "b": "o"}
    assert bolaco.shares(kinds, {"qk": 0.5, "o": 1.0}, 0.8) == {"a": 0.4, "b": 0.8}
    assert bolaco.shares(kinds, {"qk": 0.5, "o": 1.0}, 0.0) == {"a": 0.2, "b": 0.2}


def test_a_low_rank_model_is_cut_no_more(tmp_path: Path, text_file: Path) -> None:
    out = pruned(written("llama", tmp_path / "model"), text_file, tmp_path / "out", **ROM)
    for method, more in (
        ("rom", {}),
        ("fasp", {"axes": ("ffn",)}),
        ("wanda", {"sparsity": 0.5, "ratio": None, "layout": "uniform"}),
    ):
        with pytest.raises(BillhookError, match="is two thin matrices: cut or quantise"):
            billhook.prune(str(out), calibration=str(text_file), **{**SETTINGS, **more, "method": method})
    with pytest.raises(BillhookError, match="is two thin matrices, which no graph"):
        write_gguf(billhook.load(out), tiny.tokenizer(), tmp_path / "out.gguf")


def test_what_cannot_be_factored_is_refused(text_file: Path) -> None:
    with pytest.raises(BillhookError, match="holds: use layout per_layer"):
        factored(tiny.model("llama"), text_file, layout="uniform")
    with pytest.raises(BillhookError, match="no per_layer layout"):
        factored(tiny.model("mixtral"), text_file)
    with pytest.raises(BillhookError, match="last 9: the model has 3 layers"):
        factored(tiny.model("llama"), text_file, last=9)
    with pytest.raises(BillhookError, match="ask for less"):
        factored(tiny.model("llama"), text_file, last=1, ratio=0.5)
    narrow = factored(tiny.model("llama"), text_file, method="fasp", axes=("value",), ratio=0.05)
    with pytest.raises(BillhookError, match="narrower value heads"):
        factored(narrow.model, text_file)
