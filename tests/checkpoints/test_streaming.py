"""A model that stays in its files: the same bits as one in memory."""

import ctypes
import gc
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import tiny
import torch
from folders import FASP, CutOffError, pruned, run, same, tensors, written
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

import billhook
from billhook.checkpoints import load, save
from billhook.choices import PRESETS
from billhook.models import residual
from billhook.models.families import layers
from billhook.runtime import offload
from billhook.runtime.ahead import Ahead

IDS = tiny.tokens()
CASES: dict[str, dict[str, Any]] = {
    "fasp": FASP,
    "fasp dense": {**FASP, "stream": "dense"},
    "fasp per layer": {**FASP, "layout": "per_layer", "allocation": "skip:1,0"},
    "standardised": {**FASP, "layout": "per_layer", "allocation": "standardised"},
    "goa": {**FASP, "method": "goa"},
    "goa groups": {**FASP, "method": "goa", "axes": ("ffn", "groups"), "ratio": 0.35},
    "goa unrecovered": {
        **FASP,
        "method": "goa",
        "recovery": False,
        "layout": "per_layer",
        "allocation": "standardised",
    },
    "layerchop": {"method": "layerchop", "preset": "contiguous", "layers": 2},
    "patched": {"method": "layerchop", "drop": "1", "patch": "linear"},
    "wanda": {"method": "wanda", "sparsity": 0.5},
    "fistapruner": {"method": "fistapruner", "pattern": "2:4"},
    "admm": {"method": "admm", "sparsity": 0.6, "stream": "dense_target"},
    "slicegpt": {"method": "slicegpt", "ratio": 0.2, "multiple_of": 4},
    "slicegpt as it is": {"method": "slicegpt", "ratio": 0.2, "multiple_of": 4, "rotate": False},
    "slicegpt unrestored": {"method": "slicegpt", "ratio": 0.2, "multiple_of": 4, "restoration": False},
}
OTHERS = ("fasp", "goa", "fistapruner", "layerchop")
FAMILIES = ("llama", "gpt2", "gemma2", "phi3", "opt")  # tied, transposed, scaled, fused, with biases
SLICED = {  # norms over heads, fused, untied; and scaled, tied, with norms behind writers, which no rotation passes
    "slicegpt": ("qwen3", "phi3", "mistral"),
    "slicegpt as it is": ("qwen3", "phi3", "gemma2", "gemma3_text"),
}


@pytest.mark.parametrize(
    ("family", "case"),
    [("llama", case) for case in CASES]
    + [(one, case) for one in FAMILIES[1:] for case in OTHERS]
    + [(one, case) for case, families in SLICED.items() for one in families],
)
@pytest.mark.covering(some={"case": 5, "family": 3})
def test_streamed_is_as_in_memory(
    family: str, case: str, tmp_path: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(save, "SHARD", 2**13)
    model = written(family, tmp_path / "model")
    a = pruned(model, text_file, tmp_path / "a", **CASES[case])
    b = pruned(model, text_file, tmp_path / "b", stream_weights=True, **CASES[case])
    assert same(a, b)
    configs = [json.loads((one / "config.json").read_text()) for one in (a, b)]
    assert configs[0] == configs[1]
    assert (a / "generation_config.json").read_text() == (b / "generation_config.json").read_text()
    index = json.loads((b / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(tensors(b)) and {
        (b / one).exists() for one in index["weight_map"].values()
    } == {True}
    again = AutoModelForCausalLM.from_pretrained(b, trust_remote_code="auto_map" in configs[1])
    assert torch.equal(again(IDS).logits, billhook.load(a)(IDS).logits)


@pytest.mark.parametrize("case", ["fasp", "admm"])
def test_layers_that_are_brought_while_others_compute_are_the_same(
    case: str, tmp_path: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As an accelerator is given them; here a thread reads them, too."""
    arrived: list[int] = []

    def counted(self: Ahead) -> Any:
        arrived.append(len(self.files))
        yield from before(self)

    before = Ahead.arrived
    model = written("llama", tmp_path / "model")
    a = pruned(model, text_file, tmp_path / "a", stream_weights=True, **CASES[case])
    monkeypatch.setattr(offload, "APART", ("cpu",))
    monkeypatch.setattr(Ahead, "arrived", counted)
    b = pruned(model, text_file, tmp_path / "b", stream_weights=True, **CASES[case])
    assert same(a, b) and len(arrived) == len(layers(tiny.model("llama"))) - 1


def test_what_was_brought_is_left_where_the_weights_have_moved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offload, "APART", ("cpu",))
    model = load.open_model(str(written("llama", tmp_path / "model")), stream=True).model
    layer = layers(model)[1]
    offload.begin_to_load(layer)
    edited = torch.zeros_like(tiny.model("llama").model.layers[1].mlp.up_proj.weight)
    save_file({"model.layers.1.mlp.up_proj.weight": edited}, tmp_path / "edited.safetensors")
    offload.read_from(model, tmp_path / "edited.safetensors", ["model.layers.1.mlp.up_proj.weight"])
    with offload.loaded(layer, edits=False):
        assert not layer.get_parameter("mlp.up_proj.weight").any()


def test_shards_and_bfloat16_come_in_and_go_out(tmp_path: Path, text_file: Path) -> None:
    tiny.model("llama").to(torch.bfloat16).save_pretrained(tmp_path / "model", max_shard_size="20KB")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 3
    a = pruned(tmp_path / "model", text_file, tmp_path / "a", **FASP)
    b = pruned(tmp_path / "model", text_file, tmp_path / "b", stream_weights=True, **FASP)
    assert same(a, b) and {one.dtype for one in tensors(b).values()} == {torch.bfloat16}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.covering(some={"family": 2})
def test_a_paged_model_computes_what_it_would_in_memory(family: str, tmp_path: Path) -> None:
    model = written(family, tmp_path / "model", "20KB")
    there, away = (load.open_model(str(model), stream=stream).model for stream in (False, True))
    assert torch.equal(there(IDS).logits, away(IDS).logits)
    assert {one.device.type for one in away.parameters()} == {"meta"} and away.device.type == "cpu"
    assert sum(p.numel() for p in away.parameters()) == sum(p.numel() for p in there.parameters())
    ends = residual.embedding_and_head(away)
    assert (ends[0].weight is ends[1].weight) == there.config.tie_word_embeddings
    buffers = dict(there.named_buffers())
    assert all(torch.equal(one, buffers[name]) for name, one in away.named_buffers())
    greedy = [one.generate(IDS, max_new_tokens=8, do_sample=False) for one in (there, away)]
    assert torch.equal(*greedy)


@pytest.mark.covering(some={"case": 2})
@pytest.mark.parametrize("case", ["fasp", "goa", "fistapruner", "layerchop", "slicegpt", "slicegpt as it is"])
def test_one_layer_is_there_at_a_time(
    case: str, tmp_path: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of each model, and where there are two, the same of both."""
    there, most = set[tuple[str, int]](), list[int]()
    bring, leave = offload.OffloadedModule.load, offload.OffloadedModule.unload

    def brought(page: offload.OffloadedModule) -> None:
        bring(page)
        there.add((page.name, id(page.store)))
        most.append(len({name for name, _ in there}))
        assert len({pager for _, pager in there}) == len(there)

    def left(page: offload.OffloadedModule, edited: bool = False) -> None:
        leave(page, edited)
        there.difference_update([(page.name, id(page.store))] if not page.users else [])

    monkeypatch.setattr(offload.OffloadedModule, "load", brought)
    monkeypatch.setattr(offload.OffloadedModule, "unload", left)
    pruned(written("llama", tmp_path / "model"), text_file, tmp_path / "out", stream_weights=True, **CASES[case])
    assert max(most) == 1 and not there


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: one.clone() for name, one in offload.parameters(model)}


def test_a_twin_keeps_its_weights_and_files_go_once_nobody_reads_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    model = load.open_model(str(written("llama", tmp_path / "model")), stream=True).model
    source, first, deep = tensors(tmp_path / "model"), layers(model)[0], layers(model)[1]

    def spilled() -> list[str]:
        return sorted(one.name.partition("-")[0] for one in tmp_path.glob("billhook-pages-*/*"))

    def double(module: Any) -> None:
        with offload.loaded(module):
            module.mlp.up_proj.weight.data.mul_(2)

    double(first)
    double(first)  # whose first file nobody reads any more
    assert spilled() == ["model.layers.0"]
    twin = offload.copied(model)
    before = weights(model)
    assert {name: float((before[name] / one).mean()) for name, one in source.items() if "0.mlp.up" in name} == {
        "model.layers.0.mlp.up_proj.weight": 4.0
    }
    double(first)
    double(deep)
    assert spilled() == ["model.layers.0", "model.layers.0", "model.layers.1"]
    kept = weights(twin)
    assert all(torch.equal(one, kept[name]) for name, one in before.items())
    assert torch.equal(
        weights(model)["model.layers.0.mlp.up_proj.weight"], 2 * kept["model.layers.0.mlp.up_proj.weight"]
    )
    layers(twin)[0] = torch.nn.Identity()
    offload.renumber(twin)
    assert spilled() == ["model.layers.0", "model.layers.1"]
    del model, twin, first, deep
    gc.collect()
    assert not list(tmp_path.glob("billhook-pages-*"))


def test_what_is_tied_stays_so_until_it_is_untied(tmp_path: Path) -> None:
    model = load.open_model(str(written("llama", tmp_path / "model")), stream=True).model
    embedding, head = residual.embedding_and_head(model)
    with offload.loaded(embedding):
        embedding.weight.data.mul_(2)
        embedding.weight = torch.nn.Parameter(embedding.weight.data[:, :16].clone(), False)
    assert head.weight is embedding.weight and head.weight.shape[1] == 16
    with offload.loaded(head), offload.loaded(embedding):
        assert torch.equal(head.weight, embedding.weight)
    head.weight = torch.nn.Parameter(embedding.weight.clone(), False)
    with offload.loaded(embedding):
        embedding.weight.data.zero_()
    with offload.loaded(head):
        assert head.weight.abs().sum() > 0


@pytest.mark.parametrize("amiss", [False, True])
def test_edited_pages_lie_beside_the_output_and_go(
    amiss: bool, tmp_path: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where there is a folder for what a prune keeps; what a killed one left there goes when the next begins."""
    model, work, spill = written("llama", tmp_path / "model"), tmp_path / "work", offload.WeightStore.swap_out
    (work / "pages").mkdir(parents=True)
    (work / "pages" / "left").write_text("x")
    (work / "run.json").write_text("{}")
    most = [0]

    def counted(pager: offload.WeightStore, page: str, tensors: Any) -> None:
        spill(pager, page, tensors)
        assert not (work / "pages" / "left").exists()
        most.append(sum(one.stat().st_size for one in (work / "pages").iterdir()))
        if amiss and len(most) == 8:
            raise CutOffError

    monkeypatch.setattr(offload.WeightStore, "swap_out", counted)
    given: dict[str, Any] = {"calibration": str(text_file), "samples": 10, "seq_len": 32, "stream_weights": True}
    if amiss:
        with pytest.raises(CutOffError):
            billhook.prune(model, work=work, fresh=True, **given, **CASES["slicegpt"])
    else:
        billhook.prune(model, work=work, fresh=True, **given, **CASES["slicegpt"])
        stored = sum(one.nbytes for one in tensors(model).values())
        assert max(most) < 3 * stored
    gc.collect()
    assert not (work / "pages").exists()


HEAP = """
import ctypes, sys, torch
from pathlib import Path
from transformers import AutoConfig
from billhook.checkpoints import streaming

class Info(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()]

libc = ctypes.CDLL(None)
libc.mallinfo2.restype = Info
before = libc.mallinfo2().arena
streaming.bare(AutoConfig.from_pretrained(sys.argv[1]), torch.float32)
print(libc.mallinfo2().arena - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="glibc alone says so")
def test_the_heap_does_not_grow_with_the_model(tmp_path: Path) -> None:
    """What serves large blocks from holes peaks higher with every layer; in a process whose heap is what it was at
    first."""
    sizes = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 12, "num_attention_heads": 8}
    LlamaConfig(**sizes, vocab_size=256).save_pretrained(tmp_path)
    said = subprocess.run([sys.executable, "-c", HEAP, tmp_path], capture_output=True, text=True, check=True).stdout
    assert int(said) < 100_000_000  # of 600 that all the weights take


@pytest.mark.parametrize("preset", [one for one in PRESETS if one not in ("taylor", "contiguous")])
@pytest.mark.covering(some={"preset": 3})
def test_layers_are_chosen_alike_in_their_files(preset: str, tmp_path: Path, text_file: Path) -> None:
    model, settings = written("llama", tmp_path / "model"), {"method": "layerchop", "layers": 2, "preset": preset}
    found = [
        billhook.prune(model, calibration=str(text_file), samples=10, seq_len=32, stream_weights=one, **settings).record
        for one in (False, True)
    ]
    assert found[0]["dropped_layers"] == found[1]["dropped_layers"] != []


REFUSED = {
    "--ratio 0.2 --allocation sensitivity --layout per_layer": "tries cuts on the whole model",
    "--ratio 0.2 --score taylor1_vector": "needs gradients of the whole model",
    "--speedup 1.2": "times the whole model",
    "--method layerchop --layers 2 --preset taylor": "needs gradients",
}


@pytest.mark.parametrize("flags", REFUSED)
def test_what_needs_all_weights_is_refused(flags: str, command: list[object], tmp_path: Path) -> None:
    given = command if "--method" not in flags else [one for one in command if one not in ("--multiple-of", 2)]
    assert REFUSED[flags] in run(*given, *flags.split(), "--stream-weights")
    assert not (tmp_path / "out").exists()


def cut_short(folder: Path) -> str:
    file = sorted(folder.glob("*.safetensors"))[1]
    os.truncate(file, file.stat().st_size - 100)
    return f"{file.name} is damaged or truncated (model.layers"


def lost(folder: Path) -> str:
    file = sorted(folder.glob("*.safetensors"))[1]
    file.unlink()
    return f"{file.name} is missing, though model.safetensors.index.json names it (for model.layers"


def misplaced(folder: Path) -> str:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    first, last = min(index["weight_map"].values()), max(index["weight_map"].values())
    key = next(key for key, file in index["weight_map"].items() if file == last)
    index["weight_map"][key] = first
    path.write_text(json.dumps(index))
    return f"says that {first} holds {key}, but it is in {last}"


def not_a_number(folder: Path) -> str:
    for file in folder.glob("*.safetensors"):
        held = load_file(file)
        if "model.layers.1.mlp.up_proj.weight" in held:
            held["model.layers.1.mlp.up_proj.weight"][0, 0] = torch.nan
            save_file(held, file, {"format": "pt"})
    return "tensor model.layers.1.mlp.up_proj.weight holds NaN"


@pytest.mark.parametrize(("value", "dtype"), [(torch.nan, "float32"), (-torch.inf, "bfloat16"), (1e30, "float16")])
def test_what_is_no_number_is_named_alike(value: float, dtype: str, tmp_path: Path, text_file: Path) -> None:
    """The file and the tensor, streamed and not; a number beyond the dtype that is computed in is none."""
    model = written("llama", tmp_path / "model", "20KB")
    name = "model.layers.1.mlp.up_proj.weight"
    (file,) = (one for one in model.glob("*.safetensors") if name in load_file(one))
    held = load_file(file)
    held[name][0, 0] = value
    save_file(held, file, {"format": "pt"})
    given = ["--calibration", text_file, "--samples", 4, "--seq-len", 32, "--ratio", 0.2, "--dtype", dtype]
    for streamed in ([], ["--stream-weights"]):
        said = run("prune", model, "-o", tmp_path / "out", "--method=fasp", *given, *streamed)
        assert f"{file}: tensor {name} holds NaN or infinite values" in said.replace("\n", "")
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("damage", [cut_short, lost, misplaced, not_a_number])
def test_damaged_shards_are_named(damage: Callable[[Path], str], tmp_path: Path, text_file: Path) -> None:
    model = written("llama", tmp_path / "model", "20KB")
    says = damage(model)
    given = ["--calibration", text_file, "--samples", 4, "--seq-len", 32, "--ratio", 0.2, "--multiple-of", 2]
    for streamed in ([], ["--stream-weights"]):
        assert says in run("prune", model, "-o", tmp_path / "out", "--method=fasp", *given, *streamed)
        assert not (tmp_path / "out").exists()


def test_a_model_that_would_not_fit_is_streamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = str(written("llama", tmp_path / "model"))

    def opened() -> PreTrainedModel:
        return load.open_model(model, stream=None).model

    assert not offload.is_offloaded(opened())
    monkeypatch.setattr(load, "free_bytes", lambda device: 100_000)
    assert offload.is_offloaded(opened())


@pytest.mark.parametrize("case", CASES)
@pytest.mark.covering(some={"case": 3})
def test_no_random_number_is_drawn(case: str, tmp_path: Path, text_file: Path) -> None:
    """So there is no generator whose state a layer's record would have to hold: a seed decides the windows, and the
    claim has them."""
    model = written("llama", tmp_path / "model")
    states = [torch.random.get_rng_state(), numpy.random.get_state()[1]]
    pruned(model, text_file, tmp_path / "out", **CASES[case])
    assert torch.equal(states[0], torch.random.get_rng_state())
    assert numpy.array_equal(states[1], numpy.random.get_state()[1])
