"""The tokenizer of a GGUF, as a transformers one: every field under `tokenizer.` is used, or refused by name."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, normalizers
from transformers import PreTrainedTokenizerFast
from transformers.integrations.gguf.gguf_tokenizer_mapping import convert_gguf_tokenizer

from billhook.checkpoints.gguf.architectures import ALIASES, BYTE_LEVEL, PRE_TOKENIZERS, SENTENCEPIECE
from billhook.checkpoints.gguf.file import AGAIN, shown
from billhook.checkpoints.gguf.vocabulary import NEVER_MERGED, SPACE, give_splits
from billhook.errors import BillhookError, first_line

FOLDER = "give the model's folder instead"
USED: Mapping[str, type | tuple[type, type]] = {  # field under `tokenizer.` -> what it must be; (list, x): of x
    "ggml.model": str,
    "ggml.pre": str,
    "ggml.tokens": (list, str),
    "ggml.scores": (list, float),
    "ggml.token_type": (list, int),
    "ggml.merges": (list, str),
    "ggml.bos_token_id": int,
    "ggml.eos_token_id": int,
    "ggml.unknown_token_id": int,
    "ggml.padding_token_id": int,
    "ggml.add_bos_token": bool,
    "ggml.add_eos_token": bool,
    "ggml.add_space_prefix": bool,
    "chat_template": str,
}
NO_TOKEN = 2**32 - 1  # -1, as some tools write it
NAMED_TEMPLATE = "chat_template."
IDS = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}  # name in the file -> in transformers
NOTHING = frozenset(  # fields that say nothing of how a text is cut
    {
        *("chat_templates", "huggingface.json", "ggml.token_type_count", "ggml.add_sep_token", "ggml.suppress_tokens"),
        *(f"ggml.{one}_token_id" for one in ("eot", "eom", "seperator", "cls", "mask", "prefix", "suffix", "middle")),
        *(f"ggml.fim_{one}_token_id" for one in ("pre", "suf", "mid", "pad", "rep", "sep")),
    }
)
ALWAYS = {
    "ggml.remove_extra_whitespaces": False,
    "ggml.normalizer.lowercase": False,
    "ggml.normalizer.strip_accents": False,
}


def tokenizer_of(path: Path, arch: str, fields: Mapping[str, Any]) -> Any:
    """A transformers tokenizer that cuts text as the fields of a GGUF say.

    Raises:
        BillhookError: they are damaged, or say what no transformers tokenizer does here.
    """
    said = {
        key.removeprefix("tokenizer."): one
        for key, one in fields.items()
        if key.startswith("tokenizer.") and not (key.endswith("_token_id") and one == NO_TOKEN)
    }
    _check(path, said)
    words, pre = said["ggml.tokens"], said.get("ggml.pre", "")
    kind = said["ggml.model"]
    if kind == BYTE_LEVEL and ALIASES.get(pre, pre) not in PRE_TOKENIZERS:
        what = f"is {shown(pre)}" if pre else "is missing"
        raise BillhookError(
            f"{path}: field tokenizer.ggml.pre {what}, and billhook knows {', '.join(PRE_TOKENIZERS)}: {FOLDER}"
        )
    given = {
        "tokenizer_type": kind,
        "pre_tokenizer_type": pre,
        "tokens": words,
        "scores": said.get("ggml.scores"),
        "token_type": said.get("ggml.token_type"),
        **({"merges": [one for one in said["ggml.merges"] if one != NEVER_MERGED]} if "ggml.merges" in said else {}),
    }
    special = {
        f"{name}_token": words[said[key]] for one, name in IDS.items() if (key := f"ggml.{one}_token_id") in said
    }
    around = {"add_bos_token": said.get("ggml.add_bos_token", kind == SENTENCEPIECE)}  # llama.cpp's own default
    around |= {"add_eos_token": True} if said.get("ggml.add_eos_token") else {}
    try:
        backend, _ = convert_gguf_tokenizer(arch, {key: one for key, one in given.items() if one is not None})
        tokenizer: Any = PreTrainedTokenizerFast(
            tokenizer_object=_of_these(backend, len(words)),
            **{f"{name}_token": None for name in IDS.values()} | special,
            **around,
        )
    except Exception as error:  # transformers and tokenizers raise many kinds
        raise BillhookError(f"{path}: no tokenizer could be made of it ({first_line(error)}): {FOLDER}") from error
    tokenizer.name_or_path = str(path)
    tokenizer.chat_template = _templates(said)
    if kind == BYTE_LEVEL:
        give_splits(tokenizer, ALIASES.get(pre, pre))
    elif said.get("ggml.add_space_prefix", True) is False:
        tokenizer.backend_tokenizer.normalizer = normalizers.Replace(" ", SPACE)
        tokenizer.backend_tokenizer.pre_tokenizer = None
    return tokenizer


def _of_these(backend: Tokenizer, words: int) -> Tokenizer:
    """Without tokens that transformers adds to those of the file: the model has no rows for them."""
    if backend.get_vocab_size() <= words:
        return backend
    said = json.loads(backend.to_str())
    said["added_tokens"] = [one for one in said["added_tokens"] if one["id"] < words]
    if said["model"].get("unk_token") not in said["model"]["vocab"]:
        said["model"]["unk_token"] = None
    return Tokenizer.from_str(json.dumps(said))


def _check(path: Path, said: Mapping[str, Any]) -> None:
    """Refuse fields of other types, ids beyond the tokens, lists of other lengths, and what is not read."""
    for key, one in said.items():
        should = str if key.startswith(NAMED_TEMPLATE) else USED.get(key)
        if should is None:
            if key not in NOTHING and (key not in ALWAYS or one is not ALWAYS[key]):
                raise BillhookError(
                    f"{path}: field tokenizer.{key} is {shown(one)}, which billhook does not read: {FOLDER}"
                )
        elif not _is(one, should):
            raise _damaged(
                path, key, one, f"a list of {should[1].__name__}" if isinstance(should, tuple) else should.__name__
            )
    _check_whole(path, said)
    _check_numbers(path, said, len(said["ggml.tokens"]))


def _check_whole(path: Path, said: Mapping[str, Any]) -> None:
    """Refuse what lacks a field that is needed, and models of texts that are not read."""
    for key in ("ggml.model", "ggml.tokens"):
        if key not in said:
            raise BillhookError(f"{path}: field tokenizer.{key} is missing, so that no text can be cut: {FOLDER}")
    if said["ggml.model"] not in (BYTE_LEVEL, SENTENCEPIECE):
        raise BillhookError(
            f"{path}: field tokenizer.ggml.model is {shown(said['ggml.model'])}, and billhook reads {BYTE_LEVEL} and {SENTENCEPIECE}: "
            f"{FOLDER}"
        )
    wanted = "ggml.merges" if said["ggml.model"] == BYTE_LEVEL else "ggml.scores"
    if wanted not in said:
        raise BillhookError(f"{path}: field tokenizer.{wanted} is missing, so that no text can be cut: {AGAIN}")
    if len(set(said["ggml.tokens"])) != len(said["ggml.tokens"]):
        raise BillhookError(f"{path}: field tokenizer.ggml.tokens has a token twice: {AGAIN}")


def _check_numbers(path: Path, said: Mapping[str, Any], words: int) -> None:
    """Refuse lists that are not of every token, and ids of none."""
    for key in ("ggml.scores", "ggml.token_type"):
        if key in said and len(said[key]) != words:
            raise _damaged(path, key, said[key], f"{words} numbers, one for each token")
    for key in (f"ggml.{one}_token_id" for one in IDS):
        if not 0 <= said.get(key, 0) < words:
            raise _damaged(path, key, said[key], f"the number of one of {words} tokens")


def _is(one: Any, should: type | tuple[type, type]) -> bool:
    if isinstance(should, tuple):
        return isinstance(one, list) and all(type(entry) is should[1] for entry in one)
    return type(one) is should


def _damaged(path: Path, key: str, found: Any, should: str) -> BillhookError:
    return BillhookError(f"{path}: field tokenizer.{key} is {shown(found)}, and should be {should}: {AGAIN}")


def _templates(said: Mapping[str, Any]) -> str | dict[str, str] | None:
    """The chat template, or several by name."""
    default = said.get("chat_template")
    named = {key.removeprefix(NAMED_TEMPLATE): one for key, one in said.items() if key.startswith(NAMED_TEMPLATE)}
    return (({"default": default} if default else {}) | named) if named else default
