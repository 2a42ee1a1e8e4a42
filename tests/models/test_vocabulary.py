"""A trimmed vocabulary: the text goes through tokenizer and model as before, and no other text loses anything."""

import json
import string
from collections.abc import Callable
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers as T
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from billhook.errors import BillhookError
from billhook.models.vocabulary import growth, named_ids, occurring, share_as_bytes, trim, trim_model, trim_tokenizer

LEXICON = ["".join(letters) for letters in product("bdgkt", "aeiou", "lmnrs", "aeiou")]
TEXT = " ".join(LEXICON[n * n % 97] for n in range(300)) + "\n"
OTHER = " ".join(LEXICON[n * 7 % 500] for n in range(600)) + " быстрая лиса прыгает через собаку" * 20
FOREIGN = [
    OTHER,
    "быстрая лиса",
    "敏捷的棕色狐狸。",
    "naïve café – ½ 🙂\u200d🎉",
    string.printable,
    "</s> <|user|> ",
    "a  b\t\r\n  c",
]
CHAT = "{% for m in messages %}<|user|>{{ m.role }}: {{ m.content }}\n{% endfor %}"
FAMILIES = list(tiny.CONFIGS)
ADDED = ["<unk>", "<s>", "</s>"]


@cache
def learnt(byte_level: bool) -> list[tuple[str, str]]:
    """The merges of a BPE that has seen more than the text."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = (
        pre_tokenizers.ByteLevel(add_prefix_space=False) if byte_level else pre_tokenizers.Metaspace()
    )
    backend.train_from_iterator([TEXT, OTHER], trainers.BpeTrainer(vocab_size=700, show_progress=False))
    return [(left, right) for left, right in json.loads(backend.to_str())["model"]["merges"]]


def numbered(symbols: list[str], merges: list[tuple[str, str]]) -> dict[str, int]:
    tokens = [*symbols, *sorted({c for pair in merges for c in "".join(pair)}), *map("".join, merges)]
    return {token: n for n, token in enumerate(dict.fromkeys(tokens))}


def byte_level(every_split: bool = False) -> Any:
    """Special tokens after the others, a template that writes one; with every way to split a token as a merge, if
    asked."""
    merges = learnt(True)
    vocab = numbered(sorted(pre_tokenizers.ByteLevel.alphabet()), merges)
    if every_split:
        merges = [(t[:n], t[n:]) for t in vocab for n in range(1, len(t)) if t[:n] in vocab and t[n:] in vocab]
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=every_split))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    backend.add_special_tokens(ADDED)
    backend.add_tokens(["<|user|>"])
    template = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", backend.token_to_id("<s>"))]
    )
    backend.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), template])
    made = T.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="</s>", unk_token="<unk>"
    )
    made.chat_template = CHAT
    return made


def byte_fallback() -> Any:
    """Special tokens and bytes first, a space that is a token of its own, a class with a pipeline of its own."""
    merges = learnt(False)
    vocab = numbered([*ADDED, *(f"<0x{n:02X}>" for n in range(256)), "½"], merges)
    return T.LlamaTokenizer(vocab=vocab, merges=merges, add_bos_token=True)


TOKENIZERS: dict[str, Callable[[], Any]] = {
    "byte_level": byte_level,
    "every_split": lambda: byte_level(every_split=True),
    "byte_fallback": byte_fallback,
}
every_tokenizer = pytest.mark.parametrize("kind", TOKENIZERS)


def ids(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False).input_ids


def model(family: str, tokenizer: Any, padding: int = 0) -> Any:
    """A tiny model of the tokenizer's size."""
    torch.manual_seed(0)
    config = tiny.CONFIGS[family](**{"hidden_size_per_layer_input": 0} if family == "gemma4_text" else {})
    config.vocab_size = len(tokenizer) + padding
    config.bos_token_id, config.eos_token_id, config.pad_token_id = (
        tokenizer.convert_tokens_to_ids(token) for token in ("<s>", "</s>", "<unk>")
    )
    return T.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)


@every_tokenizer
def test_the_text_tokenises_as_before(kind: str) -> None:
    tokenizer = TOKENIZERS[kind]()
    kept = occurring(tokenizer, [TEXT])
    trimmed = trim_tokenizer(tokenizer, kept)
    assert type(trimmed) is type(tokenizer) and len(trimmed) == len(kept) < len(tokenizer) - 100
    assert [kept[n] for n in ids(trimmed, TEXT)] == ids(tokenizer, TEXT)
    assert [kept[n] for n in trimmed(TEXT).input_ids] == tokenizer(TEXT).input_ids != ids(tokenizer, TEXT)
    assert trimmed.convert_ids_to_tokens(range(len(kept))) == tokenizer.convert_ids_to_tokens(kept)
    assert len(ids(trimmed, OTHER)) > len(ids(tokenizer, OTHER))


@every_tokenizer
@pytest.mark.parametrize("text", FOREIGN)
def test_no_other_text_loses_anything(text: str, kind: str) -> None:
    tokenizer = TOKENIZERS[kind]()
    trimmed = trim_tokenizer(tokenizer, occurring(tokenizer, ["bala"]))
    for skip in (True, False):
        assert trimmed.decode(trimmed(text).input_ids, skip) == tokenizer.decode(tokenizer(text).input_ids, skip)
    assert trimmed.unk_token_id not in ids(trimmed, text)


@every_tokenizer
def test_a_trimmed_tokenizer_is_a_stock_one(kind: str, tmp_path: Path) -> None:
    tokenizer = TOKENIZERS[kind]()
    trimmed = trim_tokenizer(tokenizer, occurring(tokenizer, [TEXT]))
    trimmed.save_pretrained(tmp_path)
    again = T.AutoTokenizer.from_pretrained(tmp_path)
    assert again.get_vocab() == trimmed.get_vocab() and again.special_tokens_map == tokenizer.special_tokens_map
    assert [again(text).input_ids for text in (TEXT, *FOREIGN)] == [
        trimmed(text).input_ids for text in (TEXT, *FOREIGN)
    ]
    assert again.chat_template == tokenizer.chat_template
    assert {again.bos_token, again.eos_token} <= {token.content for token in again.added_tokens_decoder.values()}


def plain(merges: list[tuple[str, str]], extra: list[str], **settings: Any) -> Any:
    """Characters and what the merges make of them, last first."""
    vocab = numbered(extra, merges)
    vocab = {token: len(vocab) - 1 - n for token, n in vocab.items()}
    return T.PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE(vocab=vocab, merges=merges, **settings)))


def test_of_several_ways_to_a_token_one_is_kept() -> None:
    tokenizer = plain([("b", "c"), ("a", "b"), ("ab", "c"), ("a", "bc"), ("c", "d"), ("cd", "d")], [])
    assert tokenizer.tokenize("abc") == ["abc"]
    kept = {*tokenizer.convert_ids_to_tokens(occurring(tokenizer, ["abc"]))}
    assert kept == {"a", "b", "c", "d", "bc", "abc"}
    more = {*tokenizer.convert_ids_to_tokens(occurring(tokenizer, ["b"], at_least=6))}
    assert more == {"a", "b", "c", "d", "bc", "ab"}
    tokenizer = plain([("ab", "c"), ("a", "b")], [])  # the second merge comes first
    assert {*tokenizer.convert_ids_to_tokens(occurring(tokenizer, ["b"], at_least=4))} == {"a", "b", "c", "ab"}


def test_tokens_that_have_an_office_are_kept() -> None:
    tokenizer = plain([("a", "b")], ["unknown", "void", "other"], unk_token="unknown")
    tokenizer._pad_token = None
    tokenizer._special_tokens_map["pad_token"] = "void"  # no added token
    kept = {*tokenizer.convert_ids_to_tokens(occurring(tokenizer, ["a"]))}
    assert kept == {"a", "b", "unknown", "void"}


def test_ids_outside_the_vocabulary_follow() -> None:
    tokenizer = byte_level()
    cls, sep = ((token, tokenizer.convert_tokens_to_ids(token)) for token in ("<s>", "</s>"))
    tokenizer.backend_tokenizer.post_processor = processors.RobertaProcessing(sep, cls)
    kept = occurring(tokenizer, [TEXT])
    tokenizer.backend_tokenizer.enable_padding(pad_id=sep[1], pad_token="</s>")  # a call of the tokenizer lifts it
    trimmed = trim_tokenizer(tokenizer, kept)
    assert kept[trimmed.backend_tokenizer.padding["pad_id"]] == sep[1]
    assert [kept[n] for n in trimmed.backend_tokenizer.encode(TEXT).ids] == tokenizer.backend_tokenizer.encode(TEXT).ids


def test_a_space_stays_a_space() -> None:
    merges = learnt(False)
    vocab = numbered([*ADDED, *(f"<0x{n:02X}>" for n in range(256))], merges)
    tokenizer = T.LlamaTokenizer(vocab=vocab, merges=merges, add_prefix_space=False)
    trimmed = trim_tokenizer(tokenizer, occurring(tokenizer, ["bala"]))
    assert trimmed.decode(ids(trimmed, "bala bala")) == "bala bala"


@pytest.mark.parametrize("used", [True, False])
def test_letters_stay_where_bytes_cannot_stand_in(used: bool) -> None:
    tokenizer = plain(learnt(False), [f"<0x{n:02X}>" for n in range(255 if used else 256)], byte_fallback=used)
    assert {*string.ascii_lowercase} & {*tokenizer.get_vocab()} <= {
        *tokenizer.convert_ids_to_tokens(occurring(tokenizer, ["-"]))
    }


def test_what_the_chat_template_writes_is_kept() -> None:
    tokenizer = byte_level()
    tokenizer.chat_template = CHAT.replace("m.role", f"m.role + '{LEXICON[7]}'")
    rendered = tokenizer.apply_chat_template([{"role": "user", "content": "Hello"}], tokenize=False)
    wanted, kept = {*ids(tokenizer, rendered)}, {*occurring(tokenizer, ["-"])}
    tokenizer.chat_template = None
    assert wanted <= kept and not wanted <= {*occurring(tokenizer, ["-"])}


def test_a_template_may_refuse_a_chat() -> None:
    tokenizer = byte_level()
    plain = occurring(tokenizer, ["-"])
    tokenizer.chat_template = {"default": CHAT, "tools": "{{ raise_exception('no') }}"}
    assert occurring(tokenizer, ["-"]) == plain
    tokenizer.chat_template = None
    assert {*occurring(tokenizer, ["-"])} < {*plain}


def test_more_tokens_fill_up() -> None:
    tokenizer = byte_level()
    fewest = occurring(tokenizer, [TEXT])
    for at_least, multiple_of, expected in ((0, 64, -(-len(fewest) // 64) * 64), (601, 10, 610), (0, 1, len(fewest))):
        kept = occurring(tokenizer, [TEXT], at_least=at_least, multiple_of=multiple_of)
        assert len(kept) == expected and {*fewest} <= {*kept}
        trimmed = trim_tokenizer(tokenizer, kept)
        assert [kept[n] for n in ids(trimmed, TEXT)] == ids(tokenizer, TEXT)
    for make in TOKENIZERS.values():
        tokenizer = make()
        assert occurring(tokenizer, ["-"], at_least=10**6) == [*range(len(tokenizer))]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.covering(some={"family": 6})
def test_the_model_computes_the_same_on_the_text(family: str, tmp_path: Path) -> None:
    tokenizer = byte_level()
    built = model(family, tokenizer)
    kept = occurring(tokenizer, [TEXT], named_ids(built))
    before = built(torch.tensor([ids(tokenizer, TEXT)[:40]])).logits
    parameters, named = built.num_parameters(), {built.config.bos_token_id, built.config.eos_token_id}
    tied = built.get_output_embeddings().weight is built.get_input_embeddings().weight
    ticks: list[int] = []
    trimmed, found = trim(built, tokenizer, [TEXT], lambda _, done, __: ticks.append(done))
    assert ticks == [0, 1, 2]
    tokens = torch.tensor([ids(trimmed, TEXT)[:40]])
    torch.testing.assert_close(built(tokens).logits, before[..., kept])
    assert found == {
        "before": len(tokenizer),
        "kept": len(kept),
        "parameters_saved": parameters - built.num_parameters(),
    }
    assert found["parameters_saved"] == (len(tokenizer) - len(kept)) * built.get_input_embeddings().weight[
        0
    ].numel() * (1 if tied else 2)
    assert {kept[n] for n in (built.config.bos_token_id, built.config.eos_token_id)} == named
    assert built.config.vocab_size == len(kept) == built(tokens, labels=tokens).logits.shape[-1]
    assert built.get_input_embeddings().padding_idx in (None, built.config.pad_token_id)
    built.save_pretrained(tmp_path)
    again, info = T.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()) and torch.equal(again(tokens).logits, built(tokens).logits)
    for one in (built, again):
        assert (one.get_output_embeddings().weight is one.get_input_embeddings().weight) == tied
    assert again.generation_config.eos_token_id == trimmed.eos_token_id


def test_ids_in_the_configs_follow() -> None:
    tokenizer = byte_level()
    built = model("llama", tokenizer)
    last, rare = len(tokenizer) - 1, len(tokenizer) - 10  # rare: no token of the text
    eos = built.config.eos_token_id
    assert rare not in occurring(tokenizer, [TEXT])
    built.config.eos_token_id = [eos, last]
    built.config.pad_token_id = -1
    built.generation_config.eos_token_id = [last, rare, 10**6]
    built.generation_config.suppress_tokens = [rare]
    built.generation_config.bad_words_ids = [[5, rare], [last]]
    built.generation_config.sequence_bias = [[[rare], -2.0]]
    built.generation_config.max_new_tokens = rare
    trimmed, found = trim(built, tokenizer, [TEXT])
    end = found["kept"] - 1
    new = trimmed.convert_tokens_to_ids(tokenizer.convert_ids_to_tokens(rare))
    assert new is not None and new != rare
    assert built.config.eos_token_id == [trimmed.eos_token_id, end] and built.config.pad_token_id == -1
    assert built.generation_config.eos_token_id == [end, new, 10**6]
    assert built.generation_config.suppress_tokens == [new]
    assert built.generation_config.bad_words_ids == [[5, new], [end]]
    assert built.generation_config.sequence_bias == [[[new], -2.0]]
    assert built.generation_config.max_new_tokens == rare


def test_rows_without_a_token_go() -> None:
    tokenizer = byte_level()
    built = model("qwen2", tokenizer, padding=50)
    _, found = trim(built, tokenizer, [TEXT], multiple_of=8)
    assert found["before"] == len(tokenizer) + 50 and found["kept"] % 8 == 0
    assert found["kept"] < len(tokenizer) and built.lm_head.out_features == found["kept"]


def test_a_bias_of_the_head_is_cut_too() -> None:
    built = model("llama_bias", byte_level())
    built.lm_head = torch.nn.Linear(32, built.config.vocab_size)
    before = built(torch.tensor([[5, 7]])).logits
    trim_model(built, range(20))
    torch.testing.assert_close(built(torch.tensor([[5, 7]])).logits, before[..., :20])
    assert built.lm_head.bias.shape == (20,)


@every_tokenizer
def test_text_of_another_script_shows_as_bytes(kind: str) -> None:
    tokenizer = TOKENIZERS[kind]()
    trimmed = trim_tokenizer(tokenizer, occurring(tokenizer, [TEXT]))
    assert growth(tokenizer, trimmed, [TEXT, TEXT]) == 0 == growth(tokenizer, trimmed, [""])
    assert growth(tokenizer, trimmed, ["лиса"]) == len(ids(trimmed, "лиса")) / len(ids(tokenizer, "лиса")) - 1 > 0
    assert share_as_bytes(tokenizer, trimmed, [TEXT, " "]) == 0 == share_as_bytes(tokenizer, trimmed, [" "])
    assert share_as_bytes(tokenizer, trimmed, ["лиса  прыгает"]) == 1
    half = share_as_bytes(tokenizer, trimmed, ["лиса прыгает", TEXT[: len("лиса прыгает")]])
    assert 0.3 < half < 0.7


def word_piece() -> Any:
    return T.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]")), unk_token="[UNK]"
    )


def marked() -> Any:
    return T.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.BPE({"a": 0, "a</w>": 1}, [], end_of_word_suffix="</w>"))
    )


class Slow:
    is_fast = False


@pytest.mark.parametrize(
    ("tokenizer", "text", "message"),
    [
        (byte_level, ["", " \n"], "the text to take the vocabulary from is empty"),
        (byte_level, [], "the text to take the vocabulary from is empty"),
        (word_piece, [TEXT], "a tokenizer of type WordPiece cannot be trimmed"),
        (marked, [TEXT], "a tokenizer of type BPE with marked word ends cannot be trimmed"),
        (Slow, [TEXT], r"a slow tokenizer \(Slow\) cannot be trimmed"),
    ],
)
def test_what_cannot_be_trimmed_is_refused(tokenizer: Callable[[], Any], text: list[str], message: str) -> None:
    built = model("llama", byte_level())
    before = built.get_input_embeddings().weight
    with pytest.raises(BillhookError, match=message) as caught:
        trim(built, tokenizer(), text)
    assert "\n" not in str(caught.value) and built.get_input_embeddings().weight is before


def test_another_models_tokenizer_is_refused() -> None:
    tokenizer = byte_level()
    built = model("llama", tokenizer, padding=-1)
    with pytest.raises(BillhookError, match=rf"id {len(tokenizer) - 1}, beyond the model's vocabulary of"):
        trim(built, tokenizer, [TEXT])
    assert built.config.vocab_size == len(tokenizer) - 1


def test_a_text_that_would_split_anew_is_refused() -> None:
    tokenizer = byte_level()
    tokenizer.backend_tokenizer.model.dropout = 0.5  # a BPE that draws its merges
    built = model("llama", tokenizer)
    with pytest.raises(BillhookError, match="splits the text anew"):
        trim(built, tokenizer, [TEXT])
    assert built.config.vocab_size == len(tokenizer)
