"""What transformers refuses in a model's folder: one line that has its reason and the key, whole and streamed alike."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import tiny
from folders import written

from billhook.checkpoints import load, tokenizers
from billhook.errors import BillhookError

READ, BUILT = r"transformers could not read it \(", r"transformers could not build it \("
REFUSED: list[tuple[str, dict[str, Any], str]] = [
    (
        "llama",
        {"attn_implementation": "flash_attention_2"},
        f"attn_implementation is 'flash_attention_2': {BUILT}.*Flash",
    ),
    ("llama", {"_attn_implementation": "flash_attention_2"}, f"_attn_implementation is 'flash_.*2': {BUILT}.*Flash"),
    ("llama", {"attn_implementation": "nonsense"}, f"attn_implementation is 'nonsense': {BUILT}Specified"),
    (
        "llama",
        {"pad_token_id": 999},
        f"pad_token_id is 999 and vocab_size is 258: {BUILT}Padding_idx must be within num_embeddings",
    ),
    (
        "opt",
        {"pad_token_id": 999},
        f"pad_token_id is 999 and vocab_size is 258: {BUILT}Padding_idx must be within num_embeddings",
    ),
    ("llama", {"pad_token_id": "x"}, f"pad_token_id is 'x': {READ}Validation error for .* expected int, got str"),
    ("llama", {"eos_token_id": [1, "x"]}, f"eos_token_id is .1, 'x'.: {READ}Validation error for .* expected int, got"),
    ("llama", {"tie_word_embeddings": "x"}, f"tie_word_embeddings is 'x': {READ}Valid.* expected bool, got str"),
    ("llama", {"hidden_act": "nonsense"}, f"hidden_act is 'nonsense': {BUILT}"),
    ("gpt2", {"activation_function": "no"}, f"activation_function is 'no': {BUILT}"),
    ("gemma3_text", {"hidden_activation": "no"}, f"hidden_activation is 'no': {BUILT}"),
    ("llama", {"num_attention_heads": 5}, f"num_attention_heads is 5.*: {READ}Class .*not a multiple of the number of"),
    ("gpt2", {"n_head": 5}, f".*n_head is 5.*: {BUILT}.*divisible"),
    ("bloom", {"n_head": 7}, f"n_head is 7.*: {BUILT}.*divisible"),
    (
        "llama",
        {"rope_parameters": {"rope_type": "nonsense"}},
        f"rope_parameters is .'rope_type': 'nonsense'.*: {BUILT}",
    ),
    ("llama", {"rope_parameters": 5}, f"rope_parameters is 5.*: {READ}Validation error"),
    ("llama", {"dtype": "float7"}, f"dtype is 'float7': {READ}"),
    ("llama", {"id2label": 5}, f"id2label is 5: {READ}"),
    (
        "qwen2",
        {"layer_types": ["full_attention"]},
        f"layer_types is .'full_attention'.*: {READ}.*must be equal to the n",
    ),
]


@pytest.mark.parametrize(("family", "keys", "words"), REFUSED, ids=[f"{f} {k}" for f, k, _ in REFUSED])
def test_a_value_of_config_json(family: str, keys: dict[str, Any], words: str, tmp_path: Path) -> None:
    folder = written(family, tmp_path / "model")
    said = json.loads((folder / "config.json").read_text()) | keys
    (folder / "config.json").write_text(json.dumps(said))
    found = []
    for stream in (False, True):
        with pytest.raises(BillhookError) as refusal:
            load.open_model(str(folder), stream=stream)
        found.append(str(refusal.value))
    assert found[0] == found[1] and "\n" not in found[0] and len(found[0]) < 550
    assert re.search(rf"model: config.json: {words}", found[0]), found[0]


@pytest.mark.parametrize("lacking", [("sentencepiece",), ("protobuf",), ("sentencepiece", "protobuf")])
def test_a_sentencepiece_model_without_its_packages(
    lacking: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.model("llama").save_pretrained(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"\x0a\x0c\x0a\x05<unk>\x15\0\0\0\0")
    missing = {tokenizers.SENTENCEPIECE[one] for one in lacking}
    monkeypatch.setattr(tokenizers, "find_spec", lambda module: None if module in missing else module)
    with pytest.raises(BillhookError, match=f"by sentencepiece and protobuf: pip install {' '.join(lacking)}, or"):
        tokenizers.load_tokenizer(tmp_path, "model")
    monkeypatch.setattr(tokenizers, "find_spec", lambda module: module)
    with pytest.raises(BillhookError, match="no tokenizer could be loaded"):
        tokenizers.load_tokenizer(tmp_path, "model")
