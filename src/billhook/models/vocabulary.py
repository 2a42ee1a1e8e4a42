"""Vocabulary pruning: keep the tokens that a text needs, and cut tokenizer, embedding and head down to them.

That text is tokenised as before.  A BPE's merge stays if its parts and its result are all kept, and so is every
intermediate token of the text, so that each step finds the same best merge.  Any other text can still be encoded and
decoded without loss, in more tokens: the smallest ones, bytes or single symbols, all stay.
"""

import copy
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from itertools import chain, pairwise, product
from typing import Any

import torch
from torch import nn

from billhook.errors import ModelError
from billhook.models.families import row_of
from billhook.models.multimodal import within
from billhook.runtime.progress import Tick, quiet

BYTE = re.compile(r"<0x[0-9A-F]{2}>")
SPACE = "▁"  # SentencePiece's token of a space; its decoder does not take that from bytes
ID_KEYS = re.compile(r"(_token_ids?|suppress_tokens|_words_ids|sequence_bias)$")  # config keys that hold token ids
BY_LAYER = "hidden_size_per_layer_input"  # config key: width of what every token brings to each layer
CHATS = [[{"role": role, "content": "Hello"} for role in roles.split()] for roles in ("user", "system user assistant")]
Move = Callable[[int], int]
Ranks = dict[tuple[str, str], int]  # pair -> rank of its merge; BPE takes the lowest first


def trim(
    model: Any, tokenizer: Any, documents: Sequence[str], tick: Tick = quiet, *, at_least: int = 0, multiple_of: int = 1
) -> tuple[Any, dict[str, Any]]:
    """Cut `model`, in place, down to the vocabulary of `documents`.

    Returns:
        the trimmed tokenizer, and a record: embedding rows before and kept, parameters saved.

    Raises:
        BillhookError: an empty text, a tokenizer that cannot be trimmed, or one that belongs to another model.  The
            model is unchanged then.
    """
    if stands := within(model):
        raise ModelError(
            f"the vocabulary of {stands.model_type} cannot be trimmed: its processor names tokens by number"
        )
    if row_of(model).derived:
        raise ModelError(
            f"the vocabulary of {model.config.model_type} cannot be trimmed: its row is derived, and does not say which "
            "tensors have a row for each token"
        )
    if getattr(model.config, BY_LAYER, 0):
        raise ModelError(
            f"the vocabulary of {model.config.model_type} cannot be trimmed: it embeds every token once more for its layers"
        )
    tick("vocabulary", 0, 2)
    before, size = model.num_parameters(), model.get_input_embeddings().num_embeddings
    kept = occurring(tokenizer, documents, named_ids(model), at_least=at_least, multiple_of=multiple_of)
    if kept[-1] >= size:
        raise ModelError(
            f"the tokenizer has a token of id {kept[-1]}, beyond the model's vocabulary of {size}: it is another "
            "model's; copy the right one"
        )
    trimmed = trim_tokenizer(tokenizer, kept)
    for old, new in zip(_encode(tokenizer, documents), _encode(trimmed, documents), strict=True):
        if old != [kept[n] for n in new]:
            raise ModelError("the tokenizer cannot be trimmed: without its other tokens it splits the text anew")
    tick("vocabulary", 1, 2)
    trim_model(model, kept)
    tick("vocabulary", 2, 2)
    return trimmed, {"before": size, "kept": len(kept), "parameters_saved": before - model.num_parameters()}


def occurring(
    tokenizer: Any, documents: Sequence[str], also: Iterable[int] = (), *, at_least: int = 0, multiple_of: int = 1
) -> list[int]:
    """The ids to keep, ascending, so that `documents` are tokenised as before and any other text without loss.

    These are the tokens of the text and of a short chat, the intermediate tokens of their merges, special and added
    tokens, the smallest tokens, and `also`.  Others fill up to `at_least` tokens and a multiple of `multiple_of`, as
    far as there are any, the earliest merges first.

    Raises:
        BillhookError: no document holds a word, or the tokenizer is not a fast BPE.
    """
    if not any(document.strip() for document in documents):
        raise ModelError("the text to take the vocabulary from is empty: give one like those the model is for")
    state = _state(tokenizer)
    vocab = state["model"]["vocab"]
    names = {n: token for token, n in vocab.items()}
    ranks: Ranks = {(left, right): rank for rank, (left, right) in enumerate(state["model"]["merges"])}

    def steps(n: int) -> set[int]:
        return {vocab[step] for step in _steps(names[n], ranks) if step in vocab} if n in names else {n}

    ids_of_text = {n for ids in _encode(tokenizer, [*documents, *_chats(tokenizer)]) for n in ids}
    kept = {*also}.union(_special(tokenizer, state), (vocab[token] for token in _smallest(state["model"])))
    kept = kept.union(*map(steps, ids_of_text))
    spare = -(-max(at_least, len(kept)) // multiple_of) * multiple_of - len(kept)
    for n in chain((vocab["".join(pair)] for pair in ranks), sorted(names)):
        if not spare:
            break
        new = set() if n in kept else steps(n) - kept
        if len(new) <= spare:
            kept |= new
            spare -= len(new)
    return sorted(kept)


def trim_tokenizer(tokenizer: Any, kept: Sequence[int]) -> Any:
    """A tokenizer of the same class with the tokens `kept` alone, renumbered in their old order.

    Raises:
        BillhookError: the tokenizer is not a fast BPE, or numbers its tokens in a way that cannot be kept.
    """
    state, new = _state(tokenizer), {old: n for n, old in enumerate(kept)}
    model = state["model"]
    model["vocab"] = {token: new[n] for token, n in model["vocab"].items() if n in new}
    model["merges"] = [pair for pair in model["merges"] if {*pair, "".join(pair)} <= model["vocab"].keys()]
    _move_ids(state, new.__getitem__)
    trimmed = copy.deepcopy(tokenizer)
    trimmed._tokenizer = type(tokenizer.backend_tokenizer).from_str(json.dumps(state))
    if trimmed.get_vocab() != {token: new[n] for token, n in tokenizer.get_vocab().items() if n in new}:
        raise ModelError("the tokenizer cannot be trimmed: its added tokens are not numbered in order")
    return trimmed


@torch.no_grad()
def trim_model(model: Any, kept: Sequence[int]) -> None:
    """Keep the rows `kept` of the embedding and the head, in place; tied stays tied, and ids in the configs follow.

    `kept` is ascending and holds the ids that the configs name (`named_ids`).
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    new = {old: n for n, old in enumerate(kept)}
    tied = head.weight is embedding.weight
    embedding.weight, embedding.num_embeddings = _rows(embedding.weight, kept), len(kept)
    if embedding.padding_idx is not None:
        embedding.padding_idx = new.get(embedding.padding_idx)
    head.weight, head.out_features = embedding.weight if tied else _rows(head.weight, kept), len(kept)
    head.bias = None if head.bias is None else _rows(head.bias, kept)
    for config, key, value in _named(model):
        setattr(config, key, _move(value, lambda n: new.get(n, n)))  # -1 and others beyond the vocabulary stay beyond
    for owner in (model.config, *model.modules()):
        if getattr(owner, "vocab_size", None) is not None:
            owner.vocab_size = len(kept)


def named_ids(model: Any) -> set[int]:
    """Token ids that the configs name and the model has an embedding for."""
    ids: set[int] = set()
    for _, _, value in _named(model):
        _move(value, lambda n: ids.add(n) or n)
    return {n for n in ids if 0 <= n < model.get_input_embeddings().num_embeddings}


def growth(original: Any, trimmed: Any, documents: Sequence[str]) -> float:
    """How many more tokens a text has with `trimmed` than with `original`, as a share of the latter."""
    before, after = (sum(map(len, _encode(tokenizer, documents))) for tokenizer in (original, trimmed))
    return after / before - 1 if before else 0.0


def share_as_bytes(original: Any, trimmed: Any, documents: Sequence[str]) -> float:
    """Share of characters, without spaces,
    that `trimmed` encodes in single bytes or symbols and `original` does not."""
    text = "\n\n".join(documents)
    letters = [not letter.isspace() for letter in text]
    solid = zip(letters, _in_words(original, text), _in_words(trimmed, text), strict=True)
    return sum(letter and before and not after for letter, before, after in solid) / max(sum(letters), 1)


def _in_words(tokenizer: Any, text: str) -> bytearray:
    """For each character, 1 if its token is not one of the smallest."""
    model, flags = _state(tokenizer)["model"], bytearray(len(text))
    small = {model["vocab"][token] for token in _smallest(model)}
    coded = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False)
    for n, (start, end) in zip(coded.ids, coded.offsets, strict=True):
        if n not in small:
            flags[start:end] = b"\1" * (end - start)
    return flags


def _state(tokenizer: Any) -> dict[str, Any]:
    """The content of the tokenizer's tokenizer.json."""
    if not getattr(tokenizer, "is_fast", False):
        raise ModelError(
            f"the vocabulary of a slow tokenizer ({type(tokenizer).__name__}) cannot be trimmed: give the model a "
            "tokenizer.json"
        )
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    model = state["model"]
    if model["type"] != "BPE" or model["continuing_subword_prefix"] or model["end_of_word_suffix"]:
        kind = "BPE with marked word ends" if model["type"] == "BPE" else model["type"]
        raise ModelError(f"the vocabulary of a tokenizer of type {kind} cannot be trimmed: only that of a plain BPE")
    return state


def _steps(token: str, ranks: Ranks) -> set[str]:
    """Every symbol on BPE's way from single characters to `token`, the best merge first.

    The characters around a token change none of these steps, or it would not be a token of that word.
    """
    symbols, passed = [*token], {token, *token}
    while merges := [(ranks[pair], n) for n, pair in enumerate(pairwise(symbols)) if pair in ranks]:
        position = min(merges)[1]
        symbols[position : position + 2] = ["".join(symbols[position : position + 2])]
        passed.add(symbols[position])
    return passed


def _smallest(model: dict[str, Any]) -> set[str]:
    """The tokens that can encode any text: bytes, if there is a token for each, else single symbols."""
    bytes_known = {token for token in model["vocab"] if BYTE.fullmatch(token)}
    if model["byte_fallback"] and len(bytes_known) == 256:
        return bytes_known | ({SPACE} & model["vocab"].keys())
    return {token for token in model["vocab"] if len(token) == 1}


def _special(tokenizer: Any, state: dict[str, Any]) -> set[int]:
    """Ids of special and added tokens, and all others that the tokenizer names by id."""
    ids = {*tokenizer.all_special_ids, state["model"]["vocab"].get(state["model"]["unk_token"])}
    _move_ids(state, lambda n: ids.add(n) or n)
    return ids - {None}


def _move_ids(state: dict[str, Any], move: Move) -> None:
    """Renumber, in place, the ids in a tokenizer.json outside its vocabulary."""
    for token in state["added_tokens"]:
        token["id"] = move(token["id"])
    if state["padding"]:
        state["padding"]["pad_id"] = move(state["padding"]["pad_id"])
    processor = state["post_processor"] or {}
    for part in processor.get("processors", [processor]):
        for special in part.get("special_tokens", {}).values():
            special["ids"] = _move(special["ids"], move)
        for key in part.keys() & {"sep", "cls"}:
            part[key] = _move(part[key], move)


def _move(value: Any, move: Move) -> Any:
    """Renumber an id, or the ids in a list of any depth."""
    if isinstance(value, list):
        return [_move(item, move) for item in value]
    return move(value) if isinstance(value, int) else value


def _named(model: Any) -> list[tuple[Any, str, Any]]:
    """(config, key, value) of every setting that holds token ids."""
    configs = [config for config in (model.config, model.generation_config) if config is not None]
    return [(config, key, value) for config in configs for key, value in vars(config).items() if ID_KEYS.search(key)]


def _chats(tokenizer: Any) -> Iterator[str]:
    """Short chats, written by the tokenizer's chat templates."""
    templates = tokenizer.chat_template or {}
    for jinja, chat in product(templates.values() if isinstance(templates, dict) else [templates], CHATS):
        with suppress(Exception):  # a template is a program, and refuses a role in a way of its own
            yield tokenizer.apply_chat_template(chat, chat_template=jinja, tokenize=False, add_generation_prompt=True)


def _encode(tokenizer: Any, documents: Sequence[str]) -> list[list[int]]:
    return tokenizer(list(documents), add_special_tokens=False, verbose=False).input_ids


def _rows(param: nn.Parameter, kept: Sequence[int]) -> nn.Parameter:
    index = torch.tensor(kept, device=param.device)
    return nn.Parameter(param.detach().index_select(0, index), param.requires_grad)
