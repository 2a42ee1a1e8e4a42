"""Few bits for a whole model: both containers give back the very numbers that were measured, zeros stay, a budget is
kept, and what cannot be is refused in one line."""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import tiny
import torch
import transformers
from safetensors.torch import load_file

import billhook
from billhook.checkpoints import compressed, load
from billhook.checkpoints.save import save
from billhook.choices import BITS_BY, BY_LAYER_TYPES
from billhook.cuts import quantizing
from billhook.cuts.quantizing import paths
from billhook.errors import BillhookError
from billhook.math import grids
from billhook.math.grids import GRIDS
from billhook.models.families import weight_of
from billhook.planning.bits import bounds, size_of
from billhook.planning.few_bits import Wanted
from billhook.pruning import bits_search
from billhook.pruning.quantize import FILE, Quantized, quantize
from billhook.runtime import atomic
from billhook.runtime.run import Run

SMALL: dict[str, Any] = dict(samples=8, probes=2, seq_len=32)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text(tiny.text(2000, 300))
    return str(path)


def folder(tmp_path: Path, name: str = "llama", sparse: bool = False) -> str:
    model = tiny.model(name)
    if sparse:
        for _, _, path in paths(model):
            weight_of(model, path)[:, ::2] = 0.0
    (tmp_path / "model").mkdir()
    save(model, tiny.tokenizer(), tmp_path / "model", None)
    return str(tmp_path / "model")


def written(tmp_path: Path, source: str, **settings: Any) -> tuple[Quantized, Path]:
    out = tmp_path / "out"
    out.mkdir()
    found = quantize(source, Wanted(**{**SMALL, **settings}), Run())
    found.write(out)
    return found, out


@pytest.mark.parametrize("bits", ["4", "Q5_1", "8"])
@pytest.mark.parametrize("method", ["gptq", "rtn"])
@pytest.mark.covering(some={"bits": 1})
def test_a_gguf_gives_back_what_was_measured(tmp_path: Path, text: str, bits: str, method: str) -> None:
    found, out = written(tmp_path, folder(tmp_path), bits=bits, method=method, calibration=text)
    again = load.open_model(str(out / FILE), device="cpu", dtype="float32").model
    ids = torch.arange(40)[None]
    with torch.no_grad():
        assert torch.equal(again(ids).logits, found.model(ids).logits)
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(out / FILE).tensors}
    assert kinds["blk.0.attn_q.weight"] == found.wanted.grid and kinds["token_embd.weight"] == "Q8_0"
    assert kinds["blk.0.ffn_down.weight"] == "F16"  # 48 inputs are no whole blocks
    assert "quantised" in (out / "README.md").read_text()


@pytest.mark.parametrize("name", [name for name, grid in GRIDS.items() if not grid.offset])
def test_packed_integers_give_back_their_codes(name: str) -> None:
    W = torch.randn(6, 768, generator=torch.Generator().manual_seed(0))
    one = grids.nearest(W, GRIDS[name])
    bits = compressed.width(one.grid)
    words = compressed.packed(one.codes, bits)
    assert words.shape == (6, 768 * bits // 32) and torch.equal(compressed.unpacked(words, 768, bits), one.codes)


@pytest.mark.skipif(find_spec("compressed_tensors") is None, reason="the extra quantize is not installed")
@pytest.mark.parametrize("bits", ["2", "4", "5", "8"])
@pytest.mark.covering(some={"bits": 2})
def test_stock_transformers_reads_the_folder_bit_for_bit(tmp_path: Path, text: str, bits: str) -> None:
    found, out = written(tmp_path, folder(tmp_path), bits=bits, format="compressed-tensors", calibration=text)
    stock = transformers.AutoModelForCausalLM.from_pretrained(out).eval()
    ids = torch.arange(40)[None]
    with torch.no_grad():
        assert torch.equal(stock(ids).logits, found.model(ids).logits)
        ours = load.open_model(str(out), device="cpu", dtype="float32", packed=True).model
        assert torch.equal(ours(ids).logits, found.model(ids).logits)
    with pytest.raises(BillhookError, match="is quantised"):
        load.open_model(str(out))


@pytest.mark.skipif(find_spec("compressed_tensors") is None, reason="the extra quantize is not installed")
def test_three_levels_are_the_same_numbers_in_both_containers(tmp_path: Path, text: str) -> None:
    config = transformers.LlamaConfig(**tiny.CONFIGS["llama"]().to_dict() | {"intermediate_size": 256})
    (tmp_path / "model").mkdir()
    save(transformers.LlamaForCausalLM(config).eval(), tiny.tokenizer(), tmp_path / "model", None)
    found, out = written(tmp_path, str(tmp_path / "model"), bits="2", format="both", calibration=text)
    assert {path.rpartition(".")[2] for path in found.codes} == {"down_proj"}  # other rows are no whole blocks of 256
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(out / FILE).tensors}
    assert kinds["blk.0.ffn_down.weight"] == "TQ2_0" and kinds["blk.0.ffn_up.weight"] == "F16"
    stock, ids = transformers.AutoModelForCausalLM.from_pretrained(out).eval(), torch.arange(40)[None]
    in_file = load.open_model(str(out / FILE), device="cpu", dtype="float32").model
    with torch.no_grad():
        assert torch.equal(stock(ids).logits, found.model(ids).logits)
        assert torch.equal(in_file(ids).logits, found.model(ids).logits)
    model = transformers.LlamaForCausalLM(config).eval()
    for _, _, path in paths(model):
        weight_of(model, path).copy_(grids.nearest(weight_of(model, path), GRIDS["T2"]).values())
    save(model, tiny.tokenizer(), tmp_path / "model", None)
    with pytest.raises(BillhookError, match="train it with --scales module"):
        quantize(str(tmp_path / "model"), Wanted(bits="2", **SMALL), Run())
    with pytest.raises(BillhookError, match="no weight has inputs in whole blocks of 256"):
        quantize(folder(tmp_path / "out"), Wanted(bits="2", **SMALL), Run())


@pytest.mark.parametrize(
    "cut",
    [
        dict(method="fasp", ratio=0.2, multiple_of=16),
        dict(method="layerchop", drop="1"),
        dict(method="wanda", sparsity=0.5),
    ],
)
def test_what_was_cut_before_is_still_told(cut: dict[str, Any], tmp_path: Path, text: str) -> None:
    how = dict(calibration=text, samples=4, seq_len=32, look=False, quiet=True)
    source = tmp_path / "cut"
    billhook.prune(folder(tmp_path), **how, **cut).save(source)
    before = json.loads((source / atomic.MARK).read_text())
    _, out = written(tmp_path, str(source), method="rtn", calibration=text)
    after = json.loads((out / atomic.MARK).read_text())
    told = before.keys() - {"versions", "loads"}
    assert {key: after[key] for key in told} == {key: before[key] for key in told}
    assert after["quantized"]["seconds"] > 0 and "loads" not in after
    card = (out / "README.md").read_text()
    assert "bits each" in card and "library_name: gguf" in card and "in a GGUF file" in card
    assert f"prune {tmp_path / 'model'} --method {cut['method']}" in card
    assert "then `billhook quantize OUT --format gguf --method rtn --embedding Q8_0 -o OUT2`" in card


def test_the_card_of_what_no_one_cut_says_how_it_was_made(tmp_path: Path, text: str) -> None:
    source = folder(tmp_path)
    _, out = written(tmp_path, source, bits="5", calibration=text)
    made = f"Made by `billhook quantize {source} --bits 5 --format gguf --method gptq --embedding Q8_0 "
    assert (
        made + f"--stream sequential --calibration {text} --samples 8 --probes 2 --seq-len 32 --seed 0 -o OUT`"
        in (out / "README.md").read_text()
    )


def test_zeros_stay_through_both_methods(tmp_path: Path, text: str) -> None:
    source = folder(tmp_path, sparse=True)
    for method in ("gptq", "rtn"):
        found = quantize(source, Wanted(**SMALL, method=method, calibration=text), Run())
        for _, _, path in paths(found.model):
            assert bool((weight_of(found.model, path)[:, ::2] == 0).all())
    with pytest.raises(BillhookError, match="no level at zero"):
        quantize(source, Wanted(**SMALL, bits="Q4_1", calibration=text), Run())


@pytest.mark.parametrize("allocation", BITS_BY)
def test_a_budget_is_kept_and_the_better_of_two_is_taken(
    allocation: str, tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bits_search, "TRIALS", 4)
    source = folder(tmp_path)
    model = tiny.model("llama")
    low, high = bounds(model, BY_LAYER_TYPES, "Q8_0")
    budget = (2 * low + high) // 3
    found, out = written(tmp_path, source, memory=budget, allocation=allocation, calibration=text)
    choice = found.record["quantized"]["choice"]
    types = [found.codes[path].grid.name for n, role, path in paths(found.model) if role == "q"]
    assert size_of(model, types, "Q8_0") <= budget
    assert choice["taken"] == "mixed" or choice["uniform_kl"] <= choice["kl"]
    assert f"--allocation {allocation}" in (out / "README.md").read_text()
    if allocation == "search":
        least = min(choice["tried"], key=lambda one: one["kl"])
        assert len(choice["tried"]) == 7 and least["kl"] <= choice["tried"][0]["kl"]
        assert size_of(model, choice["by_layer"], "Q8_0") <= budget
    with pytest.raises(BillhookError, match=f"from {low:,} to {high:,} bytes"):
        quantize(source, Wanted(**SMALL, memory=low - 1, calibration=text), Run())


def test_a_killed_run_goes_on_to_the_same_codes(tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    source, wanted = folder(tmp_path), Wanted(**SMALL, calibration=text)
    whole = quantize(source, wanted, Run())

    swept, calls = quantizing._swept, []

    def killed(*given: Any) -> None:
        calls.append(given)
        if len(calls) == 10:
            raise KeyboardInterrupt
        swept(*given)

    monkeypatch.setattr(quantizing, "_swept", killed)
    run = Run(folder=tmp_path / "unfinished")
    with pytest.raises(KeyboardInterrupt):
        quantize(source, wanted, run)
    monkeypatch.undo()
    again = quantize(source, wanted, run)
    assert again.codes.keys() == whole.codes.keys()
    for path, one in whole.codes.items():
        assert torch.equal(again.codes[path].codes, one.codes) and torch.equal(again.codes[path].scales, one.scales)
    assert again.record["quantized"]["operators"] == whole.record["quantized"]["operators"]


def test_an_importance_matrix_holds_the_squares_of_what_enters(tmp_path: Path, text: str) -> None:
    found = quantize(folder(tmp_path), Wanted(**SMALL, calibration=text, imatrix=True), Run())
    found.write_imatrix(tmp_path / "m.gguf")
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    tensors = {tensor.name: np.array(tensor.data) for tensor in reader.tensors}
    assert reader.fields["general.type"].contents() == "imatrix"
    assert tensors["blk.0.attn_q.weight.in_sum2"].shape == (1, 32)
    assert np.array_equal(tensors["blk.0.attn_q.weight.in_sum2"], tensors["blk.0.attn_v.weight.in_sum2"])
    # what enters layer 0's attention is normalised: mean squares near those of the norm's weight, which is 1
    mean = tensors["blk.0.attn_q.weight.in_sum2"].mean() / tensors["blk.0.attn_q.weight.counts"][0, 0]
    assert 0.9 < mean < 1.1


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"bits": "3"}, "bits"),
        ({"bits": "mixed"}, "wants --memory"),
        ({"bits": "4", "memory": 10}, "wants --memory"),
        ({"bits": "T2"}, "use --bits 2, or --format compressed-tensors"),
        ({"allocation": "mi"}, "give --memory too"),
        ({"memory": 10, "method": "kept"}, "leave it out, or --memory"),
        ({"method": "rtn", "imatrix": True}, "leave out --method rtn"),
        ({"embedding": "Q8_0", "format": "both"}, "linear weights alone"),
        ({"bits": "Q4_1", "format": "both"}, "whole numbers of a scale"),
    ],
)
def test_what_cannot_go_together_is_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(BillhookError, match=said):
        Wanted(**settings)


def mixture(tmp_path: Path, name: str, **sizes: Any) -> str:
    config = transformers.AutoConfig.for_model(**tiny.CONFIGS[name]().to_dict() | sizes)
    torch.manual_seed(0)
    save(transformers.AutoModelForCausalLM.from_config(config).eval(), tiny.tokenizer(), tmp_path, None)
    return str(tmp_path)


@pytest.mark.skipif(find_spec("compressed_tensors") is None, reason="the extra quantize is not installed")
def test_stock_transformers_reads_every_expert_bit_for_bit(tmp_path: Path, text: str) -> None:
    (tmp_path / "model").mkdir()
    source = mixture(tmp_path / "model", "mixtral", intermediate_size=32)
    found, out = written(tmp_path, source, format="compressed-tensors", calibration=text)
    assert any(".experts.3.down_proj" in path for path in found.codes)
    stock = transformers.AutoModelForCausalLM.from_pretrained(out).eval()
    ids, ours = torch.arange(40)[None], dict(found.model.named_parameters())
    with torch.no_grad():
        assert torch.equal(stock(ids).logits, found.model(ids).logits)  # unpacks what is not of an expert
    assert all(torch.equal(stock.get_parameter(name), tensor) for name, tensor in ours.items())
    kept = {
        name: one
        for name, one in load_file(out / "model.safetensors").items()
        if name.endswith((compressed.PACKED, compressed.SCALE))
    }
    bits, said = 8 * sum(one.nbytes for one in kept.values()), found.record["quantized"]["bits_per_weight"]
    assert said * sum(one.codes.numel() for one in found.codes.values()) == pytest.approx(bits)


@pytest.mark.parametrize(
    ("name", "settings", "said"),
    [
        ("mixtral", {"method": "rtn"}, "no GGUF: use --format compressed-tensors"),
        ("mixtral", {"memory": 10, "format": "compressed-tensors"}, "as of one type: give --bits"),
        ("mixtral", {"format": "compressed-tensors"}, "down_proj are no whole blocks of 32"),
        ("gpt_oss", {"format": "compressed-tensors"}, "in one tensor on disk"),
        ("gpt2", {}, "is a Conv1D, which holds its weight the other way"),
    ],
)
def test_what_no_client_would_unpack_is_refused(name: str, settings: dict[str, Any], said: str, tmp_path: Path) -> None:
    if "format" in settings and find_spec("compressed_tensors") is None:
        pytest.skip("the extra quantize is not installed")
    with pytest.raises(BillhookError, match=said):
        quantize(mixture(tmp_path, name), Wanted(**{**SMALL, **settings}), Run())
