"""A GGUF as a transformers model: every field and tensor of the file is used, or refused by name.

The meaning of a file is in tables by architecture (checkpoints/gguf/architectures.py).  Sizes are compared with the
tensors before a model is built.
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
from billhook.errors import BillhookError, ModelError
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
    """The sizes of one layer."""

    width: int
    heads: int
    kv_heads: int
    head_dim: int


class ArchitectureFields:
    """The fields under the architecture's name: each is taken once, and those that nothing takes are refused."""

    def __init__(self, path: Path, arch: str, fields: Mapping[str, Any]) -> None:
        self.path, self.arch = path, arch
        prefix = f"{arch}."
        self.rest = {key.removeprefix(prefix): value for key, value in fields.items() if key.startswith(prefix)}

    def whole(self, key: str, default: int | None = None) -> int:
        """A number above zero."""
        value = self.take(key, default)
        if not _is_whole(value):
            self.wrong(key, value, "a whole number above 0")
        return value

    def each(self, key: str, layers: int, default: list[int] | None = None) -> list[int]:
        """A number above zero for every layer; the file has one for all, or a list."""
        value = self.take(key, default)
        values = value if isinstance(value, list) else [value] * layers
        if len(values) != layers or not all(map(_is_whole, values)):
            self.wrong(key, values, f"a whole number above 0, or one for each of {layers} layers")
        return values

    def real(self, key: str, default: float | None = None) -> float:
        """A number that is finite."""
        value = self.take(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            self.wrong(key, value, "a number")
        return float(value)

    def text(self, key: str, default: str) -> str:
        value = self.take(key, default)
        return value if isinstance(value, str) else self.wrong(key, value, "a text")

    def take(self, key: str, default: Any = None) -> Any:
        value = self.rest.pop(key, default)
        if value is None:
            raise ModelError(f"{self.path}: field {self.arch}.{key} is missing: {AGAIN}")
        return value

    def wrong(self, key: str, value: Any, should: str) -> NoReturn:
        raise ModelError(f"{self.path}: field {self.arch}.{key} is {shown(value)}, and should be {should}: {AGAIN}")

    def no_more(self) -> None:
        """Refuse fields that are left, except those that change nothing."""
        for key, value in self.rest.items():
            usual = ALWAYS.get(key)
            if key not in NOTHING and (usual is None or type(value) is not type(usual) or value != usual):
                raise ModelError(
                    f"{self.path}: field {self.arch}.{key} is {shown(value)}, which billhook does not read in this "
                    f"architecture: {FOLDER}"
                )


def open_gguf(path: Path) -> tuple[Any, Any]:
    """Model, in float32, and tokenizer of a GGUF file.

    Raises:
        BillhookError: it is damaged, of an architecture that billhook does not read, or asks for what no transformers
            model computes.
    """
    file = read(path)
    arch, reading = _reading(path, file.fields)
    layers = _by_layer(path, file.tensors)
    fields = ArchitectureFields(path, arch, file.fields)
    values, sizes, used = _config(fields, reading, file, len(layers))
    fields.no_more()
    tokenizer = tokenizer_of(path, arch, file.fields)
    values |= _special(path, tokenizer, values["vocab_size"])
    config = _config_of(path, reading, values, sizes)
    params = _params(path, reading, config, file.tensors, sizes, used)
    try:
        model: Any = bare(config, torch.float32)
    except Exception as error:  # the class refuses the config; transformers raises many kinds
        raise _unbuilt(path, error) from error
    _fill(model, params)
    model.config._name_or_path = str(path)
    model.config.architectures = [type(model).__name__]
    return model.eval().requires_grad_(False), tokenizer


def _reading(path: Path, fields: Mapping[str, Any]) -> tuple[str, Reading]:
    arch = fields.get(ARCHITECTURE)
    if fields.get("general.type", "model") != "model":
        raise ModelError(f"{path} holds {shown(fields['general.type'])}, not a model: give the model that it goes with")
    if not isinstance(arch, str) or arch not in READINGS:
        raise ModelError(
            f"{path}: general.architecture is {shown(arch)}, and billhook reads GGUF of {', '.join(READINGS)}: {FOLDER}"
        )
    return arch, READINGS[arch]


def _by_layer(path: Path, tensors: Mapping[str, Placed]) -> list[int]:
    """The numbers of the layers, which must run from 0 without gaps."""
    texts = {name.split(".")[1] for name in tensors if name.startswith("blk.")}
    numbers = sorted(int(text) for text in texts if text.isdecimal() and len(text) < 7)
    if not numbers or numbers != list(range(len(texts))):
        raise ModelError(f"{path}: its tensors are of layers {shown(sorted(texts))}, not of all from 0: {AGAIN}")
    return numbers


def _config(
    fields: ArchitectureFields, reading: Reading, file: Gguf, layers: int
) -> tuple[Values, list[Sizes], set[str]]:
    """Values of the config, the sizes of each layer, and the tensors that were read for them."""
    tensors, largest = file.tensors, max(max(placed.shape) for placed in file.tensors.values())
    if (blocks := fields.whole("block_count")) != layers:
        fields.wrong("block_count", blocks, f"the {layers} layers that there are tensors of")
    hidden = fields.whole("embedding_length")
    heads = fields.each("attention.head_count", layers)
    kv_heads = fields.each("attention.head_count_kv", layers, heads)
    widths = fields.each("feed_forward_length", layers)
    head_dim = fields.whole("attention.key_length", max(1, hidden // max(heads)))
    if (value := fields.whole("attention.value_length", head_dim)) != head_dim:
        fields.wrong("attention.value_length", value, f"{head_dim}, as attention.key_length")
    lengths = {"embedding_length": hidden, "attention.key_length": head_dim, "feed_forward_length": max(widths)}
    for key, length in lengths.items():
        if length > largest:
            fields.wrong(key, length, f"at most {largest}, the largest side of a tensor")
    if (rotated := fields.whole("rope.dimension_count", head_dim)) != head_dim:
        fields.wrong("rope.dimension_count", rotated, f"{head_dim}, as the size of a head")
    embedding = tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise ModelError(f"{fields.path}: tensor token_embd.weight is missing: {AGAIN}")
    if (words := fields.whole("vocab_size", embedding.shape[0])) != embedding.shape[0]:
        fields.wrong("vocab_size", words, f"{embedding.shape[0]}, the rows of token_embd.weight")
    positions = fields.whole("context_length")
    rope, used = _rope(fields, reading, file, positions, head_dim)
    values = {
        "vocab_size": words,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "max_position_embeddings": positions,
        "rms_norm_eps": fields.real("attention.layer_norm_rms_epsilon"),
        "rope_parameters": rope,
        "tie_word_embeddings": "output.weight" not in tensors,
        **{key: any(_in_layer(name) in names for name in tensors) for key, names in reading.biases.items()},
    }
    return values, [Sizes(*sizes, head_dim) for sizes in zip(widths, heads, kv_heads, strict=True)], used


def _rope(
    fields: ArchitectureFields, reading: Reading, file: Gguf, positions: int, head_dim: int
) -> tuple[Values, set[str]]:
    """rope_parameters, and the tensors that they come from."""
    base, kind = fields.real("rope.freq_base", 10000.0), fields.text("rope.scaling.type", LINEAR)
    if kind not in SCALING_TYPES:
        fields.wrong("rope.scaling.type", kind, f"one of {', '.join(SCALING_TYPES)}")
    if base <= 0:
        fields.wrong("rope.freq_base", base, "a number above 0")
    scaling = [key for key in fields.rest if key.startswith("rope.scaling.") and key not in NOTHING]
    numbers = {key.removeprefix("rope.scaling."): fields.real(key) for key in scaling}
    if "rope.scale_linear" in fields.rest:  # the older name of the factor
        numbers.setdefault("factor", fields.real("rope.scale_linear"))
    if numbers.get("factor", 0.0) < 0 or numbers.get("original_context_length", 1) < 1:
        fields.wrong("rope.scaling", numbers, "numbers above 0")
    factors = {}
    if reading.factors:
        names = (FACTORS, SHORT_FACTORS, LONG_FACTORS)
        factors = {name: _values(name, file.tensors[name]) for name in names if name in file.tensors}
    for name, factor in factors.items():
        if factor.shape != (head_dim // 2,) or factor.min() <= 0:
            raise ModelError(f"{fields.path}: tensor {name} is not {head_dim // 2} numbers above 0: {AGAIN}")
    try:
        return parameters(kind, base, numbers, positions, factors), set(factors)
    except ValueError as error:
        raise ModelError(f"{fields.path}: {error} is no rotary embedding that billhook reads: {FOLDER}") from None


def _special(path: Path, tokenizer: Any, rows: int) -> Values:
    """Ids of special tokens, for the config."""
    if len(tokenizer) > rows:
        raise ModelError(f"{path}: it has {len(tokenizer)} tokens, and {rows} rows of token_embd.weight: {AGAIN}")
    return {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}


def _config_of(path: Path, reading: Reading, values: Values, sizes: list[Sizes]) -> Any:
    """The plainest config that has these sizes."""
    keys, stock = family_of(reading.family).keys, reading.family
    layers = [{keys[size]: getattr(layer, size) for size in ("width", "heads", "kv_heads")} for layer in sizes]
    largest = {key: max(layer[key] for layer in layers) for key in layers[0]}
    values = values | largest | {keys["head_dim"]: sizes[0].head_dim}
    differing = [key for key in layers[0] if len({layer[key] for layer in layers}) > 1]
    if not differing:
        stand_in = family_of(stock).stand_in
        biased = any(values[key] for key in reading.biases)
        if (config := _stock(stock, values)) is not None:
            return config
        if stand_in and not biased and (config := _stock(stand_in, {**values, "sliding_window": None})) is not None:
            return config
    layout.register(kind := MODEL_TYPE.format(stock))
    per_layer = {str(n): {key: layer[key] for key in differing} for n, layer in enumerate(layers)}
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
class Param:
    """What a parameter of the model is made of."""

    shape: tuple[int, ...]
    tensors: dict[str, Placed]  # tensors of the file; without any the parameter is zero
    make: Callable[[list[Tensor]], Tensor]


def _params(
    path: Path, reading: Reading, config: Any, tensors: Mapping[str, Placed], sizes: list[Sizes], used: set[str]
) -> dict[str, Param]:
    """What every parameter is made of; shapes are compared on the meta device, where a model takes no memory.

    Args:
        used: tensors that were read already, to which those used here are added.
    """
    try:
        with torch.device("meta"), quiet_transformers():
            model: Any = AutoModelForCausalLM.from_config(config)
    except Exception as error:  # the class refuses the config; transformers raises many kinds
        raise _unbuilt(path, error) from error
    params, prefix = {}, family_of(config.model_type).layers + "."
    tied = set(model._tied_weights_keys or ()) if config.tie_word_embeddings else set()
    for name, param in model.state_dict(keep_vars=True).items():
        if name in tied:
            continue
        module, _, leaf = name.removeprefix(prefix).rpartition(".")
        number, _, inner = module.partition(".") if name.startswith(prefix) else ("", "", module)
        source = reading.sources.get(inner)
        block = f"blk.{number}." if number else ""
        names = [f"{block}{tensor}.{leaf}" for tensor in source.tensors] if source else []
        parts = {part: tensors[part] for part in names if part in tensors}
        size = sizes[int(number or 0)]
        if len(parts) < max(1, len(names)) and leaf != "bias":
            missing = next((part for part in names if part not in parts), name)
            raise ModelError(f"{path}: tensor {missing} is missing: {AGAIN}")
        make = _maker(source.conversion if source else "", size)
        used |= set(parts)
        params[name] = Param(tuple(param.shape), parts, make)
        shapes = [torch.empty(part.shape, device="meta") for part in parts.values()]
        if parts and (made := _shape(make, shapes)) != tuple(param.shape):
            raise ModelError(
                f"{path}: tensor {names[0]} has shape {list(shapes[0].shape)}, and its fields say {list(param.shape)} "
                "of "
                f"{name}: {AGAIN}"
                if made is None or len(parts) == 1
                else f"{path}: tensors {', '.join(parts)} do not make {name} of {list(param.shape)}: {AGAIN}"
            )
    if extra := [name for name in tensors if name not in used]:
        raise ModelError(
            f"{path}: {len(extra)} tensors have no place in a {config.model_type} of transformers, first {extra[0]}: "
            f"{FOLDER}"
        )
    return params


def _shape(make: Callable[[list[Tensor]], Tensor], parts: list[Tensor]) -> tuple[int, ...] | None:
    try:
        return tuple(make(parts).shape)
    except RuntimeError:  # the number of heads does not divide the rows
        return None


def _maker(conversion: str, size: Sizes) -> Callable[[list[Tensor]], Tensor]:
    return lambda parts: CONVERSIONS[conversion](parts[0], size)


def _deinterleaved(rows: Tensor, heads: int) -> Tensor:
    """Rows of q or k out of the order of interleaved RoPE: entries 2i and 2i+1 of a head go to i and i + head_dim/2."""
    return rows.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def _rows(fused: Tensor, size: Sizes, part: str) -> Tensor:
    """The rows of one part of q, k and v, which stand one below another in one matrix."""
    ends = [size.heads * size.head_dim, *[size.kv_heads * size.head_dim] * 2]
    return fused.split(ends)["qkv".index(part)]


CONVERSIONS: Mapping[str, Callable[[Tensor, Sizes], Tensor]] = {
    "none": lambda rows, size: rows,
    "interleaved q": lambda rows, size: _deinterleaved(rows, size.heads),
    "interleaved k": lambda rows, size: _deinterleaved(rows, size.kv_heads),
    "rows of q": lambda rows, size: _rows(rows, size, "q"),
    "rows of k": lambda rows, size: _rows(rows, size, "k"),
    "rows of v": lambda rows, size: _rows(rows, size, "v"),
}


def _fill(model: Any, params: Mapping[str, Param]) -> None:
    """Give a model on the meta device its weights."""
    weights = {}
    for name, param in params.items():
        parts = [_values(tensor, placed) for tensor, placed in param.tensors.items()]
        weights[name] = param.make(parts).contiguous() if parts else torch.zeros(param.shape)
    model.load_state_dict(weights, strict=False, assign=True)
    model.tie_weights()


def _values(name: str, placed: Placed) -> Tensor:
    values = placed.values()
    if not finite(values):
        raise ModelError(f"{placed.file}: tensor {name} holds NaN or infinite values")
    return values


def _in_layer(name: str) -> str:
    """A tensor's name without the layer's number."""
    return name.split(".", 2)[2] if name.startswith("blk.") else name


def read_tokenizer(path: Path) -> Any:
    """The tokenizer of a GGUF file, whose weights are not read.

    Raises:
        BillhookError: the file is damaged, or has no tokenizer that transformers can build.
    """
    fields = read(path).fields
    return tokenizer_of(path, _reading(path, fields)[0], fields)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
