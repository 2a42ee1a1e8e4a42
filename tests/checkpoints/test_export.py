"""GGUF export: what is in the file, what is refused, and what llama.cpp itself makes of it.

The tests that need llama.cpp run where BILLHOOK_LLAMA_PYTHON names a Python with llama-cpp-python, or this one has it.
"""

import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import tiny
import torch
import transformers as T

from billhook import demo
from billhook.checkpoints import load
from billhook.checkpoints.clients import llamacpp
from billhook.checkpoints.gguf import vocabulary
from billhook.checkpoints.gguf.write import write_gguf
from billhook.choices import QUANTIZER
from billhook.errors import BillhookError
from billhook.models.axes import axes
from billhook.models.families import layers
from billhook.models.surgery import remove

LLAMA = os.environ.get("BILLHOOK_LLAMA_PYTHON") or (sys.executable if importlib.util.find_spec("llama_cpp") else "")
in_llama = pytest.mark.skipif(not LLAMA, reason="BILLHOOK_LLAMA_PYTHON names no Python that has llama-cpp-python")

IDS = tiny.tokens(1)[0].tolist()
LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}


def built(family: str, **config: Any) -> Any:
    """A tiny model, with other config values if asked for."""
    if not config:
        return tiny.model(family)
    base = tiny.CONFIGS[family]().to_dict() | config
    torch.manual_seed(0)
    made = T.AutoModelForCausalLM.from_config(T.AutoConfig.for_model(**base)).eval().requires_grad_(False)
    for name, param in made.named_parameters():
        param.data = torch.randn_like(param) * 0.2 + ("norm" in name and name.endswith("weight"))
    return made


def tie(model: Any) -> Any:
    model.lm_head.weight = model.model.embed_tokens.weight
    return model


def uneven(model: Any) -> Any:
    """Cut every layer to other sizes: channels in all but the first, query heads in the second, a group in the last."""
    for n, axis in enumerate(axes(model, ("ffn",))):
        remove(model, axis, torch.arange(5 * n))
    remove(model, axes(model, ("heads",))[1], torch.tensor([0, 2]))
    remove(model, axes(model, ("groups",))[-1], torch.tensor([0]))
    return model


def fewer_heads(model: Any) -> Any:
    for axis in axes(model, ("groups",)):
        remove(model, axis, torch.tensor([1]))
    return model


def without_ffn(model: Any) -> Any:
    remove(model, axes(model, ("ffn",))[1], torch.arange(48))
    return model


CASES: dict[str, tuple[str, Callable[[], Any]]] = {  # name -> architecture, model
    "llama": ("llama", lambda: built("llama")),
    "llama with biases": ("llama", lambda: built("llama_bias")),
    "llama with fewer heads": ("llama", lambda: fewer_heads(built("llama"))),
    "llama 3 rope": ("llama", lambda: built("llama", rope_parameters=tiny.LLAMA3_ROPE)),
    "llama linear rope": ("llama", lambda: built("llama", rope_parameters=LINEAR_ROPE)),
    "llama uneven": ("deci", lambda: uneven(built("llama"))),
    "llama uneven with biases": ("deci", lambda: uneven(built("llama_bias"))),
    "llama uneven 3 rope": ("deci", lambda: uneven(built("llama", rope_parameters=tiny.LLAMA3_ROPE))),
    "a layer without FFN": ("deci", lambda: without_ffn(built("llama"))),
    "mistral": ("llama", lambda: built("mistral")),
    "mistral uneven": ("deci", lambda: uneven(built("mistral"))),
    "qwen2": ("qwen2", lambda: built("qwen2")),
    "qwen2 with fewer heads": ("deci", lambda: fewer_heads(built("qwen2"))),
    "qwen2 uneven": ("deci", lambda: uneven(built("qwen2"))),
    "qwen3": ("qwen3", lambda: built("qwen3")),
    "qwen3 linear rope": ("qwen3", lambda: built("qwen3", rope_parameters=LINEAR_ROPE)),
    "qwen3 uneven": ("openelm", lambda: uneven(tie(built("qwen3")))),
}


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out" / "model.gguf"


def fields(path: Path) -> dict[str, Any]:
    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}


def tensors(path: Path) -> dict[str, np.ndarray]:
    """Values by name, float32, in torch's order of dimensions."""
    return {one.name: gguf.quants.dequantize(one.data, one.tensor_type) for one in gguf.GGUFReader(path).tensors}


def types(path: Path) -> dict[str, str]:
    return {one.name: one.tensor_type.name for one in gguf.GGUFReader(path).tensors}


def in_transformers_order(rows: np.ndarray, heads: int) -> np.ndarray:
    """The inverse of the export's reordering, written another way: entry i of a head from 2i, i + half from 2i + 1."""
    per_head = rows.reshape(heads, -1, *rows.shape[1:])
    return np.concatenate([per_head[:, 0::2], per_head[:, 1::2]], 1).reshape(rows.shape)


@pytest.mark.parametrize("case", CASES)
def test_the_architecture_and_every_value(case: str, out: Path) -> None:
    arch, make = CASES[case]
    model = make()
    report = write_gguf(model, tiny.tokenizer(), out, "F32")
    found, written = fields(out), tensors(out)
    assert report["arch"] == found["general.architecture"] == arch
    assert report["bytes"] == out.stat().st_size
    assert report["fallback"] == 0
    assert ("output.weight" in written) == (model.lm_head.weight is not model.model.embed_tokens.weight)
    for n, layer in enumerate(layers(model)):
        attention, mlp, at = layer.self_attn, layer.mlp, f"blk.{n}."
        heads, kv_heads = (linear.out_features // attention.head_dim for linear in (attention.q_proj, attention.k_proj))
        for key, value in {
            "feed_forward_length": max(1, mlp.up_proj.out_features),
            "attention.head_count": heads,
            "attention.head_count_kv": kv_heads,
        }.items():
            said = found[f"{arch}.{key}"]
            assert (said[n] if isinstance(said, list) else said) == value
        if arch == "openelm":
            fused = torch.cat([attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight])
            assert np.array_equal(written[at + "attn_qkv.weight"], fused.numpy())
            continue
        for name, linear, count in (("q", attention.q_proj, heads), ("k", attention.k_proj, kv_heads)):
            for leaf, param in linear.named_parameters():
                rows = written[f"{at}attn_{name}.{leaf}"]
                there = in_transformers_order(rows, count) if arch in ("llama", "deci") else rows
                assert np.array_equal(there, param.numpy())
        assert np.array_equal(written[at + "attn_v.weight"], attention.v_proj.weight.numpy())
        assert np.array_equal(written[at + "ffn_norm.weight"], layer.post_attention_layernorm.weight.numpy())
        down = mlp.down_proj.weight.numpy()
        assert np.array_equal(written[at + "ffn_down.weight"], down if down.size else np.zeros((32, 1)))


def test_rope_that_is_scaled(out: Path) -> None:
    model = built("llama", rope_parameters=tiny.LLAMA3_ROPE)
    write_gguf(model, tiny.tokenizer(), out, "F16")
    plain = 10000.0 ** (-np.arange(0, 8, 2) / 8)
    assert types(out)["rope_freqs.weight"] == "F32"
    np.testing.assert_allclose(
        plain / tensors(out)["rope_freqs.weight"], model.model.rotary_emb.inv_freq.numpy(), rtol=1e-5
    )
    write_gguf(built("qwen2", rope_parameters=LINEAR_ROPE), tiny.tokenizer(), out, "F16")
    assert fields(out)["qwen2.rope.scaling.type"] == "linear"
    assert fields(out)["qwen2.rope.scaling.factor"] == 4.0


ROUNDING = {"F32": 0, "F16": 1e-3, "BF16": 1e-2, "Q8_0": 0.01, "Q5_1": 0.05, "Q5_0": 0.07, "Q4_1": 0.1, "Q4_0": 0.15}


@pytest.mark.parametrize("quantize", ROUNDING)
def test_types_and_what_falls_back(quantize: str, out: Path) -> None:
    model = built("mistral")  # its embedding and head are not tied; rows have 32 entries, and 48 in down
    report = write_gguf(model, tiny.tokenizer(), out, quantize)
    kinds = types(out)
    packed = quantize.startswith("Q")
    assert report["types"] == {kind: list(kinds.values()).count(kind) for kind in set(kinds.values())}
    assert kinds["blk.0.attn_norm.weight"] == kinds["output_norm.weight"] == "F32"
    assert kinds["blk.1.ffn_up.weight"] == quantize
    assert kinds["blk.1.ffn_down.weight"] == ("F16" if packed else quantize)
    assert kinds["token_embd.weight"] == kinds["output.weight"] == ("Q8_0" if packed else quantize)
    assert report["fallback"] == (3 if packed else 0)
    assert report["fallback_why"] == (f"{quantize} packs 32 entries of a row together, and these rows have 48" * packed)
    there, here = tensors(out)["blk.1.ffn_up.weight"], model.model.layers[1].mlp.up_proj.weight.numpy()
    assert np.abs(there - here).max() <= ROUNDING[quantize] * np.abs(here).max()


def test_a_bfloat16_model_is_written_as_it_is(out: Path) -> None:
    model = built("llama").to(torch.bfloat16)
    write_gguf(model, tiny.tokenizer(), out, "BF16")
    assert np.array_equal(tensors(out)["token_embd.weight"], model.model.embed_tokens.weight.float().numpy())


def huge() -> Any:
    model = built("llama")
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = 1e5
    return model


def narrow() -> Any:
    model = built("llama")
    axis = axes(model, ("value",))[1]
    remove(model, axis, torch.tensor([0, 8]))
    return model


Q3 = lambda **config: built("qwen3", **config)  # noqa: E731
REFUSED: dict[str, tuple[Callable[[], Any], str, str]] = {  # model, type, message
    "opt": (lambda: built("opt"), "F16", "billhook writes no GGUF of opt: keep the folder"),
    "untied": (
        lambda: uneven(Q3()),
        "F16",
        "qwen3 wants equal layers; openelm has no place for output.weight; prune all layers alike, or keep the folder",
    ),
    "openelm rope": (
        lambda: uneven(tie(Q3(rope_parameters=tiny.LLAMA3_ROPE))),
        "F16",
        "openelm knows no RoPE of type llama3; keep the folder",
    ),
    "qwen3 rope": (
        lambda: Q3(rope_parameters=tiny.LLAMA3_ROPE),
        "F16",
        "qwen3 knows no RoPE of type llama3",
    ),
    "yarn": (
        lambda: built("llama", rope_parameters={"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}),
        "F16",
        "llama knows no RoPE of type yarn; deci knows no RoPE of type yarn",
    ),
    "window": (
        lambda: built("mistral_sliding"),
        "F16",
        "last 8 positions.*max_position_embeddings to 8",
    ),
    "window of some layers": (lambda: built("qwen2_sliding"), "F16", "attends to its last 8 positions"),
    "values": (narrow, "F16", "layer 1 has value heads of 7 channels beside key heads of 8"),
    "activation": (lambda: built("llama", hidden_act="gelu"), "F16", "computes SiLU.*not gelu"),
    "float16": (huge, "F16", "blk.1.ffn_up.weight holds values that float16 cannot.*F32 or BF16"),
    "type": (lambda: built("llama"), "F18", "unknown quantize 'F18': did you mean 'F16'"),
    "no quantizer": (lambda: built("llama"), "Q4_K_M", "llama-quantize, which is not on PATH"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_llama_cpp_cannot_hold_is_refused_in_one_line(
    case: str, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(out.parent))
    model, quantize, message = REFUSED[case]
    with pytest.raises(BillhookError, match=message) as refused:
        write_gguf(model(), tiny.tokenizer(), out, quantize)
    assert "\n" not in str(refused.value)
    assert not list(out.parent.glob("*")) if out.parent.exists() else True


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = tmp_path / "model.gguf"
    taken.write_text("before")

    def full(*_: object) -> Any:
        raise OSError("1000 requested and 12 written")  # as numpy says it

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", full)
    with pytest.raises(BillhookError, match=r"cannot write .*model.gguf: 1000 requested and 12 written"):
        write_gguf(built("llama"), tiny.tokenizer(), taken)
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]
    assert taken.read_text() == "before"
    with pytest.raises(BillhookError, match=r"cannot write .*: Is a directory"):
        write_gguf(built("llama"), tiny.tokenizer(), tmp_path)


def test_progress_is_told(out: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    report = write_gguf(built("llama"), tiny.tokenizer(), out, tick=lambda *step: seen.append(step))
    total = sum(report["types"].values())
    assert seen == [("writing GGUF", n, total) for n in range(total + 1)]


@pytest.fixture
def stub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A llama-quantize on PATH; the test writes what it does."""
    tool = tmp_path / "bin" / QUANTIZER
    tool.parent.mkdir()
    monkeypatch.setenv("PATH", f"{tool.parent}:{os.environ['PATH']}")
    yield tool


def executable(path: Path, script: str) -> Path:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


def test_k_quants_go_through_the_users_quantizer(out: Path, stub: Path) -> None:
    executable(stub, 'echo "$3" > "$(dirname "$0")/asked"; cp "$1" "$2"')
    report = write_gguf(built("llama"), tiny.tokenizer(), out, "Q4_K_M")
    assert (stub.parent / "asked").read_text() == "Q4_K_M\n"
    assert report["types"] == {"F16": 22, "F32": 7}  # of the stub, which only copies
    assert report["fallback"] == 22
    assert report["fallback_why"] == "Q4_K_M packs 256 entries of a row together, and these rows have 32 to 48"
    assert [path.name for path in out.parent.iterdir()] == ["model.gguf"]


def test_a_quantizer_that_fails_is_quoted(out: Path, stub: Path) -> None:
    executable(stub, 'echo "main: failed to quantize" >&2; exit 3')
    with pytest.raises(BillhookError, match="llama-quantize failed with code 3: main: failed to quantize"):
        write_gguf(built("llama"), tiny.tokenizer(), out, "Q6_K")
    assert not out.parent.exists()


@pytest.mark.parametrize(
    ("script", "message"),
    [
        (
            "echo \"ModuleNotFoundError: No module named 'llama_cpp'\" >&2; exit 1",
            "has no llama-cpp-python .*install it",
        ),
        ('echo "llama_model_load: error loading model: bad shape" >&2; echo "  ValueError" >&2; exit 1', "bad shape$"),
        ('echo "x.cpp:1: GGML_ASSERT(a == b) failed" >&2; kill -ABRT $$', r"GGML_ASSERT\(a == b\) failed$"),
        ("exit 4", "exit code 4"),
    ],
)
def test_a_client_that_fails_is_quoted_in_one_line(script: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(BillhookError, match=message) as refused:
        llamacpp.run(executable(tmp_path / "python", script), tmp_path / "x.gguf", {})
    assert "\n" not in str(refused.value)


def test_a_client_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(
        BillhookError, match=r"cannot run .*nowhere: No such file.*name a Python that has llama-cpp-python"
    ):
        llamacpp.run(tmp_path / "nowhere", tmp_path / "x.gguf", {})
    with pytest.raises(BillhookError, match=r"took longer than 0.1 s"):
        llamacpp.run(executable(tmp_path / "python", "exec sleep 5"), tmp_path / "x.gguf", {}, timeout=0.1)


@in_llama
@pytest.mark.parametrize("case", CASES)
def test_llama_cpp_computes_the_same_logits(case: str, out: Path) -> None:
    model = CASES[case][1]()
    write_gguf(model, tiny.tokenizer(), out, "F32")
    found = llamacpp.run(LLAMA, out, {"logits": [IDS], "cache": "f32", "threads": 1})
    expected = model(torch.tensor([IDS])).logits[0].numpy()
    np.testing.assert_allclose(found["logits"][0], expected, atol=1e-5 * np.abs(expected).max())


@in_llama
def test_llama_cpp_writes_and_scores_the_same(out: Path) -> None:
    model = uneven(built("llama"))
    write_gguf(model, tiny.tokenizer(), out, "F32")
    windows = tiny.tokens(3, 32, seed=4)
    speed = {"prompt": IDS, "new_tokens": 4, "repeats": 1}
    request = {"prompts": [IDS[:6]], "new_tokens": 12, "windows": windows.tolist(), "speed": speed, "threads": 1}
    found = llamacpp.run(LLAMA, out, {**request, "cache": "f32"})
    greedy = model.generate(torch.tensor([IDS[:6]]), max_new_tokens=12, do_sample=False)[0, 6:]
    loss = torch.nn.functional.cross_entropy(model(windows).logits[:, :-1].flatten(0, 1), windows[:, 1:].flatten())
    assert found["greedy"] == [greedy.tolist()]
    assert found["perplexity"] == pytest.approx(loss.exp().item(), rel=1e-4)
    assert found["speed"]["prefill"] > 0 and found["speed"]["decode"] > 0


@in_llama
def test_a_broken_file_is_said_in_one_line(tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF" + bytes(60))
    with pytest.raises(BillhookError, match=r"llama.cpp could not load .*broken.gguf: ") as refused:
        llamacpp.run(LLAMA, broken, {"logits": [[1, 2]]})
    assert "\n" not in str(refused.value)


@in_llama
@pytest.mark.slow
@pytest.mark.parametrize("cut", [False, True])
def test_the_demo_in_llama_cpp(cut: bool, out: Path) -> None:
    opened = load.open_model("demo", device="cpu")
    model, tokenizer = opened.model, opened.tokenizer
    pre = fields(demo.model_gguf())["tokenizer.ggml.pre"]
    vocabulary.give_splits(tokenizer, pre)  # transformers 5.23 lost them
    if cut:
        for n, axis in enumerate(axes(model, ("ffn",))):
            remove(model, axis, torch.arange(n * 3))
    assert write_gguf(model, tokenizer, out, "F16")["arch"] == ("deci" if cut else "llama")
    assert fields(out)["tokenizer.ggml.pre"] == pre == "smollm"
    text = " ".join(Path(__file__).read_text().split("\n\n"))
    ids = tokenizer(text).input_ids
    windows = torch.tensor(ids[:1024]).view(2, 512)
    prompts = [tokenizer(prompt).input_ids for prompt in ("The capital of France is", "Water boils when")]
    request = {"tokenize": [text], "windows": windows.tolist(), "prompts": prompts, "new_tokens": 16}
    found = llamacpp.run(LLAMA, out, request)
    loss = torch.nn.functional.cross_entropy(model(windows).logits[:, :-1].flatten(0, 1), windows[:, 1:].flatten())
    assert found["tokens"] == [ids]
    assert found["perplexity"] == pytest.approx(loss.exp().item(), rel=5e-3)
    for prompt, new in zip(prompts, found["greedy"], strict=True):
        logits = model(torch.tensor([prompt + new])).logits[0, len(prompt) - 1 : -1]
        assert logits.argmax(-1).tolist() == new
