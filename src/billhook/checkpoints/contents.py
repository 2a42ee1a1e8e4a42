"""Which tensors of a folder's files a model is made of; the model is opened by this list, whole or layer by layer."""

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from billhook.checkpoints.around import decoder_tensors
from billhook.checkpoints.shards import AGAIN, STORED, Stored, main_dtype, read_json
from billhook.checkpoints.tensor_names import loaded_as, stored_as
from billhook.errors import ModelError
from billhook.models.experts import unfuse
from billhook.models.multimodal import Around, around

ROWS = 1024  # rows of two tensors that are compared at a time
WRAPPED = re.compile(r"^((module|base_model\.model)\.)+|(?<![^.])_orig_mod\.")  # prefixes that training wrappers add


@dataclass(frozen=True)
class Contents:
    """Which stored tensors a model is made of."""

    path: Path
    name: str  # the model's name, for messages
    config: Any  # transformers' config; says what the tensors are
    tensors: dict[str, Stored]  # all tensors that are used, by the names that transformers knows
    keys: dict[str, str]  # for each tensor of the model, experts one by one, its name in `tensors`; tied ones share one
    joined: str  # the first tensor of the model that is stored together with others; '' if none is
    unused: tuple[str, ...]  # stored tensors that the model neither has nor had in older releases of transformers
    rules: list[Any]  # transformers' rules by which names on disk differ

    @property
    def around(self) -> Around | None:
        """What the model is the text decoder of."""
        return around(read_json(self.path / "config.json", self.name))

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that most of the weights are stored in."""
        return main_dtype(self.tensors.values())


def contents(path: Path, name: str, config: Any, build: Callable[[Any], Any]) -> Contents:
    """The tensors in a folder of the model that a config describes.

    Where tensors that the config ties are stored apart and differ, the config is changed to say that they are not tied.

    Args:
        build: makes the model of a config, without weights.

    Raises:
        BillhookError: a tensor is missing, of another shape than the model's, or of a dtype that weights do not have;
            or the files are damaged.
    """
    model = build(config)
    on_disk = _unwrapped(decoder_tensors(path, name), model)
    loaded, stock = loaded_as(model, on_disk), model.state_dict()
    unfuse(model)
    state = model.state_dict(keep_vars=True)
    # experts, as the stock class joins them
    fused = {tensor: meta for tensor, meta in stock.items() if tensor not in state}
    names = loaded.names | _stored_names(model, on_disk, loaded.names)
    copies = {
        tensor: list(dict.fromkeys(names[alias] for alias in aliases if alias in names))
        for tensor, aliases in _tied(state).items()
    }
    if config.tie_word_embeddings and not all(
        _equal([on_disk[key] for key in keys]) for keys in copies.values() if keys
    ):
        config.tie_word_embeddings = False
        return contents(path, name, config, build)
    keys = {tensor: stored_keys[0] for tensor, stored_keys in copies.items() if stored_keys}
    used_keys = {key for stored_keys in copies.values() for key in stored_keys}
    fused_keys = {tensor: names[tensor] for tensor in fused if tensor in names}
    strays = {key: target for key, target in loaded.merged.items() if key not in used_keys}
    prefixes = tuple({tensor.rpartition(".")[0] + "." for tensor in (*fused_keys, *strays.values())})
    joined = [tensor for tensor in state if tensor not in keys and tensor.startswith(prefixes)]
    lost = [tensor for tensor in state if tensor not in keys and tensor not in joined]
    shapes = {tensor: on_disk[key] for tensor, key in {**keys, **fused_keys}.items()}
    _check_shapes(name, lost, {**state, **fused}, shapes, model)
    if strays and not joined:
        raise ModelError(
            f"{name}: {len(strays)} tensors have no place in the model that config.json describes, first "
            f"{min(strays)}: "
            f"{AGAIN}"
        )
    used = {key: on_disk[key] for key in on_disk if key in used_keys or key in strays or key in fused_keys.values()}
    if strange := {tensor.dtype for tensor in used.values()} - set(STORED):
        raise ModelError(
            f"{name} stores weights as {', '.join(sorted(strange))}: dequantise to float32, bfloat16 or float16 first"
        )
    obsolete = re.compile("|".join(_obsolete(model)))
    unused = tuple(key for key in on_disk if key not in used and not obsolete.search(key))
    return Contents(path, name, config, used, keys, joined[0] if joined else "", unused, loaded.rules)


def _unwrapped(on_disk: Mapping[str, Stored], model: Any) -> dict[str, Stored]:
    """Tensors by their names without the prefixes of training wrappers; a tensor that has no prefix wins."""
    tensors: dict[str, Stored] = {}
    names = model.state_dict()
    for key in sorted(on_disk, key=len):
        tensors.setdefault(key if key in names else WRAPPED.sub("", key), on_disk[key])
    return {name: tensors[name] for name in sorted(tensors)}


def _stored_names(model: Any, on_disk: Mapping[str, Stored], loaded: Mapping[str, str]) -> dict[str, str]:
    """The stored name of each tensor that transformers would save under another name, and that `loaded` lacks."""
    prefix, names = f"{model.base_model_prefix}.", dict[str, str]()
    for tensor, key in stored_as(model).items():
        # older folders lack the prefix
        written = next((name for name in (key, key.removeprefix(prefix)) if name in on_disk), None)
        if written is not None and tensor not in loaded:
            names[tensor] = written
    return names


def _tied(tensors: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """For each tensor's name, all names of that tensor, the first one first."""
    groups: dict[int, list[str]] = defaultdict(list)
    for name, tensor in tensors.items():
        groups[id(tensor)].append(name)
    return {name: groups[id(tensor)] for name, tensor in tensors.items()}


def _equal(copies: Iterable[Stored]) -> bool:
    """Whether stored tensors hold the same numbers."""
    first, *others = copies
    return all(first.shape == other.shape and _equal_rows(first, other) for other in others)


def _equal_rows(a: Stored, b: Stored) -> bool:
    with safe_open(a.file, framework="pt") as first, safe_open(b.file, framework="pt") as second:
        left, right = first.get_slice(a.key), second.get_slice(b.key)
        dtype = torch.promote_types(left[:0].dtype, right[:0].dtype)
        return all(
            torch.equal(left[n : n + ROWS].to(dtype), right[n : n + ROWS].to(dtype)) for n in range(0, a.shape[0], ROWS)
        )


def _check_shapes(
    name: str, lost: list[str], tensors: Mapping[str, Tensor], on_disk: Mapping[str, Stored], model: Any
) -> None:
    """Refuse tensors that are missing, or not of the model's shape."""
    misshapen = [tensor for tensor, entry in on_disk.items() if entry.shape != tuple(tensors[tensor].shape)]
    if not (wrong := lost + misshapen):
        return
    first, what, remedy = wrong[0], "", AGAIN
    if not lost:
        shape, expected = on_disk[first].shape, tuple(tensors[first].shape)
        what = f" ({_times(shape)} stored, {_times(expected)} by config.json)"
        table = model.get_input_embeddings().weight.shape
        if expected == tuple(table) and shape[1:] == expected[1:]:
            remedy = f"if the embedding was resized without its config, set vocab_size to {shape[0]} there"
    raise ModelError(
        f"{name}: {len(wrong)} tensors are missing or of another shape than config.json says, first {first}{what}: "
        f"{remedy}"
    )


def _times(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


def _obsolete(model: Any) -> list[str]:
    """Patterns of tensors that older releases stored and newer ones compute; transformers silently ignores them."""
    buffers = [name for name, _ in model.named_buffers()]
    computed = [
        rf"{part}$"
        for part in (r"rotary_emb\.inv_freq", "position_ids")
        if any(map(re.compile(rf"{part}$").search, buffers))
    ]
    return [*(model._keys_to_ignore_on_load_unexpected or ()), *computed, "(?!)"]
