"""Shapes of the per_layer layout that become stock ones again: the same logits, in stock classes, and nothing saved."""

from pathlib import Path

import pytest
import tiny
import torch
import transformers as T
from folders import run
from typer.testing import CliRunner

import billhook
from billhook.checkpoints.save import save
from billhook.cli import app
from billhook.cuts.low_rank import factorise
from billhook.cuts.settings import Factoring
from billhook.errors import BillhookError
from billhook.models import layout
from billhook.models.axes import axes
from billhook.models.stock_shapes import merge, settle_biases
from billhook.models.surgery import remove
from billhook.planning.rank_plan import weights
from billhook.runtime.run import Run

TOKENS = tiny.tokens(4, 24)


def factored(family: str, moment: str = "whitened") -> T.PreTrainedModel:
    model = tiny.model(family)
    last = {path: 6 for path, (n, _) in weights(model).items() if n == 2}
    factorise(model, TOKENS, last, Factoring(moment, "dense"), Run())
    return model


def narrowed(family: str) -> T.PreTrainedModel:
    model = tiny.model(family)
    for axis in axes(model, ("value",)):
        drop = torch.arange(axis.units).view(axis.blocks, -1)[:, : axis.layer + 1]
        remove(model, axis, drop.flatten())
    return model


def saved(model: T.PreTrainedModel, to: Path) -> Path:
    tiny.tokenizer().save_pretrained(to)
    save(model, tiny.tokenizer(), to, None)
    return to


@pytest.mark.covering(some={"family": 3})
@pytest.mark.parametrize("family", tiny.DENSE)
@torch.no_grad()
def test_thin_weights_multiplied_out_give_the_same_logits(family: str) -> None:
    model, plain = factored(family), tiny.model(family)
    before = model(TOKENS).logits
    assert merge(model) == len({path for path, (n, _) in weights(plain).items() if n == 2})
    assert layout.layout_of(model) == "uniform" and model.num_parameters() == plain.num_parameters()
    assert torch.allclose(model(TOKENS).logits, before, atol=1e-4)


@pytest.mark.covering(some={"family": 3})
@pytest.mark.parametrize("family", [name for name in tiny.DENSE if tiny.has(name, "value")])
@torch.no_grad()
def test_narrow_heads_filled_with_zeros_give_the_same_logits(family: str) -> None:
    model = narrowed(family)
    before = model(TOKENS).logits
    assert merge(model) == 6 and layout.layout_of(model) == "uniform"
    assert model.num_parameters() == tiny.model(family).num_parameters()
    assert torch.allclose(model(TOKENS).logits, before, atol=1e-5)


@torch.no_grad()
def test_biases_that_keep_the_mean_are_said_or_refused() -> None:
    model = factored("llama", "centred")
    before = model(TOKENS).logits
    merge(model)
    settle_biases(model)
    assert model.config.attention_bias and model.config.mlp_bias
    stock = T.LlamaForCausalLM(T.LlamaConfig(**{**model.config.to_dict(), "per_layer_config": None}))
    stock.load_state_dict(model.state_dict())
    assert torch.allclose(stock.eval()(TOKENS).logits, before, atol=1e-4)
    model = factored("mistral", "centred")
    merge(model)
    with pytest.raises(BillhookError, match="has a bias, and the stock class of mistral has none there"):
        settle_biases(model)


@torch.no_grad()
def test_export_merges_only_where_asked_to(tmp_path: Path) -> None:
    folder, out = saved(factored("llama"), tmp_path / "model"), tmp_path / "out"
    assert "`billhook export --merge` multiplies" in run("export", folder, "-o", tmp_path / "a.gguf")
    found = billhook.export(folder, out, format="folder", merge=True, quiet=True)
    assert found.merged == "7 weights are back in stock shapes: what was cut of them saves nothing here"
    assert found.record["model_type"] == "llama" and found.record["layout"] == "uniform"
    stock = T.AutoModelForCausalLM.from_pretrained(out)
    assert type(stock) is T.LlamaForCausalLM
    assert torch.allclose(stock(TOKENS).logits, billhook.load(folder)(TOKENS).logits, atol=1e-4)
    assert "leave out --merge" in run("export", out, "--merge", "-o", tmp_path / "a.gguf")
    assert "is a type of a GGUF" in run("export", out, "--format", "folder", "--quantize", "Q8_0", "-o", tmp_path / "b")


@pytest.mark.parametrize("format", ["gguf", "folder"])
def test_what_was_written_is_said_in_words(format: str, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    save(tiny.model("llama"), tiny.tokenizer(), tmp_path / "model", None)
    command = ["export", tmp_path / "model", "--format", format, "-o", tmp_path / "out"]
    said = CliRunner().invoke(app, [str(one) for one in command]).stdout
    assert "written:" in said and "bytes" in said and not set("{}[]") & set(said)
