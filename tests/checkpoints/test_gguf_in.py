"""A GGUF opened: what export writes comes back as the model that it was, and what a file says is used or refused by
name."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from ggufs import Fields, edited, parts, written
from test_export import CASES, IDS, built
from test_gguf_vocab import TEXT, sentencepiece, trained
from tokenizers import pre_tokenizers

from billhook.checkpoints import load
from billhook.checkpoints.gguf.architectures import PRE_TOKENIZERS
from billhook.checkpoints.gguf.write import write_gguf
from billhook.errors import BillhookError


def logits(model: Any, length: int = 16) -> torch.Tensor:
    return model(torch.tensor([IDS[:length]]), use_cache=False).logits


def opened(path: Path) -> load.Opened:
    return load.open_model(str(path), device="cpu")


@pytest.mark.parametrize("case", CASES)
def test_what_export_writes_opens_as_the_same_model(case: str, tmp_path: Path) -> None:
    model = CASES[case][1]()
    write_gguf(model, tiny.tokenizer(), tmp_path / "model.gguf", "F32")
    found = opened(tmp_path / "model.gguf")
    assert torch.equal(logits(found.model), logits(model))
    there = found.model.lm_head.weight is found.model.model.embed_tokens.weight
    assert there == (model.lm_head.weight is model.model.embed_tokens.weight)
    text = "  Two words,\n\tand 3 "
    assert found.tokenizer(text).input_ids == tiny.tokenizer()(text).input_ids


def rope(**said: Any) -> Any:
    return built("llama", rope_parameters={"rope_theta": 10000.0, **said})


FACTORS = np.array([1.0, 1.5, 2.25, 7.0], np.float32)
OTHER_LLAMA3 = {
    **tiny.LLAMA3_ROPE,
    "factor": 3.7,
    "low_freq_factor": 0.5,
    "high_freq_factor": 100.0,
    "original_max_position_embeddings": 777,
}
PATHS = {key: f"llama.rope.scaling.{key}" for key in ("type", "factor", "original_context_length", "attn_factor")}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8}
LONG = {
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [1.0, 2.0, 3.0, 4.0],
    "original_max_position_embeddings": 8,
}
ROPES: dict[
    str, tuple[Callable[[], Any], Fields, dict[str, np.ndarray]]
] = {  # the model, fields and tensors that say it
    "linear without a type": (lambda: rope(rope_type="linear", factor=2.0), {PATHS["factor"]: 2.0}, {}),
    "linear by its old name": (lambda: rope(rope_type="linear", factor=2.0), {"llama.rope.scale_linear": 2.0}, {}),
    "none": (lambda: rope(rope_type="default"), {PATHS["type"]: "none", PATHS["factor"]: 2.0}, {}),
    "no base": (lambda: rope(rope_type="default"), {"llama.rope.freq_base": None}, {}),
    "yarn": (
        lambda: rope(**YARN),
        {PATHS["type"]: "yarn", PATHS["factor"]: 4.0, PATHS["original_context_length"]: 8},
        {},
    ),
    "yarn with betas": (
        lambda: rope(**YARN, beta_fast=16.0, beta_slow=2.0),
        {
            PATHS["type"]: "yarn",
            PATHS["factor"]: 4.0,
            PATHS["original_context_length"]: 8,
            "llama.rope.scaling.yarn_beta_fast": 16.0,
            "llama.rope.scaling.yarn_beta_slow": 2.0,
        },
        {},
    ),
    "yarn with a factor of attention": (
        lambda: rope(**YARN, attention_factor=0.5 * (0.1 * np.log(4.0) + 1)),
        {PATHS["type"]: "yarn", PATHS["factor"]: 4.0, PATHS["original_context_length"]: 8, PATHS["attn_factor"]: 0.5},
        {},
    ),
    "longrope": (
        lambda: rope(rope_type="longrope", **LONG, attention_factor=1.25),
        {PATHS["type"]: "longrope", PATHS["original_context_length"]: 8, PATHS["attn_factor"]: 1.25},
        {
            "rope_factors_short.weight": np.array(LONG["short_factor"], np.float32),
            "rope_factors_long.weight": np.array(LONG["long_factor"], np.float32),
        },
    ),
    "factors of no formula": (
        lambda: rope(
            rope_type="longrope",
            short_factor=FACTORS.tolist(),
            long_factor=FACTORS.tolist(),
            original_max_position_embeddings=128,
            attention_factor=1.0,
        ),
        {},
        {"rope_freqs.weight": FACTORS},
    ),
}


@pytest.mark.parametrize("case", ROPES)
@pytest.mark.parametrize("length", [4, 16])  # on both sides of the original context
def test_every_rotary_embedding_that_a_file_can_say(case: str, length: int, tmp_path: Path) -> None:
    make, fields, tensors = ROPES[case]
    model = make()
    path = edited(rope(rope_type="default"), tmp_path, fields, tensors)
    assert torch.equal(logits(opened(path).model, length), logits(model, length))


@pytest.mark.parametrize("said", [tiny.LLAMA3_ROPE, OTHER_LLAMA3])
def test_factors_by_frequency_become_the_numbers_that_they_were_made_from(said: dict[str, Any], tmp_path: Path) -> None:
    model = built("llama", rope_parameters=said, head_dim=32)
    write_gguf(model, tiny.tokenizer(), tmp_path / "model.gguf", "F32")
    found = opened(tmp_path / "model.gguf").model
    assert found.config.rope_parameters["rope_type"] == "llama3"
    assert found.config.rope_parameters["factor"] == pytest.approx(said["factor"], rel=1e-6)
    torch.testing.assert_close(logits(found), logits(model), rtol=1e-5, atol=1e-5)


def refused(path: Path) -> str:
    with pytest.raises(BillhookError) as error:
        opened(path)
    said = str(error.value)
    assert "\n" not in said and str(path.parent) in said
    return said


UNREAD: dict[str, tuple[Fields, str]] = {  # fields of a llama's file -> what is said
    "a window": (
        {"llama.attention.sliding_window": 8},
        "llama.attention.sliding_window is 8, which billhook does not read",
    ),
    "a scale": ({"llama.attention.scale": 0.3}, "llama.attention.scale is 0.3"),
    "logits": ({"llama.logit_scale": 2.0}, "llama.logit_scale is 2.0, which"),
    "an unknown one": ({"llama.new_thing": True}, "llama.new_thing is True, which"),
    "partial rotation": ({"llama.rope.dimension_count": 4}, "llama.rope.dimension_count is 4, and should be 8"),
    "value heads": ({"llama.attention.value_length": 4}, "llama.attention.value_length is 4, and should be 8"),
    "experts": ({"llama.expert_count": 4}, "llama.expert_count is 4, which"),
    "a type of rope": (
        {"llama.rope.scaling.type": "dynamic"},
        "'dynamic', and should be one of none, linear, yarn, longrope",
    ),
    "rope of no formula": (
        {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.yarn_ext_factor": 0.5},
        "yarn_ext_factor 0.5",
    ),
    "longrope": ({"llama.rope.scaling.type": "longrope"}, "'longrope' with no rope_factors_short.weight"),
    "an architecture": ({"general.architecture": "mamba"}, "'mamba', and billhook reads GGUF of llama, deci"),
    "an adapter": ({"general.type": "adapter"}, "holds 'adapter', not a model"),
    "layers": ({"llama.block_count": 2}, "block_count is 2, and should be the 3 layers"),
    "a width": ({"llama.feed_forward_length": 40}, "ffn_gate.weight has shape .48, 32., and its fields say .40, 32."),
    "a huge width": (
        {"llama.feed_forward_length": 2**31},
        "feed_forward_length is 2147483648, and should be at most 258",
    ),
    "heads": ({"llama.attention.head_count": 3}, "attn_q.weight has shape"),
    "no heads": ({"llama.attention.head_count": 0}, "head_count is .0, 0, 0., and should be a whole number above 0"),
    "a list too short": (
        {"llama.attention.head_count": [4, 4]},
        "head_count is .4, 4., and .* one for each of 3 layers",
    ),
    "hidden": ({"llama.embedding_length": 16}, "token_embd.weight has shape"),
    "no context": ({"llama.context_length": None}, "llama.context_length is missing"),
    "epsilon": (
        {"llama.attention.layer_norm_rms_epsilon": "x"},
        "layer_norm_rms_epsilon is 'x', and should be a number",
    ),
    "a base": ({"llama.rope.freq_base": float("nan")}, "rope.freq_base is nan, and should be a number"),
    "splits": ({"tokenizer.ggml.pre": "qwen35"}, "tokenizer.ggml.pre is 'qwen35', and billhook knows gpt-2"),
    "no splits": ({"tokenizer.ggml.pre": None}, "tokenizer.ggml.pre is missing"),
    "a tokenizer": (
        {"tokenizer.ggml.model": "bert"},
        "tokenizer.ggml.model is 'bert', and billhook reads gpt2 and llama",
    ),
    "a field of it": ({"tokenizer.ggml.normalizer.lowercase": True}, "normalizer.lowercase is True, which"),
    "no tokens": ({"tokenizer.ggml.tokens": None}, "tokenizer.ggml.tokens is missing"),
    "an id": (
        {"tokenizer.ggml.bos_token_id": 999},
        "bos_token_id is 999, and should be the number of one of 258 tokens",
    ),
    "another id": ({"tokenizer.ggml.eos_token_id": "x"}, "eos_token_id is 'x', and should be"),
    "types": ({"tokenizer.ggml.token_type": [1, 1]}, "token_type is .1, 1., and should be 258 numbers"),
    "one token twice": ({"tokenizer.ggml.tokens": ["a"] * 258}, "tokens has a token twice"),
}


@pytest.mark.parametrize("case", UNREAD)
def test_what_is_not_read_is_refused_by_name(case: str, tmp_path: Path) -> None:
    fields, message = UNREAD[case]
    fields = dict(fields)
    assert re.search(message, refused(edited(built("llama"), tmp_path, fields)))


def test_a_tensor_without_a_place_or_missing_is_refused_by_name(tmp_path: Path) -> None:
    model = built("qwen2")
    more = {"rope_freqs.weight": np.ones(4, np.float32)}
    assert "1 tensors have no place in a qwen2 of transformers, first rope_freqs.weight" in refused(
        edited(model, tmp_path, {}, more)
    )
    bias = {"blk.1.attn_output.bias": np.ones(32, np.float32)}
    assert "first blk.1.attn_output.bias" in refused(edited(model, tmp_path, {}, bias))
    fields, tensors = parts(model, tmp_path)
    del tensors["blk.1.attn_v.weight"]
    assert "tensor blk.1.attn_v.weight is missing" in refused(written(tmp_path / "less.gguf", fields, tensors))
    tensors |= {"blk.1.attn_v.weight": np.full((16, 32), np.nan, np.float32)}
    assert "blk.1.attn_v.weight holds NaN or infinite values" in refused(
        written(tmp_path / "nan.gguf", fields, tensors)
    )


def test_fields_that_change_nothing_are_let_be(tmp_path: Path) -> None:
    model = built("llama")
    said = {
        "llama.attention.causal": True,
        "llama.expert_count": 0,
        "llama.logit_scale": 1.0,
        "llama.tensor_data_layout": "Meta AI original pth",
        "qwen2.attention.scale": 3.0,
        "quantize.imatrix.file": "x.dat",
        "somebody.note": [1, 2],
    }
    assert torch.equal(logits(opened(edited(model, tmp_path, said)).model), logits(model))


@pytest.mark.parametrize("of", ["attn_q.bias", "attn_output.bias", "ffn_up.bias"])
def test_biases_of_some_modules_leave_the_others_zero(of: str, tmp_path: Path) -> None:
    fields, tensors = parts(built("llama_bias"), tmp_path)
    kept = {name: values for name, values in tensors.items() if not name.endswith("bias") or name.endswith(of)}
    zeroed = {name: values * (not name.endswith("bias") or name.endswith(of)) for name, values in tensors.items()}
    some = opened(written(tmp_path / "some.gguf", fields, kept)).model
    assert torch.equal(logits(some), logits(opened(written(tmp_path / "all.gguf", fields, zeroed)).model))


@pytest.mark.parametrize("same", [True, False])
def test_a_head_of_its_own(same: bool, tmp_path: Path) -> None:
    model = built("llama")
    head = model.lm_head.weight.numpy() * (1 if same else -1)
    found = opened(edited(model, tmp_path, {}, {"output.weight": head})).model
    assert torch.equal(logits(found), logits(model) * (1 if same else -1))
    assert not found.config.tie_word_embeddings


@pytest.mark.parametrize("head_dim", [8, 16, 48])
def test_a_head_size_of_its_own(head_dim: int, tmp_path: Path) -> None:
    model = built("qwen3", head_dim=head_dim)
    write_gguf(model, tiny.tokenizer(), tmp_path / "model.gguf", "F32")
    found = opened(tmp_path / "model.gguf").model
    assert found.config.head_dim == head_dim
    assert torch.equal(logits(found), logits(model))


def test_rounding_is_what_the_type_says(tmp_path: Path) -> None:
    model = built("llama")
    for kind, worst in {"F16": 1e-3, "BF16": 1e-2, "Q8_0": 1e-2}.items():
        write_gguf(model, tiny.tokenizer(), tmp_path / "model.gguf", kind)
        there, here = (
            opened(tmp_path / "model.gguf").model.model.layers[1].mlp.up_proj.weight,
            model.model.layers[1].mlp.up_proj.weight,
        )
        assert 0 < (there - here).abs().max() <= worst * here.abs().max()


@pytest.mark.parametrize("name", PRE_TOKENIZERS)
def test_text_is_cut_as_it_was(name: str, tmp_path: Path) -> None:
    tokenizer = trained(name)
    tokenizer.add_tokens(["<think>"])
    tokenizer.chat_template = {"default": "{{ messages }}", "tool_use": "{{ tools }}"}
    write_gguf(built("llama", vocab_size=len(tokenizer)), tokenizer, tmp_path / "model.gguf")
    found = load.open_tokenizer(str(tmp_path / "model.gguf"))
    text = f"{TEXT} <think>a</think></s>"
    assert found(text).input_ids == tokenizer(text).input_ids
    assert found.decode(found(text).input_ids, clean_up_tokenization_spaces=False) == text
    assert found.chat_template == tokenizer.chat_template
    for special in ("bos_token", "eos_token", "pad_token"):
        assert getattr(found, special) == getattr(tokenizer, special)


@pytest.mark.parametrize("prefix", [True, False])
@pytest.mark.parametrize("bos", [True, False])
def test_sentencepiece_is_cut_as_it_was(prefix: bool, bos: bool, tmp_path: Path) -> None:
    tokenizer = sentencepiece()
    tokenizer.add_bos_token = bos
    if not prefix:
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    write_gguf(built("llama", vocab_size=len(tokenizer)), tokenizer, tmp_path / "model.gguf")
    found = load.open_tokenizer(str(tmp_path / "model.gguf"))
    for text in ("the and in", "  two  spaces", "x", "é\n"):
        assert found(text).input_ids == tokenizer(text).input_ids
        assert found.decode(found(text).input_ids) == tokenizer.decode(tokenizer(text).input_ids)


def test_what_lies_beside_the_file_changes_nothing(tmp_path: Path) -> None:
    write_gguf(built("llama"), tiny.tokenizer(), tmp_path / "model.gguf")
    for name in ("tokenizer_config.json", "generation_config.json", "chat_template.jinja"):
        (tmp_path / name).write_text('{"bos_token": "a", "eos_token_id": 3, "temperature": 0.1}')
    found = opened(tmp_path / "model.gguf")
    assert found.tokenizer.bos_token == "<s>" and found.tokenizer.chat_template is None
    assert found.model.generation_config.temperature is None


def test_a_folder_with_one_gguf_is_that_file(tmp_path: Path) -> None:
    model = built("llama")
    write_gguf(model, tiny.tokenizer(), tmp_path / "MODEL.GGUF", "F32")
    for path in (tmp_path, tmp_path / "MODEL.GGUF"):
        assert torch.equal(logits(opened(path).model), logits(model))
    write_gguf(model, tiny.tokenizer(), tmp_path / "other.gguf", "F32")
    with pytest.raises(
        BillhookError, match=r"holds 2 GGUF files: name the one that is meant, of MODEL.GGUF, other.gguf"
    ):
        opened(tmp_path)


def test_the_parts_of_a_split_file_are_read_as_one(tmp_path: Path) -> None:
    model = built("llama")
    fields, tensors = parts(model, tmp_path)
    (tmp_path / "export.gguf").unlink()
    names = list(tensors)
    for n, some in enumerate((names[:9], names[9:])):
        said = {"general.architecture": "llama", "split.no": n, "split.count": 2, "split.tensors.count": len(names)}
        own = {**fields, **said} if n == 0 else said
        written(tmp_path / f"m-{n + 1:05}-of-00002.gguf", own, {name: tensors[name] for name in some})
    for path in (tmp_path, tmp_path / "m-00001-of-00002.gguf", tmp_path / "m-00002-of-00002.gguf"):
        assert torch.equal(logits(opened(path).model), logits(model))
    (tmp_path / "m-00001-of-00002.gguf").rename(tmp_path / "m.gguf")
    assert "is one of 2 parts, and its name is not NAME-00001-of-00002.gguf" in refused(tmp_path / "m.gguf")
    assert "m-00001-of-00002.gguf is not beside it" in refused(tmp_path / "m-00002-of-00002.gguf")


PLAIN = {"rope_type": "default", "rope_theta": 1e4}
ODD: dict[str, Fields] = {  # settings that a config can have: what changes a model is written or refused
    "partial": {"rope_parameters": {**PLAIN, "partial_rotary_factor": 0.5}},
    "dynamic": {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}},
    "yarn": {"rope_parameters": {**YARN, "rope_theta": 1e4}},
    "base": {"rope_parameters": {**PLAIN, "rope_theta": 5e5}},
    "window": {"sliding_window": 8},
    "activation": {"hidden_act": "gelu"},
    "epsilon": {"rms_norm_eps": 1e-2},
    "scales": {"logits_scaling": 4.0, "final_logit_softcapping": 3.0, "query_pre_attn_scalar": 3},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "head size": {"head_dim": 4},
    "not causal": {"is_causal": False},
}


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("odd", ODD)
def test_export_writes_the_same_model_or_refuses(odd: str, family: str, tmp_path: Path) -> None:
    model = built(family, **ODD[odd])
    try:
        write_gguf(model, tiny.tokenizer(), tmp_path / "model.gguf", "F32")
    except BillhookError as error:
        assert "\n" not in str(error)
    else:
        assert torch.equal(logits(opened(tmp_path / "model.gguf").model), logits(model))
