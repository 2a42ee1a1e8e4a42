"""What the files of a folder hold of a model: one list of tensors, by which it is opened whole and page by page alike."""

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from billhook.checkpoints.shards import AGAIN, STORED, Stored, main_dtype, stored
from billhook.checkpoints.tensor_names import loaded_as, stored_as
from billhook.errors import BillhookError
from billhook.models.experts import unfuse

ROWS = 1024  # of two tables, compared at a time
WRAPPED = re.compile(r"^((module|base_model\.model)\.)+|(?<![^.])_orig_mod\.")  # what training puts before a name


@dataclass(frozen=True)
class Contents:
    """Which stored tensors a model is made of."""

    path: Path
    name: str  # of the model, for messages
    config: Any  # of transformers; says what the tensors are
    tensors: dict[str, Stored]  # all that are used, by the names that transformers knows
    keys: dict[str, str]  # name in `tensors` of each tensor of the model, its experts apart; tied ones share theirs
    joined: str  # a tensor of the model that is stored in one with others, or ''
    unused: tuple[str, ...]  # stored, and nothing that the model has, or had in older releases of transformers
    rules: list[Any]  # of transformers, by which names differ

    @property
    def dtype(self) -> torch.dtype:
        """That most of the weights are stored in."""
        return main_dtype(self.tensors.values())


def contents(path: Path, name: str, config: Any, build: Callable[[Any], Any]) -> Contents:
    """What a folder holds of the model of a config.

    Where tensors that the config ties are stored apart and differ, the config is told that they are not tied.

    Args:
        build: the model of a config, without weights.

    Raises:
        BillhookError: a tensor is missing, of another shape than the model's, or of no dtype that weights have; or the files are damaged.
    """
    model = build(config)
    held = _unwrapped(stored(path, name), model)
    loaded, stock = loaded_as(model, held), model.state_dict()
    unfuse(model)
    own = model.state_dict(keep_vars=True)
    fused = {one: meta for one, meta in stock.items() if one not in own}  # experts, as the stock class joins them
    names = loaded.names | _stored_names(model, held, loaded.names)
    found = {one: list(dict.fromkeys(names[n] for n in group if n in names)) for one, group in _tied(own).items()}
    if config.tie_word_embeddings and not all(
        _equal([held[key] for key in there]) for there in found.values() if there
    ):
        config.tie_word_embeddings = False
        return contents(path, name, config, build)
    keys = {one: there[0] for one, there in found.items() if there}
    known = {key for there in found.values() for key in there}
    whole = {one: names[one] for one in fused if one in names}
    strays = {key: target for key, target in loaded.merged.items() if key not in known}
    places = tuple({one.rpartition(".")[0] + "." for one in (*whole, *strays.values())})
    joined = [one for one in own if one not in keys and one.startswith(places)]
    lost = [one for one in own if one not in keys and one not in joined]
    _check_shapes(name, lost, {**own, **fused}, {one: held[key] for one, key in {**keys, **whole}.items()}, model)
    if strays and not joined:
        raise BillhookError(
            f"{name}: {len(strays)} tensors have no place in the model that config.json describes, first {min(strays)}: {AGAIN}"
        )
    used = {key: held[key] for key in held if key in known or key in strays or key in whole.values()}
    if strange := {one.dtype for one in used.values()} - set(STORED):
        raise BillhookError(
            f"{name} stores weights as {', '.join(sorted(strange))}: dequantise to float32, bfloat16 or float16 first"
        )
    gone = re.compile("|".join(_outlived(model)))
    unused = tuple(key for key in held if key not in used and not gone.search(key))
    return Contents(path, name, config, used, keys, joined[0] if joined else "", unused, loaded.rules)


def _unwrapped(held: Mapping[str, Stored], model: Any) -> dict[str, Stored]:
    """Tensors under the names that they had before a wrapper of training put its own before them; a plain one comes first."""
    found: dict[str, Stored] = {}
    own = model.state_dict()
    for key in sorted(held, key=len):
        found.setdefault(key if key in own else WRAPPED.sub("", key), held[key])
    return {name: found[name] for name in sorted(found)}


def _stored_names(model: Any, held: Mapping[str, Stored], loaded: Mapping[str, str]) -> dict[str, str]:
    """The stored name of each tensor that transformers would save under a name of its own, and that `loaded` lacks."""
    within, found = f"{model.base_model_prefix}.", dict[str, str]()
    for one, key in stored_as(model).items():
        there = [written for written in (key, key.removeprefix(within)) if written in held]  # as older folders have it
        if there and one not in loaded:
            found[one] = there[0]
    return found


def _tied(own: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """For each tensor of a model all names that it has, its own first ones first."""
    groups: dict[int, list[str]] = defaultdict(list)
    for one, meta in own.items():
        groups[id(meta)].append(one)
    return {one: groups[id(meta)] for one, meta in own.items()}


def _equal(copies: Iterable[Stored]) -> bool:
    """Whether stored tensors are the same numbers."""
    first, *others = copies
    return all(first.shape == other.shape and _equal_rows(first, other) for other in others)


def _equal_rows(a: Stored, b: Stored) -> bool:
    with safe_open(a.file, framework="pt") as one, safe_open(b.file, framework="pt") as other:
        left, right = one.get_slice(a.key), other.get_slice(b.key)
        starts = range(0, a.shape[0], ROWS)
        return all(
            torch.equal(
                *(rows[n : n + ROWS].to(torch.promote_types(left[:0].dtype, right[:0].dtype)) for rows in (left, right))
            )
            for n in starts
        )


def _check_shapes(
    name: str, lost: list[str], own: Mapping[str, Tensor], there: Mapping[str, Stored], model: Any
) -> None:
    """Refuse tensors that are not there, or not of the model's shape."""
    other = [one for one, tensor in there.items() if tensor.shape != tuple(own[one].shape)]
    if not (wrong := lost + other):
        return
    first, what, remedy = wrong[0], "", AGAIN
    if not lost:
        shape, expected = there[first].shape, tuple(own[first].shape)
        what = f" ({_times(shape)} stored, {_times(expected)} by config.json)"
        table = model.get_input_embeddings().weight.shape
        if expected == tuple(table) and shape[1:] == expected[1:]:
            remedy = f"if the embedding was resized without its config, set vocab_size to {shape[0]} there"
    raise BillhookError(
        f"{name}: {len(wrong)} tensors are missing or of another shape than config.json says, first {first}{what}: {remedy}"
    )


def _times(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


def _outlived(model: Any) -> list[str]:
    """Patterns of what older releases stored and newer ones compute, which transformers passes over without a word."""
    buffers = [one for one, _ in model.named_buffers()]
    computed = [
        rf"{part}$"
        for part in (r"rotary_emb\.inv_freq", "position_ids")
        if any(map(re.compile(rf"{part}$").search, buffers))
    ]
    return [*(model._keys_to_ignore_on_load_unexpected or ()), *computed, "(?!)"]
