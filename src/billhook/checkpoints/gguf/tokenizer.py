"""The tokenizer of a GGUF as a transformers tokenizer: every field under `tokenizer.` is used, or refused by name."""

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
from billhook.errors import BillhookError, ModelError, first_line

FOLDER = "give the model's folder instead"
USED: Mapping[str, type | tuple[type, type]] = {  # field under `tokenizer.` -> its type; (list, x): a list of x
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
NO_TOKEN = 2**32 - 1  # what some tools write for -1
NAMED_TEMPLATE = "chat_template."
IDS = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}  # name in the file -> name in transformers
NOTHING = frozenset(  # fields that do not change how text is cut
    {
        *("chat_templates", "huggingface.json", "ggml.token_type_count", "ggml.add_sep_token", "ggml.suppress_tokens"),
        *(f"ggml.{name}_token_id" for name in ("eot", "eom", "seperator", "cls", "mask", "prefix", "suffix", "middle")),
        *(f"ggml.fim_{name}_token_id" for name in ("pre", "suf", "mid", "pad", "rep", "sep")),
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
        BillhookError: the fields are damaged, or ask for what no transformers tokenizer does.
    """
    settings = {
        key.removeprefix("tokenizer."): value
        for key, value in fields.items()
        if key.startswith("tokenizer.") and not (key.endswith("_token_id") and value == NO_TOKEN)
    }
    _check(path, settings)
    words, pre = settings["ggml.tokens"], settings.get("ggml.pre", "")
    kind = settings["ggml.model"]
    if kind == BYTE_LEVEL and ALIASES.get(pre, pre) not in PRE_TOKENIZERS:
        what = f"is {shown(pre)}" if pre else "is missing"
        raise ModelError(
            f"{path}: field tokenizer.ggml.pre {what}, and billhook knows {', '.join(PRE_TOKENIZERS)}: {FOLDER}"
        )
    arguments = {
        "tokenizer_type": kind,
        "pre_tokenizer_type": pre,
        "tokens": words,
        "scores": settings.get("ggml.scores"),
        "token_type": settings.get("ggml.token_type"),
        **(
            {"merges": [merge for merge in settings["ggml.merges"] if merge != NEVER_MERGED]}
            if "ggml.merges" in settings
            else {}
        ),
    }
    special = {
        f"{name}_token": words[settings[key]]
        for field, name in IDS.items()
        if (key := f"ggml.{field}_token_id") in settings
    }
    added = {"add_bos_token": settings.get("ggml.add_bos_token", kind == SENTENCEPIECE)}  # llama.cpp's default
    added |= {"add_eos_token": True} if settings.get("ggml.add_eos_token") else {}
    try:
        backend, _ = convert_gguf_tokenizer(arch, {key: value for key, value in arguments.items() if value is not None})
        tokenizer: Any = PreTrainedTokenizerFast(
            tokenizer_object=_without_added(backend, len(words)),
            **{f"{name}_token": None for name in IDS.values()} | special,
            **added,
        )
    except Exception as error:  # transformers and tokenizers raise many kinds
        raise ModelError(f"{path}: no tokenizer could be made of it ({first_line(error)}): {FOLDER}") from error
    tokenizer.name_or_path = str(path)
    tokenizer.chat_template = _templates(settings)
    if kind == BYTE_LEVEL:
        give_splits(tokenizer, ALIASES.get(pre, pre))
    elif settings.get("ggml.add_space_prefix", True) is False:
        tokenizer.backend_tokenizer.normalizer = normalizers.Replace(" ", SPACE)
        tokenizer.backend_tokenizer.pre_tokenizer = None
    return tokenizer


def _without_added(backend: Tokenizer, words: int) -> Tokenizer:
    """The tokenizer without tokens that transformers adds to the file's, which the model has no rows for."""
    if backend.get_vocab_size() <= words:
        return backend
    content = json.loads(backend.to_str())
    content["added_tokens"] = [token for token in content["added_tokens"] if token["id"] < words]
    if content["model"].get("unk_token") not in content["model"]["vocab"]:
        content["model"]["unk_token"] = None
    return Tokenizer.from_str(json.dumps(content))


def _check(path: Path, fields: Mapping[str, Any]) -> None:
    """Refuse fields of other types, ids beyond the tokens, lists of other lengths, and fields that are not read."""
    for key, value in fields.items():
        should = str if key.startswith(NAMED_TEMPLATE) else USED.get(key)
        if should is None:
            if key not in NOTHING and (key not in ALWAYS or value is not ALWAYS[key]):
                raise ModelError(
                    f"{path}: field tokenizer.{key} is {shown(value)}, which billhook does not read: {FOLDER}"
                )
        elif not _is(value, should):
            raise _damaged(
                path, key, value, f"a list of {should[1].__name__}" if isinstance(should, tuple) else should.__name__
            )
    _check_whole(path, fields)
    _check_numbers(path, fields, len(fields["ggml.tokens"]))


def _check_whole(path: Path, fields: Mapping[str, Any]) -> None:
    """Refuse a tokenizer that lacks a necessary field, or whose model is not read."""
    for key in ("ggml.model", "ggml.tokens"):
        if key not in fields:
            raise ModelError(f"{path}: field tokenizer.{key} is missing, so that no text can be cut: {FOLDER}")
    if fields["ggml.model"] not in (BYTE_LEVEL, SENTENCEPIECE):
        raise ModelError(
            f"{path}: field tokenizer.ggml.model is {shown(fields['ggml.model'])}, and billhook reads {BYTE_LEVEL} and "
            f"{SENTENCEPIECE}: {FOLDER}"
        )
    wanted = "ggml.merges" if fields["ggml.model"] == BYTE_LEVEL else "ggml.scores"
    if wanted not in fields:
        raise ModelError(f"{path}: field tokenizer.{wanted} is missing, so that no text can be cut: {AGAIN}")
    if len(set(fields["ggml.tokens"])) != len(fields["ggml.tokens"]):
        raise ModelError(f"{path}: field tokenizer.ggml.tokens has a token twice: {AGAIN}")


def _check_numbers(path: Path, fields: Mapping[str, Any], words: int) -> None:
    """Refuse lists without an entry for every token, and ids beyond the tokens."""
    for key in ("ggml.scores", "ggml.token_type"):
        if key in fields and len(fields[key]) != words:
            raise _damaged(path, key, fields[key], f"{words} numbers, one for each token")
    for key in (f"ggml.{name}_token_id" for name in IDS):
        if not 0 <= fields.get(key, 0) < words:
            raise _damaged(path, key, fields[key], f"the number of one of {words} tokens")


def _is(value: Any, should: type | tuple[type, type]) -> bool:
    if isinstance(should, tuple):
        return isinstance(value, list) and all(type(entry) is should[1] for entry in value)
    return type(value) is should


def _damaged(path: Path, key: str, value: Any, should: str) -> BillhookError:
    return BillhookError(f"{path}: field tokenizer.{key} is {shown(value)}, and should be {should}: {AGAIN}")


def _templates(fields: Mapping[str, Any]) -> str | dict[str, str] | None:
    """The chat template, or several by name."""
    default = fields.get("chat_template")
    named = {key.removeprefix(NAMED_TEMPLATE): text for key, text in fields.items() if key.startswith(NAMED_TEMPLATE)}
    return (({"default": default} if default else {}) | named) if named else default
