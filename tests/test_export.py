"""GGUF export: what is in the file, what is refused, and what llama.cpp itself makes of it.

The tests that need llama.cpp run where BILLHOOK_LLAMA_PYTHON names a Python with llama-cpp-python, or this one has it.
"""

import importlib.util
import json
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
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers

from billhook import checkpoint, demo, export, gguf_vocab, llamacpp
from billhook.errors import BillhookError
from billhook.export import write_gguf
from billhook.families import axes, layers
from billhook.gguf_archs import BYTE_LEVEL, PRE_TOKENIZERS, SENTENCEPIECE
from billhook.surgery import remove

LLAMA = os.environ.get("BILLHOOK_LLAMA_PYTHON") or (sys.executable if importlib.util.find_spec("llama_cpp") else "")
in_llama = pytest.mark.skipif(not LLAMA, reason="BILLHOOK_LLAMA_PYTHON names no Python that has llama-cpp-python")

IDS = tiny.tokens(1)[0].tolist()
TEXT = (
    "\n \n\n \t \t\t\n  \n   x 3 33 333 3333 33333 3.3 3..3  7\n\n2 and  12,345.67 'tis I'd CAN'T We'Ve \"told\" -----====\n"
    ' naïve Привет អាច 我想在 apple工作1314天～ 🚀 (normal) 😶\u200d🌫️ `````"""" end.  \r\n\r\n AbcDEF fooBar/\n qzx'
)
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
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
    "llama 3 rope": ("llama", lambda: built("llama", rope_parameters=LLAMA3_ROPE)),
    "llama linear rope": ("llama", lambda: built("llama", rope_parameters=LINEAR_ROPE)),
    "llama uneven": ("deci", lambda: uneven(built("llama"))),
    "llama uneven with biases": ("deci", lambda: uneven(built("llama_bias"))),
    "llama uneven 3 rope": ("deci", lambda: uneven(built("llama", rope_parameters=LLAMA3_ROPE))),
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


@pytest.mark.parametrize("family", ["llama", "qwen2"])  # of qwen3 it does not read the head size (5.23)
def test_transformers_reads_its_own_model_back(family: str, out: Path) -> None:
    tokenizer = trained(Tokenizer(models.BPE()), "qwen2")
    model = built(family, vocab_size=len(tokenizer))
    write_gguf(model, tokenizer, out, "F32")
    again = checkpoint.open_model(str(out), device="cpu")
    assert torch.equal(again.model(torch.tensor([IDS])).logits, model(torch.tensor([IDS])).logits)
    assert again.tokenizer(TEXT).input_ids == tokenizer(TEXT).input_ids


def test_rope_that_is_scaled(out: Path) -> None:
    model = built("llama", rope_parameters=LLAMA3_ROPE)
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


def test_byte_level_metadata(out: Path) -> None:
    tokenizer = trained(Tokenizer(models.BPE()), "smollm")
    tokenizer.add_tokens(["<think>"])
    tokenizer.chat_template = {"default": "{{ messages }}", "tool_use": "{{ tools }}"}
    model = built("llama", vocab_size=len(tokenizer) + 2)
    write_gguf(model, tokenizer, out)
    found = fields(out)
    tokens, kinds = found["tokenizer.ggml.tokens"], found["tokenizer.ggml.token_type"]
    assert (found["tokenizer.ggml.model"], found["tokenizer.ggml.pre"]) == (BYTE_LEVEL, "smollm")
    assert tokens[: len(tokenizer)] == tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    assert tokens[-2:] == [f"[PAD{len(tokenizer)}]", f"[PAD{len(tokenizer) + 1}]"]
    by_text = dict(zip(tokens, kinds, strict=True))
    assert [by_text[token] for token in ("<s>", "</s>", "<think>", "a", tokens[-1])] == [3, 3, 4, 1, 5]
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    assert found["tokenizer.ggml.merges"] == [" ".join(pair) for pair in merges]
    assert found["tokenizer.ggml.bos_token_id"] == tokenizer.bos_token_id
    assert found["tokenizer.ggml.eos_token_id"] == found["tokenizer.ggml.padding_token_id"] == tokenizer.eos_token_id
    assert (found["tokenizer.ggml.add_bos_token"], found["tokenizer.ggml.add_eos_token"]) == (False, False)
    assert found["tokenizer.chat_template"] == "{{ messages }}"
    assert found["tokenizer.chat_template.tool_use"] == "{{ tools }}"


def test_sentencepiece_metadata(out: Path) -> None:
    tokenizer = sentencepiece()
    write_gguf(built("llama", vocab_size=len(tokenizer)), tokenizer, out)
    found = fields(out)
    by_text = dict(zip(found["tokenizer.ggml.tokens"], found["tokenizer.ggml.token_type"], strict=True))
    assert (found["tokenizer.ggml.model"], found["tokenizer.ggml.pre"]) == (SENTENCEPIECE, "default")
    assert [by_text[token] for token in ("<unk>", "<s>", "<0x0A>", "▁the")] == [2, 3, 6, 1]
    score = dict(zip(found["tokenizer.ggml.tokens"], found["tokenizer.ggml.scores"], strict=True))
    assert score["he"] > score["the"] > score["▁the"] > score["<s>"]
    assert found["tokenizer.ggml.add_space_prefix"] is found["tokenizer.ggml.add_bos_token"] is True


@pytest.mark.parametrize("name", PRE_TOKENIZERS)
def test_splits_that_are_given_are_named_again(name: str) -> None:
    tokenizer = tiny.tokenizer()
    gguf_vocab.give_splits(tokenizer, name)
    again = T.PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, eos_token="</s>")
    assert gguf_vocab.vocabulary(again, 258)["tokenizer.ggml.pre"] == name


def test_the_splits_of_stock_tokenizers_are_known() -> None:
    vocab = {symbol: n for n, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    stock = T.Qwen2Tokenizer(vocab=vocab, merges=[])
    assert gguf_vocab.vocabulary(stock, len(stock))["tokenizer.ggml.pre"] == "qwen2"
    smollm = tiny.tokenizer()
    smollm.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    assert gguf_vocab.vocabulary(smollm, 258)["tokenizer.ggml.pre"] == "smollm"
    before = smollm.backend_tokenizer.to_str()
    gguf_vocab.give_splits(smollm, "unheard-of")
    assert smollm.backend_tokenizer.to_str() == before


def trained(backend: Tokenizer, name: str) -> Any:
    """A byte-level tokenizer with splits `name`, merges learned from TEXT, and one token that no merges make."""
    tokenizer = T.PreTrainedTokenizerFast(tokenizer_object=backend)
    gguf_vocab.give_splits(tokenizer, name)
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        min_frequency=1,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<s>", "</s>"],
        show_progress=False,
    )
    tokenizer.backend_tokenizer.train_from_iterator([TEXT.removesuffix(" qzx")], trainer)
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    content["model"]["vocab"]["Ġqzx"] = len(content["model"]["vocab"])
    content["model"]["ignore_merges"] = PRE_TOKENIZERS[name].ignore_merges
    backend = Tokenizer.from_str(json.dumps(content))
    return T.PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="</s>")


def sentencepiece() -> Any:
    """A tokenizer with SentencePiece's rules and a few merges."""
    made = ["he", "th", "the", "▁the", "in", "▁▁", "an", "and", "▁and"]
    letters = ["▁", *"abcdefghijklmnopqrstuvwxyz"]
    names = ["<unk>", "<s>", "</s>", *(f"<0x{n:02X}>" for n in range(256)), *made, *letters]
    known = {*made, *letters}
    ways = [(token[:n], token[n:]) for token in made for n in range(1, len(token))]
    merges = [pair for pair in ways if set(pair) <= known]
    return T.LlamaTokenizer(vocab={token: n for n, token in enumerate(names)}, merges=merges, add_bos_token=True)


def changed(edit: Callable[[Any], object]) -> Callable[[], Any]:
    """A byte tokenizer whose tokenizer.json was edited."""

    def make() -> Any:
        content = json.loads(tiny.tokenizer().backend_tokenizer.to_str())
        edit(content)
        backend = Tokenizer.from_str(json.dumps(content))
        return T.PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")

    return make


def without_eos() -> Any:
    tokenizer = tiny.tokenizer()
    tokenizer.eos_token = None
    return tokenizer


def with_class_token() -> Any:
    tokenizer = tiny.tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="</s> $A", special_tokens=[("</s>", 257)]
    )
    return tokenizer


def extra_merge() -> Any:
    """SentencePiece in all but that one way to put a token together is no merge."""
    tokenizer = sentencepiece()
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    content["model"]["merges"].remove(["t", "he"])
    backend = Tokenizer.from_str(json.dumps(content))
    return T.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")


def word_level() -> Any:
    backend = Tokenizer(models.WordLevel({"a": 0, "</s>": 1}, unk_token="a"))
    return T.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")


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
REFUSED: dict[str, tuple[Callable[[], Any], Callable[[], Any], str, str]] = {  # model, tokenizer, type, message
    "opt": (lambda: built("opt"), tiny.tokenizer, "F16", "llama.cpp has no architecture for opt: keep the folder"),
    "untied": (
        lambda: uneven(Q3()),
        tiny.tokenizer,
        "F16",
        "qwen3 wants equal layers; openelm has no place for output.weight; prune all layers alike, or keep the folder",
    ),
    "openelm rope": (
        lambda: uneven(tie(Q3(rope_parameters=LLAMA3_ROPE))),
        tiny.tokenizer,
        "F16",
        "openelm knows no RoPE of type llama3; keep the folder",
    ),
    "qwen3 rope": (
        lambda: Q3(rope_parameters=LLAMA3_ROPE),
        tiny.tokenizer,
        "F16",
        "qwen3 knows no RoPE of type llama3",
    ),
    "yarn": (
        lambda: built("llama", rope_parameters={"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}),
        tiny.tokenizer,
        "F16",
        "llama knows no RoPE of type yarn; deci knows no RoPE of type yarn",
    ),
    "window": (
        lambda: built("mistral_sliding"),
        tiny.tokenizer,
        "F16",
        "last 8 positions.*max_position_embeddings to 8",
    ),
    "window of some layers": (lambda: built("qwen2_sliding"), tiny.tokenizer, "F16", "attends to its last 8 positions"),
    "values": (narrow, tiny.tokenizer, "F16", "layer 1 has value heads of 7 channels beside key heads of 8"),
    "activation": (lambda: built("llama", hidden_act="gelu"), tiny.tokenizer, "F16", "computes SiLU.*not gelu"),
    "float16": (huge, tiny.tokenizer, "F16", "blk.1.ffn_up.weight holds values that float16 cannot.*F32 or BF16"),
    "type": (lambda: built("llama"), tiny.tokenizer, "F18", "unknown quantize 'F18': did you mean 'F16'"),
    "no quantizer": (lambda: built("llama"), tiny.tokenizer, "Q4_K_M", "llama-quantize, which is not on PATH"),
    "splits": (
        lambda: built("llama"),
        changed(lambda content: content["pre_tokenizer"].update(add_prefix_space=True)),
        "F16",
        "could not follow this tokenizer: its pre_tokenizer .* is none of gpt-2, smollm",
    ),
    "normalizer": (
        lambda: built("llama"),
        changed(lambda content: content.update(normalizer=json.loads(LOWERCASE))),
        "F16",
        "it normalizes by Lowercase",
    ),
    "suffix": (
        lambda: built("llama"),
        changed(lambda content: content["model"].update(end_of_word_suffix="</w>")),
        "F16",
        "its BPE uses end_of_word_suffix",
    ),
    "rows": (
        lambda: built("llama", vocab_size=200),
        tiny.tokenizer,
        "F16",
        "'</s>' has id 257, and the embedding 200 rows",
    ),
    "eos": (lambda: built("llama"), without_eos, "F16", "has no eos_token.*set tokenizer.eos_token"),
    "class token": (lambda: built("llama"), with_class_token, "F16", r"puts \[257\] before and \[\] after a text"),
    "word level": (lambda: built("llama"), word_level, "F16", "its model is WordLevel, not BPE"),
    "merges": (lambda: built("llama", vocab_size=300), extra_merge, "F16", "not those of a SentencePiece vocabulary"),
}
LOWERCASE = '{"type": "Lowercase"}'


@pytest.mark.parametrize("case", REFUSED)
def test_what_llama_cpp_cannot_hold_is_refused_in_one_line(
    case: str, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(out.parent))
    model, tokenizer, quantize, message = REFUSED[case]
    with pytest.raises(BillhookError, match=message) as refused:
        write_gguf(model(), tokenizer(), out, quantize)
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
    tool = tmp_path / "bin" / export.QUANTIZER
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
    assert not list(out.parent.iterdir())


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
@pytest.mark.parametrize("name", [*PRE_TOKENIZERS, "sentencepiece", "no merges"])
def test_llama_cpp_cuts_text_the_same(name: str, out: Path) -> None:
    special = {"sentencepiece": sentencepiece, "no merges": tiny.tokenizer}
    tokenizer = special[name]() if name in special else trained(Tokenizer(models.BPE()), name)
    text = (
        TEXT if name not in ("tekken", "gpt-4o") else TEXT.replace("អាច", "")
    )  # llama.cpp has no marks (\\p{M}) there
    text = TEXT.strip() if name == "sentencepiece" else text  # see gguf_vocab.py on spaces
    texts = [text, "the hen and  the ant", "2\n\n 2 x", "half way</s>"]
    write_gguf(built("llama", vocab_size=len(tokenizer)), tokenizer, out)
    assert llamacpp.run(LLAMA, out, {"tokenize": texts})["tokens"] == [tokenizer(text).input_ids for text in texts]


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
    with pytest.raises(BillhookError, match=r"llama.cpp could not run .*broken.gguf: ") as refused:
        llamacpp.run(LLAMA, broken, {"logits": [[1, 2]]})
    assert "\n" not in str(refused.value)


@in_llama
@pytest.mark.slow
@pytest.mark.parametrize("cut", [False, True])
def test_the_demo_in_llama_cpp(cut: bool, out: Path) -> None:
    opened = checkpoint.open_model("demo", device="cpu")
    model, tokenizer = opened.model, opened.tokenizer
    pre = fields(demo.model_gguf())["tokenizer.ggml.pre"]
    gguf_vocab.give_splits(tokenizer, pre)  # transformers 5.23 lost them
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
