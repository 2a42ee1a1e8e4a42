"""The tokenizer in a GGUF: its metadata, what is refused, and how llama.cpp itself cuts text with it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers as T
from test_export import IDS, LLAMA, built, fields, in_llama
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers

from billhook.checkpoints import load
from billhook.checkpoints.clients import llamacpp
from billhook.checkpoints.gguf import vocabulary
from billhook.checkpoints.gguf.architectures import BYTE_LEVEL, PRE_TOKENIZERS, SENTENCEPIECE
from billhook.checkpoints.gguf.write import write_gguf
from billhook.errors import BillhookError

TEXT = (
    "\n \n\n \t \t\t\n  \n   x 3 33 333 3333 33333 3.3 3..3  7\n\n2 and  12,345.67 'tis I'd CAN'T We'Ve \"told\" -----====\n"
    ' naïve Привет អាច 我想在 apple工作1314天～ 🚀 (normal) 😶\u200d🌫️ `````"""" end.  \r\n\r\n AbcDEF fooBar/\n qzx'
)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "model.gguf"


def trained(name: str) -> Any:
    """A byte-level tokenizer with splits `name`, merges learned from TEXT, and one token that no merges make."""
    tokenizer = T.PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()))
    vocabulary.give_splits(tokenizer, name)
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


def missing_merge() -> Any:
    """SentencePiece in all but that one way to put a token together is no merge."""
    tokenizer = sentencepiece()
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    content["model"]["merges"].remove(["t", "he"])
    backend = Tokenizer.from_str(json.dumps(content))
    return T.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")


def word_level() -> Any:
    backend = Tokenizer(models.WordLevel({"a": 0, "</s>": 1}, unk_token="a"))
    return T.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")


def test_byte_level_metadata(out: Path) -> None:
    tokenizer = trained("smollm")
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
    vocabulary.give_splits(tokenizer, name)
    again = T.PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, eos_token="</s>")
    assert vocabulary.vocabulary(again, 258)["tokenizer.ggml.pre"] == name


def test_the_splits_of_stock_tokenizers_are_known() -> None:
    vocab = {symbol: n for n, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    stock = T.Qwen2Tokenizer(vocab=vocab, merges=[])
    assert vocabulary.vocabulary(stock, len(stock))["tokenizer.ggml.pre"] == "qwen2"
    smollm = tiny.tokenizer()
    smollm.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    assert vocabulary.vocabulary(smollm, 258)["tokenizer.ggml.pre"] == "smollm"
    before = smollm.backend_tokenizer.to_str()
    vocabulary.give_splits(smollm, "unheard-of")
    assert smollm.backend_tokenizer.to_str() == before


@pytest.mark.parametrize("family", ["llama", "qwen2"])  # of qwen3 it does not read the head size (5.23)
def test_transformers_reads_its_own_model_back(family: str, out: Path) -> None:
    tokenizer = trained("qwen2")
    model = built(family, vocab_size=len(tokenizer))
    write_gguf(model, tokenizer, out, "F32")
    again = load.open_model(str(out), device="cpu")
    assert torch.equal(again.model(torch.tensor([IDS])).logits, model(torch.tensor([IDS])).logits)
    assert again.tokenizer(TEXT).input_ids == tokenizer(TEXT).input_ids


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "splits": (
        changed(lambda content: content["pre_tokenizer"].update(add_prefix_space=True)),
        "could not follow this tokenizer: its pre_tokenizer .* is none of gpt-2, smollm",
    ),
    "normalizer": (
        changed(lambda content: content.update(normalizer={"type": "Lowercase"})),
        "it normalizes by Lowercase",
    ),
    "suffix": (
        changed(lambda content: content["model"].update(end_of_word_suffix="</w>")),
        "its BPE uses end_of_word_suffix",
    ),
    "rows": (sentencepiece, "has id 294, and the embedding 258 rows"),
    "eos": (without_eos, "has no eos_token.*set tokenizer.eos_token"),
    "class token": (with_class_token, r"puts \[257\] before and \[\] after a text"),
    "word level": (word_level, "its model is WordLevel, not BPE"),
    "merges": (missing_merge, "not those of a SentencePiece vocabulary"),
    "slow": (lambda: object(), "object has no tokenizer.json"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_llama_cpp_cannot_follow_is_refused_in_one_line(case: str) -> None:
    make, message = REFUSED[case]
    with pytest.raises(BillhookError, match=message) as refused:
        vocabulary.vocabulary(make(), 300 if case == "merges" else 258)
    assert "\n" not in str(refused.value)


@in_llama
@pytest.mark.parametrize("name", [*PRE_TOKENIZERS, "sentencepiece", "no merges"])
def test_llama_cpp_cuts_text_the_same(name: str, out: Path) -> None:
    special = {"sentencepiece": sentencepiece, "no merges": tiny.tokenizer}
    tokenizer = special[name]() if name in special else trained(name)
    text = TEXT.strip() if name == "sentencepiece" else TEXT  # a space in front: see checkpoints/gguf/vocabulary.py
    if name in ("tekken", "gpt-4o"):
        text = text.replace("អាច", "")  # combining marks: see checkpoints/gguf/architectures.py
    texts = [text, "the hen and  the ant", "2\n\n 2 x", "half way</s>"]
    write_gguf(built("llama", vocab_size=len(tokenizer)), tokenizer, out)
    assert llamacpp.run(LLAMA, out, {"tokenize": texts})["tokens"] == [tokenizer(text).input_ids for text in texts]
