"""A tokenizer as GGUF metadata: what llama.cpp needs to cut text as the Hugging Face tokenizer does.

Everything is read from the tokenizer's tokenizer.json.  What llama.cpp has no name for is refused, never guessed.

Two differences stay.  llama.cpp does not compose Unicode (NFC), which shows only on decomposed text.  And where a
SentencePiece tokenizer of transformers 5 (`Metaspace`) adds no space, before a text that begins with one and after a
special token, llama.cpp adds one, as SentencePiece does.
"""

import json
import re
from collections.abc import Iterator
from itertools import groupby
from typing import Any

from tokenizers import Regex, pre_tokenizers

from billhook.checkpoints.gguf.architectures import (
    BYTE_LEVEL,
    DIGIT,
    GPT2,
    NO_SPLITS,
    PRE_TOKENIZERS,
    SENTENCEPIECE,
    Splits,
)
from billhook.errors import BillhookError, ModelError
from billhook.runtime.special_tokens import special_ids

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # token types, numbered as in llama.h
SPECIAL = {"bos": "bos_token_id", "eos": "eos_token_id", "unknown": "unk_token_id", "padding": "pad_token_id"}
SPACE = "▁"  # SentencePiece's sign for a space
NEVER_MERGED = f"{SPACE} {SPACE}"  # a merge that no text has; it stands for no merges, since gguf has no empty arrays
LAST_SCORE = -1e6  # score of tokens that no merge makes, below all others
Json = dict[str, Any]


def vocabulary(tokenizer: Any, rows: int, bos: int | None = None) -> Json:
    """Metadata under `tokenizer.`: each token and its type, how to cut text, and what to add to it.

    Args:
        rows: number of rows of the embedding.
        bos: the model's first token, for a tokenizer that names none.

    Raises:
        BillhookError: llama.cpp could not follow this tokenizer.
    """
    backend = _backend(tokenizer)
    if backend["model"]["type"] != "BPE":
        raise _refused(f"its model is {backend['model']['type']}, not BPE")
    tokens, types = _tokens(backend, rows)
    if '"ByteLevel"' in json.dumps(backend["pre_tokenizer"]):
        metadata = _byte_level(backend, tokens, types)
    else:
        metadata = _sentencepiece(backend, tokens, types, tokenizer.unk_token_id)
    metadata |= _special(tokenizer, bos) | _templates(tokenizer.chat_template)
    return {f"tokenizer.{key}": value for key, value in metadata.items()}


def give_splits(tokenizer: Any, name: str) -> None:
    """Make a tokenizer split text as llama.cpp's `tokenizer.ggml.pre` says, in place; an unknown name changes nothing.

    Needed where transformers built the tokenizer from a GGUF: 5.23 knows only the splits of some names, and splits by
    all others as GPT-2 does (`GGUF_PRE_TOKENIZER_SPLITS`).
    """
    if row := PRE_TOKENIZERS.get(name):
        splits = [pre_tokenizers.Split(Regex(regex), "isolated") for regex in row.regexes]
        encode = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, encode])
        tokenizer.backend_tokenizer.model.ignore_merges = row.ignore_merges


def _backend(tokenizer: Any) -> Json:
    """The content of tokenizer.json."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ModelError(
            f"{type(tokenizer).__name__} has no tokenizer.json, which the GGUF vocabulary is made from: "
            "put the model's tokenizer.json into its folder"
        )
    return json.loads(backend.to_str())


def _refused(what: str) -> BillhookError:
    return BillhookError(
        f"llama.cpp could not follow this tokenizer: {what}; convert it with llama.cpp's own convert_hf_to_gguf.py"
    )


def _tokens(backend: Json, rows: int) -> tuple[list[str], list[int]]:
    """Text and type of each row of the embedding; a row without a token is unused."""
    added = {token["id"]: token for token in backend["added_tokens"]}
    text = {n: token for token, n in backend["model"]["vocab"].items()}
    text |= {n: token["content"] for n, token in added.items()}
    if (last := max(text)) >= rows:
        raise ModelError(
            f"token {text[last]!r} has id {last}, and the embedding {rows} rows: "
            "use the model's own tokenizer, or give the model a row for each token (resize_token_embeddings)"
        )
    types = dict.fromkeys(text, NORMAL)
    types |= {n: CONTROL if token["special"] else USER_DEFINED for n, token in added.items()}
    return [text.get(n, f"[PAD{n}]") for n in range(rows)], [types.get(n, UNUSED) for n in range(rows)]


def _byte_level(backend: Json, tokens: list[str], types: list[int]) -> Json:
    """Byte-level BPE: merges, and the name of the splits before them."""
    model, normalizer = backend["model"], backend["normalizer"]
    if normalizer and normalizer["type"] != "NFC":
        raise _refused(f"it normalizes by {normalizer['type']}")
    if used := [key for key in ("continuing_subword_prefix", "end_of_word_suffix", "byte_fallback") if model.get(key)]:
        raise _refused(f"its BPE uses {used[0]}")
    splits = Splits(_regexes(backend["pre_tokenizer"]), bool(model.get("ignore_merges")))
    name = next((name for name, row in PRE_TOKENIZERS.items() if row == splits), None)
    if name is None:
        raise _refused(
            f"its pre_tokenizer {json.dumps(backend['pre_tokenizer'], ensure_ascii=False)}, ignore_merges "
            f"{splits.ignore_merges}, is none of {', '.join(PRE_TOKENIZERS)}"
        )
    return {
        "ggml.model": BYTE_LEVEL,
        "ggml.pre": name,
        "ggml.tokens": tokens,
        "ggml.token_type": types,
        "ggml.merges": [" ".join(pair) for pair in _merges(backend)] or [NEVER_MERGED],
    }


def _regexes(step: Json) -> tuple[str, ...]:
    """The regular expressions that a pre_tokenizer isolates in turn; one of another kind is returned as its JSON."""
    match step:
        case {"type": "Sequence", "pretokenizers": steps}:
            return tuple(regex for inner in steps for regex in _regexes(inner))
        case {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}:
            return (regex,)
        case {"type": "Digits", "individual_digits": True}:
            return (DIGIT,)
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}:
            return (GPT2,)
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}:
            return ()
    return (json.dumps(step),)


def _merges(backend: Json) -> Iterator[tuple[str, str]]:
    """Pairs of tokens in the order of merging; older files write a pair as one string."""
    for pair in backend["model"]["merges"]:
        left, right = pair.split(" ") if isinstance(pair, str) else pair
        yield left, right


def _sentencepiece(backend: Json, tokens: list[str], types: list[int], unknown: int | None) -> Json:
    """SentencePiece BPE: a score for each token, from the order of its merges."""
    if not backend["model"].get("byte_fallback"):
        raise _refused("it is neither byte-level nor SentencePiece with byte fallback")
    types = [
        BYTE if re.fullmatch("<0x[0-9A-F]{2}>", token) else kind for token, kind in zip(tokens, types, strict=True)
    ]
    if unknown is not None:
        types[unknown] = UNKNOWN
    return {
        "ggml.model": SENTENCEPIECE,
        "ggml.pre": NO_SPLITS,
        "ggml.tokens": tokens,
        "ggml.scores": _scores(backend, tokens, types),
        "ggml.token_type": types,
        "ggml.add_space_prefix": _prefix(backend),
    }


def _prefix(backend: Json) -> bool:
    """Whether a space is put before the text; spaces must become SPACE, and the text must stay in one piece."""
    escape = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    match backend["normalizer"], backend["pre_tokenizer"]:
        case {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": prepended}, last]}, None if (
            prepended == SPACE and last == escape
        ):
            return True
        case normalizer, None if normalizer == escape:
            return False
        case None, {"type": "Metaspace", "replacement": sign, "prepend_scheme": scheme, "split": False} if (
            sign == SPACE
        ):
            return scheme != "never"
    raise _refused(
        f"its normalizer {json.dumps(backend['normalizer'], ensure_ascii=False)} with pre_tokenizer "
        f"{json.dumps(backend['pre_tokenizer'], ensure_ascii=False)} is not SentencePiece's"
    )


def _scores(backend: Json, tokens: list[str], types: list[int]) -> list[float]:
    """A score for each token, such that merging the best-scored token first, as in SentencePiece, gives these merges.

    That is possible where every split of a token into two tokens is a merge, and a token's merges follow one another.
    """
    pairs = list(_merges(backend))
    order = [token for token, _ in groupby(left + right for left, right in pairs)]
    known = {token for token, kind in zip(tokens, types, strict=True) if kind == NORMAL}
    halves = {(token[:n], token[n:]) for token in known for n in range(1, len(token))}
    ways = {(left, right) for left, right in halves if left in known and right in known}
    if len(order) != len(set(order)) or not ways <= set(pairs):
        raise _refused("its merges are not those of a SentencePiece vocabulary")
    score = {token: float(-n) for n, token in enumerate(order)}
    return [score.get(token, LAST_SCORE) for token in tokens]


def _special(tokenizer: Any, bos: int | None) -> Json:
    """Ids of the special tokens, and which of them are added around a text."""
    ids = {name: getattr(tokenizer, attribute, None) for name, attribute in SPECIAL.items()}
    if ids["eos"] is None:
        raise ModelError(
            "the tokenizer has no eos_token, and llama.cpp would take token 11 for it: set tokenizer.eos_token"
        )
    first, last = special_ids(tokenizer)
    if first not in ([], [ids["bos"]]) or last not in ([], [ids["eos"]]):
        raise _refused(f"it puts {first} before and {last} after a text, not its bos_token and eos_token")
    ids["bos"] = bos if ids["bos"] is None else ids["bos"]
    named = {f"ggml.{name}_token_id": n for name, n in ids.items() if n is not None}
    return {**named, "ggml.add_bos_token": bool(first), "ggml.add_eos_token": bool(last)}


def _templates(templates: str | dict[str, str] | None) -> Json:
    """The chat template, or several by name."""
    if not isinstance(templates, dict):
        return {"chat_template": templates} if templates else {}
    named = {f"chat_template.{name}": text for name, text in templates.items() if name != "default"}
    default = {"chat_template": templates["default"]} if "default" in templates else {}
    return default | named | ({"chat_templates": sorted(templates)} if named else {})
