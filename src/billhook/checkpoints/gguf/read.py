"""A GGUF as a transformers model: every field and tensor of the file is used, or refused by name.

What a file of an architecture means is in tables (checkpoints/gguf/architectures.py).  Sizes are compared with the tensors before a model is built.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from billhook.checkpoints.gguf.architectures import ALWAYS, NOTHING, READINGS, Reading
from billhook.checkpoints.gguf.file import AGAIN, Gguf, Placed, read, shown
from billhook.checkpoints.gguf.rope import FACTORS, LINEAR, LONG_FACTORS, SCALING_TYPES, SHORT_FACTORS, parameters
from billhook.checkpoints.gguf.tokenizer import tokenizer_of
from billhook.checkpoints.streaming import bare
from billhook.errors import BillhookError
from billhook.models import layout
from billhook.models.families import family_of
from billhook.models.modeling_per_layer import MODEL_TYPE
from billhook.runtime.offload import finite
from billhook.runtime.quiet import quiet_transformers

ARCHITECTURE = "general.architecture"
FOLDER = "give the model's folder instead"
Values = dict[str, Any]


@dataclass(frozen=True)
class Sizes:
    """Of one layer."""

    width: int
    heads: int
    kv_heads: int
    head_dim: int


class Said:
    """The fields under the architecture's name: each is asked for once, and what nobody asked for is refused."""

    def __init__(self, path: Path, arch: str, fields: Mapping[str, Any]) -> None:
        self.path, self.arch = path, arch
        self.rest = {key.removeprefix(f"{arch}."): one for key, one in fields.items() if key.startswith(f"{arch}.")}

    def whole(self, key: str, default: int | None = None) -> int:
        """A number above zero."""
        found = self.take(key, default)
        if not _is_whole(found):
            self.wrong(key, found, "a whole number above 0")
        return found

    def each(self, key: str, layers: int, default: list[int] | None = None) -> list[int]:
        """A number above zero for every layer: one for all, or a list."""
        found = self.take(key, default)
        found = [found] * layers if not isinstance(found, list) else found
        if len(found) != layers or not all(map(_is_whole, found)):
            self.wrong(key, found, f"a whole number above 0, or one for each of {layers} layers")
        return found

    def real(self, key: str, default: float | None = None) -> float:
        """A number that is finite."""
        found = self.take(key, default)
        if isinstance(found, bool) or not isinstance(found, int | float) or not math.isfinite(found):
            self.wrong(key, found, "a number")
        return float(found)

    def text(self, key: str, default: str) -> str:
        found = self.take(key, default)
        return found if isinstance(found, str) else self.wrong(key, found, "a text")

    def take(self, key: str, default: Any = None) -> Any:
        found = self.rest.pop(key, default)
        if found is None:
            raise BillhookError(f"{self.path}: field {self.arch}.{key} is missing: {AGAIN}")
        return found

    def wrong(self, key: str, found: Any, should: str) -> NoReturn:
        raise BillhookError(f"{self.path}: field {self.arch}.{key} is {shown(found)}, and should be {should}: {AGAIN}")

    def no_more(self) -> None:
        """Refuse what is left, but for what changes nothing."""
        for key, found in self.rest.items():
            usual = ALWAYS.get(key)
            if key not in NOTHING and (usual is None or type(found) is not type(usual) or found != usual):
                raise BillhookError(
                    f"{self.path}: field {self.arch}.{key} is {shown(found)}, which billhook does not read in this architecture: {FOLDER}"
                )


def open_gguf(path: Path) -> tuple[Any, Any]:
    """Model, in float32, and tokenizer of a GGUF file.

    Raises:
        BillhookError: it is damaged, of an architecture that billhook does not read, or says what no transformers model computes.
    """
    file = read(path)
    arch, reading = _reading(path, file.fields)
    layers = _by_layer(path, file.tensors)
    said = Said(path, arch, file.fields)
    values, sizes, used = _config(said, reading, file, len(layers))
    said.no_more()
    tokenizer = tokenizer_of(path, arch, file.fields)
    values |= _special(path, tokenizer, values["vocab_size"])
    config = _built(path, reading, values, sizes)
    places = _places(path, reading, config, file.tensors, sizes, used)
    try:
        model: Any = bare(config, torch.float32)
    except Exception as error:  # a config that the class refuses: transformers raises many kinds
        raise _unbuilt(path, error) from error
    _fill(model, places)
    model.config._name_or_path = str(path)
    model.config.architectures = [type(model).__name__]
    return model.eval().requires_grad_(False), tokenizer


def _reading(path: Path, fields: Mapping[str, Any]) -> tuple[str, Reading]:
    arch = fields.get(ARCHITECTURE)
    if fields.get("general.type", "model") != "model":
        raise BillhookError(
            f"{path} holds {shown(fields['general.type'])}, not a model: give the model that it goes with"
        )
    if not isinstance(arch, str) or arch not in READINGS:
        raise BillhookError(
            f"{path}: general.architecture is {shown(arch)}, and billhook reads GGUF of {', '.join(READINGS)}: {FOLDER}"
        )
    return arch, READINGS[arch]


def _by_layer(path: Path, tensors: Mapping[str, Placed]) -> list[int]:
    """The numbers of the layers, which must be all from 0."""
    found = {name.split(".")[1] for name in tensors if name.startswith("blk.")}
    numbers = sorted(int(one) for one in found if one.isdecimal() and len(one) < 7)
    if not numbers or numbers != list(range(len(found))):
        raise BillhookError(f"{path}: its tensors are of layers {shown(sorted(found))}, not of all from 0: {AGAIN}")
    return numbers


def _config(said: Said, reading: Reading, file: Gguf, layers: int) -> tuple[Values, list[Sizes], set[str]]:
    """Values of the config but for sizes that differ by layer, those, and the tensors that are used for it."""
    tensors, largest = file.tensors, max(max(one.shape) for one in file.tensors.values())
    if (blocks := said.whole("block_count")) != layers:
        said.wrong("block_count", blocks, f"the {layers} layers that there are tensors of")
    hidden = said.whole("embedding_length")
    heads = said.each("attention.head_count", layers)
    kv_heads = said.each("attention.head_count_kv", layers, heads)
    widths = said.each("feed_forward_length", layers)
    head_dim = said.whole("attention.key_length", max(1, hidden // max(heads)))
    if (value := said.whole("attention.value_length", head_dim)) != head_dim:
        said.wrong("attention.value_length", value, f"{head_dim}, as attention.key_length")
    for key, found in {
        "embedding_length": hidden,
        "attention.key_length": head_dim,
        "feed_forward_length": max(widths),
    }.items():
        if found > largest:
            said.wrong(key, found, f"at most {largest}, the largest side of a tensor")
    if (rotated := said.whole("rope.dimension_count", head_dim)) != head_dim:
        said.wrong("rope.dimension_count", rotated, f"{head_dim}, as the size of a head")
    embedding = tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise BillhookError(f"{said.path}: tensor token_embd.weight is missing: {AGAIN}")
    if (words := said.whole("vocab_size", embedding.shape[0])) != embedding.shape[0]:
        said.wrong("vocab_size", words, f"{embedding.shape[0]}, the rows of token_embd.weight")
    positions = said.whole("context_length")
    rope, used = _rope(said, reading, file, positions, head_dim)
    values = {
        "vocab_size": words,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "max_position_embeddings": positions,
        "rms_norm_eps": said.real("attention.layer_norm_rms_epsilon"),
        "rope_parameters": rope,
        "tie_word_embeddings": "output.weight" not in tensors,
        **{key: any(_in_layer(name) in names for name in tensors) for key, names in reading.biases.items()},
    }
    return values, [Sizes(*one, head_dim) for one in zip(widths, heads, kv_heads, strict=True)], used


def _rope(said: Said, reading: Reading, file: Gguf, positions: int, head_dim: int) -> tuple[Values, set[str]]:
    """rope_parameters, and the tensors that they come from."""
    base, kind = said.real("rope.freq_base", 10000.0), said.text("rope.scaling.type", LINEAR)
    if kind not in SCALING_TYPES:
        said.wrong("rope.scaling.type", kind, f"one of {', '.join(SCALING_TYPES)}")
    if base <= 0:
        said.wrong("rope.freq_base", base, "a number above 0")
    scaling = [key for key in said.rest if key.startswith("rope.scaling.") and key not in NOTHING]
    numbers = {key.removeprefix("rope.scaling."): said.real(key) for key in scaling}
    if "rope.scale_linear" in said.rest:  # its older name
        numbers.setdefault("factor", said.real("rope.scale_linear"))
    if numbers.get("factor", 0.0) < 0 or numbers.get("original_context_length", 1) < 1:
        said.wrong("rope.scaling", numbers, "numbers above 0")
    factors = {}
    if reading.factors:
        names = (FACTORS, SHORT_FACTORS, LONG_FACTORS)
        factors = {name: _values(name, file.tensors[name]) for name in names if name in file.tensors}
    for name, found in factors.items():
        if found.shape != (head_dim // 2,) or found.min() <= 0:
            raise BillhookError(f"{said.path}: tensor {name} is not {head_dim // 2} numbers above 0: {AGAIN}")
    try:
        return parameters(kind, base, numbers, positions, factors), set(factors)
    except ValueError as error:
        raise BillhookError(f"{said.path}: {error} is no rotary embedding that billhook reads: {FOLDER}") from None


def _special(path: Path, tokenizer: Any, rows: int) -> Values:
    """Ids of special tokens, which the config repeats."""
    if len(tokenizer) > rows:
        raise BillhookError(f"{path}: it has {len(tokenizer)} tokens, and {rows} rows of token_embd.weight: {AGAIN}")
    return {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}


def _built(path: Path, reading: Reading, values: Values, sizes: list[Sizes]) -> Any:
    """The plainest config that says these sizes."""
    keys, stock = family_of(reading.family).keys, reading.family
    own = [{keys[size]: getattr(one, size) for size in ("width", "heads", "kv_heads")} for one in sizes]
    values = values | {key: max(one[key] for one in own) for key in own[0]} | {keys["head_dim"]: sizes[0].head_dim}
    differing = [key for key in own[0] if len({one[key] for one in own}) > 1]
    if not differing:
        stand_in = family_of(stock).stand_in
        biased = any(values[key] for key in reading.biases)
        if (config := _stock(stock, values)) is not None:
            return config
        if stand_in and not biased and (config := _stock(stand_in, {**values, "sliding_window": None})) is not None:
            return config
    layout.register(kind := MODEL_TYPE.format(stock))
    per_layer = {str(n): {key: one[key] for key in differing} for n, one in enumerate(own)}
    try:
        return AutoConfig.for_model(kind, **values, per_layer_config=per_layer)
    except Exception as error:  # each transformers release raises its own validation errors
        raise _unbuilt(path, error) from error


def _stock(family: str, values: Values) -> Any:
    try:
        return AutoConfig.for_model(family, **values)
    except Exception:  # each transformers release raises its own validation errors
        return None


def _unbuilt(path: Path, error: Exception) -> BillhookError:
    return BillhookError(f"{path}: transformers could not build its model ({' '.join(str(error).split())}): {AGAIN}")


@dataclass(frozen=True)
class Place:
    """What one parameter of the model is made of."""

    shape: tuple[int, ...]
    tensors: dict[str, Placed]  # none: zeros
    make: Callable[[list[Tensor]], Tensor]


def _places(
    path: Path, reading: Reading, config: Any, tensors: Mapping[str, Placed], sizes: list[Sizes], used: set[str]
) -> dict[str, Place]:
    """What every parameter is made of; shapes are compared on the meta device, where a model takes no room."""
    try:
        with torch.device("meta"), quiet_transformers():
            model: Any = AutoModelForCausalLM.from_config(config)
    except Exception as error:  # a config that the class refuses: transformers raises many kinds
        raise _unbuilt(path, error) from error
    found, prefix = {}, family_of(config.model_type).layers + "."
    tied = set(model._tied_weights_keys or ()) if config.tie_word_embeddings else set()
    for name, param in model.state_dict(keep_vars=True).items():
        if name in tied:
            continue
        module, _, leaf = name.removeprefix(prefix).rpartition(".")
        number, _, inner = module.partition(".") if name.startswith(prefix) else ("", "", module)
        source = reading.sources.get(inner)
        within = f"blk.{number}." if number else ""
        names = [f"{within}{one}.{leaf}" for one in source.tensors] if source else []
        there = {one: tensors[one] for one in names if one in tensors}
        size = sizes[int(number or 0)]
        if len(there) < max(1, len(names)) and leaf != "bias":
            raise BillhookError(
                f"{path}: tensor {next((one for one in names if one not in there), name)} is missing: {AGAIN}"
            )
        make = _maker(source.how if source else "", size)
        used |= set(there)
        found[name] = Place(tuple(param.shape), there, make)
        shapes = [torch.empty(one.shape, device="meta") for one in there.values()]
        if there and (made := _shape(make, shapes)) != tuple(param.shape):
            raise BillhookError(
                f"{path}: tensor {names[0]} has shape {list(shapes[0].shape)}, and its fields say {list(param.shape)} of {name}: {AGAIN}"
                if made is None or len(there) == 1
                else f"{path}: tensors {', '.join(there)} do not make {name} of {list(param.shape)}: {AGAIN}"
            )
    if extra := [name for name in tensors if name not in used]:
        raise BillhookError(
            f"{path}: {len(extra)} tensors have no place in a {config.model_type} of transformers, first {extra[0]}: {FOLDER}"
        )
    return found


def _shape(make: Callable[[list[Tensor]], Tensor], parts: list[Tensor]) -> tuple[int, ...] | None:
    try:
        return tuple(make(parts).shape)
    except RuntimeError:  # rows that no number of heads divides
        return None


def _maker(how: str, size: Sizes) -> Callable[[list[Tensor]], Tensor]:
    return lambda parts: HOW[how](parts[0], size)


def _turned(rows: Tensor, heads: int) -> Tensor:
    """Rows of q or k from the order of interleaved RoPE: entries 2i and 2i+1 of a head to i and i + head_dim/2."""
    return rows.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def _rows(fused: Tensor, size: Sizes, part: str) -> Tensor:
    """Of q, k and v in one matrix, one below another."""
    ends = [size.heads * size.head_dim, *[size.kv_heads * size.head_dim] * 2]
    return fused.split(ends)["qkv".index(part)]


HOW: Mapping[str, Callable[[Tensor, Sizes], Tensor]] = {
    "as it is": lambda rows, size: rows,
    "turned q": lambda rows, size: _turned(rows, size.heads),
    "turned k": lambda rows, size: _turned(rows, size.kv_heads),
    "rows of q": lambda rows, size: _rows(rows, size, "q"),
    "rows of k": lambda rows, size: _rows(rows, size, "k"),
    "rows of v": lambda rows, size: _rows(rows, size, "v"),
}


def _fill(model: Any, places: Mapping[str, Place]) -> None:
    """Give a model that is on the meta device its weights."""
    filled = {}
    for name, place in places.items():
        parts = [_values(one, placed) for one, placed in place.tensors.items()]
        filled[name] = place.make(parts).contiguous() if parts else torch.zeros(place.shape)
    model.load_state_dict(filled, strict=False, assign=True)
    model.tie_weights()


def _values(name: str, placed: Placed) -> Tensor:
    found = placed.values()
    if not finite(found):
        raise BillhookError(f"{placed.file}: tensor {name} holds NaN or infinite values")
    return found


def _in_layer(name: str) -> str:
    """A tensor's name without the layer's number."""
    return name.split(".", 2)[2] if name.startswith("blk.") else name


def read_tokenizer(path: Path) -> Any:
    """The tokenizer of a GGUF file, its weights left where they are.

    Raises:
        BillhookError: the file is damaged, or has none that transformers can build.
    """
    fields = read(path).fields
    return tokenizer_of(path, _reading(path, fields)[0], fields)


def _is_whole(found: Any) -> bool:
    return isinstance(found, int) and not isinstance(found, bool) and found > 0
