"""Adapters beside a base of few bits: stock peft loads them, the base stays, and they start at what rounding took."""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gguf
import pytest
import tiny
import torch
import transformers
from folders import written

from billhook.checkpoints import load
from billhook.checkpoints.gguf import lora
from billhook.checkpoints.gguf.write import tensor_of
from billhook.checkpoints.result import Result
from billhook.checkpoints.save import save
from billhook.errors import BillhookError
from billhook.math import loftq
from billhook.planning.few_bits import Wanted
from billhook.pruning.quantize import FILE, quantize
from billhook.recovery.recover import recover
from billhook.recovery.settings import recovery
from billhook.runtime.run import Run
from billhook.training import trainables

pytestmark = pytest.mark.skipif(find_spec("compressed_tensors") is None, reason="the extra quantize is not installed")
IDS = torch.arange(40)[None]


@pytest.fixture
def bench(tmp_path: Path) -> Path:
    """A folder with a model, the same in four bits in both containers, and two texts."""
    words = tiny.text(1200)
    (tmp_path / "train.txt").write_text(words[:3000])
    (tmp_path / "held.txt").write_text(words[3000:4000])
    written("llama", tmp_path / "dense")
    (tmp_path / "few").mkdir()
    quantize(str(tmp_path / "dense"), Wanted(method="rtn", format="both"), Run()).write(tmp_path / "few")
    return tmp_path


def adapted(bench: Path, student: str = "few", **more: Any) -> Result:
    how = {"teacher": str(bench / "dense"), "text": (str(bench / "train.txt"),), "held_out": (str(bench / "held.txt"),)}
    how |= {"seq_len": 16, "tokens": 96, "lr": 1e-3, "device": "cpu", "precision": "float32", "rank": 4}
    return recover(bench / student, trainable="lora", merge=False, **{**how, **more})


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft 0.21 asks for it
def test_stock_peft_puts_the_adapter_on_the_stock_base(bench: Path) -> None:
    import peft

    found = adapted(bench, loftq=str(bench / "dense"))
    out = found.save(bench / "adapter")
    assert not (out / "model.safetensors").exists() and (out / "report.html").exists()
    told = json.loads((out / "adapter_config.json").read_text())
    assert told["base_model_name_or_path"] == str(bench / "few") and told["r"] == 4
    base = transformers.AutoModelForCausalLM.from_pretrained(bench / "few")
    with torch.no_grad():
        base(IDS)  # the first forward unpacks the weights, which peft looks for
        stock = peft.PeftModel.from_pretrained(base, str(out))
        assert torch.equal(stock.eval()(IDS).logits, found.model(IDS).logits)
        assert not torch.equal(found.model(IDS).logits, load.load(bench / "few")(IDS).logits)
    card = (out / "README.md").read_text()
    assert "library_name: peft" in card and "--no-merge" in card and f"--loftq {bench / 'dense'}" in card


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_base_and_adapter_are_the_same_numbers_in_both_containers(bench: Path) -> None:
    found = adapted(bench, loftq=str(bench / "dense"))
    out = found.save(bench / "adapter")
    assert "--lora adapter.gguf" in (out / "README.md").read_text()
    reader = gguf.GGUFReader(out / "adapter.gguf")
    told = {key: field.contents() for key, field in reader.fields.items()}
    assert (told["general.type"], told["adapter.type"], told["general.architecture"]) == ("adapter", "lora", "llama")
    assert told["adapter.lora.alpha"] == 4 * trainables.SCALE
    there = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in reader.tensors}
    base = load.open_model(str(bench / "few" / FILE), device="cpu", dtype="float32").model
    model = trainables.train_adapters(base, None, 4)
    for path, (A, B, _) in lora.factors(model).items():
        name = tensor_of(base, path)
        rows, heads = there.pop(f"{name}.lora_b"), {"attn_q": 4, "attn_k": 2}.get(name.split(".")[2])
        A.copy_(there.pop(f"{name}.lora_a"))
        B.copy_(rows.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2) if heads else rows)
    assert not there
    with torch.no_grad():
        assert torch.equal(model.eval()(IDS).logits, found.model(IDS).logits)


def test_without_an_architecture_of_llama_cpp_the_adapter_says_why(bench: Path) -> None:
    out = adapted(bench, str(written("opt", bench / "other")), teacher="", objective="ce").save(bench / "adapter")
    told = json.loads((out / "billhook.json").read_text())["adapter"]
    assert told["gguf"] is None and "no GGUF of opt" in told["why"] and not (out / "adapter.gguf").exists()
    assert "--lora" not in (out / "README.md").read_text()


def test_adapters_start_at_what_few_bits_took(bench: Path) -> None:
    few = load.open_model(str(bench / "few"), device="cpu", dtype="float32", packed=True).model
    dense = load.load(bench / "dense")
    with torch.no_grad():
        apart = [(dense(IDS).logits - few(IDS).logits).norm()]
        model = trainables.train_adapters(few, None, 16)
        trainables.begin_at(model, dense)
        apart.append((dense(IDS).logits - model(IDS).logits).norm())
    assert apart[1] < 0.6 * apart[0]


def test_the_factors_leave_what_the_lowest_singular_values_hold() -> None:
    W = torch.randn(12, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    A, B = loftq.factors(W, torch.zeros_like(W), 5, 2)
    left = torch.linalg.svdvals(W)[5:].square().sum().sqrt()
    torch.testing.assert_close((W - 2 * B @ A).norm(), left)
    torch.testing.assert_close(A.norm(), B.norm())
    A, B = loftq.factors(W, torch.zeros_like(W), 16, 2)
    torch.testing.assert_close(2 * B @ A, W)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"merge": False}, "use --trainable lora"),
        ({"merge": False, "trainable": "lora", "keep_zeros": True}, "without --keep-zeros"),
        ({"trainable": "lora", "loftq": "demo"}, "give --no-merge"),
    ],
)
def test_what_cannot_go_together_is_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(BillhookError, match=said):
        recovery(teacher="demo", tokens=100, **settings)


def test_a_base_that_no_adapter_can_name_is_refused(bench: Path) -> None:
    with pytest.raises(
        BillhookError, match=r"embed_tokens.weight has another shape: name the model that was quantised"
    ):
        adapted(bench, loftq=str(written("opt", bench / "other")))
    (bench / "mixture").mkdir()
    save(tiny.model("mixtral"), tiny.tokenizer(), bench / "mixture", None)
    with pytest.raises(BillhookError, match="is a mixture of experts"):
        adapted(bench, "mixture")
    with pytest.raises(BillhookError, match="is no folder"):
        adapted(bench, f"few/{FILE}")
