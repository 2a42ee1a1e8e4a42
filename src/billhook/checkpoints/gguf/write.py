"""Export a model in memory as one GGUF file for llama.cpp, whether its layers are equal or not.

An architecture of llama.cpp that can hold the model is chosen (checkpoints/gguf/architectures.py) before anything is
written.
"""

import math
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor

from billhook.checkpoints.gguf import rope
from billhook.checkpoints.gguf.architectures import (
    ARCHITECTURES,
    CHOICES,
    COMMON,
    FACTORED,
    IN_LAYER,
    TOP,
    Architecture,
)
from billhook.checkpoints.gguf.blocks import packed
from billhook.checkpoints.gguf.vocabulary import vocabulary
from billhook.choices import BY_QUANTIZER, QUANTIZE, QUANTIZER
from billhook.errors import ModelError, one_of
from billhook.math.grids import Quantised
from billhook.models import families
from billhook.models.modeling_per_layer import RANKS
from billhook.models.multimodal import within
from billhook.runtime import atomic
from billhook.runtime.progress import Tick, quiet, ticked

FILE_TYPES = {"F32": 0, "F16": 1, "BF16": 32, "Q8_0": 7, "Q5_1": 9, "Q5_0": 8, "Q4_1": 3, "Q4_0": 2}  # llama_ftype
BLOCK = {"F32": 1, "F16": 1, "BF16": 1} | dict.fromkeys(BY_QUANTIZER, 256)  # entries packed together; 32 for others
# types that are too coarse for the embedding and the head, as in llama-quantize
COARSE = ("Q5_1", "Q5_0", "Q4_1", "Q4_0")
EMBEDDINGS = ("token_embd.weight", "output.weight")
QUANTIZATION_VERSION = 2  # version of ggml's block formats
FOLDER = "keep the folder, which transformers loads"
MERGE = "`billhook export --merge`"
EQUAL = "wants equal layers"


@dataclass(frozen=True)
class Shape:
    """What an architecture must hold, by the tensors of the model; lists have one entry for each layer."""

    model_type: str
    vocabulary: int  # rows of the embedding
    hidden: int
    head_dim: int
    widths: list[int]
    heads: list[int]
    kv_heads: list[int]
    tensors: frozenset[str]  # names of tensors in the file, without blk.N.
    rope: str  # type of the rotary embedding

    @property
    def uneven(self) -> bool:
        """Whether layers differ."""
        return any(len(set(sizes)) > 1 for sizes in (self.widths, self.heads, self.kv_heads))


@dataclass(frozen=True)
class Piece:
    """One tensor of the file."""

    name: str
    parts: tuple[Tensor, ...]  # their rows are put one below another
    heads: int = 0  # with heads, rows are reordered for interleaved RoPE
    codes: tuple[Quantised, ...] = ()  # of every part, where all have codes of one grid

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the tensor in the file, in torch's order; an empty side gets one entry."""
        return (max(1, sum(len(part) for part in self.parts)), *(max(1, n) for n in self.parts[0].shape[1:]))

    def array(self) -> np.ndarray:
        """The values, float32.

        A layer without FFN channels gets one channel of zeros.  Without any, llama.cpp would drop what the layer's
        attention adds (src/models/deci.cpp: `if (n_ff == 0) continue`).
        """
        rows = torch.cat([part.detach().float().cpu() for part in self.parts])
        if not rows.numel():
            return np.zeros(self.shape, np.float32)
        return (interleaved(rows, self.heads) if self.heads else rows).contiguous().numpy()

    def packed(self) -> np.ndarray:
        """The blocks of its codes, uint8."""
        stored = [packed(part) for part in self.codes]
        rows = torch.from_numpy(np.concatenate(stored))
        return (interleaved(rows, self.heads) if self.heads else rows).contiguous().numpy()


def interleaved(rows: Tensor, heads: int) -> Tensor:
    """Rows of q or k in the order of interleaved RoPE: entries i and i + head_dim/2 of a head go to 2i and 2i+1."""
    return rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


@torch.no_grad()
def write_gguf(
    model: Any,
    tokenizer: Any,
    path: Path,
    quantize: str = "F16",
    tick: Tick = quiet,
    *,
    overwrite: bool = True,
    codes: Mapping[str, Quantised] | None = None,
) -> dict[str, Any]:
    """Write `model` and `tokenizer` as the GGUF file `path`, which appears whole or not at all.

    Args:
        quantize: one of QUANTIZE.  Matrices get that type and vectors F32.  Embedding and head get Q8_0 where the type
            is coarse, and a matrix whose rows its blocks do not divide gets F16.  K-quants are made by the user's
            llama-quantize from an F16 file.
        codes: of modules, by path: their weights are stored as these very codes, whatever `quantize` says.

    Returns:
        the architecture, the number of tensors by type, how many fell back to F16 and why, and the file's bytes.

    Raises:
        BillhookError: llama.cpp cannot hold the model or follow the tokenizer, or the file cannot be written.
    """
    one_of("quantize", quantize, QUANTIZE)
    quantizer = _quantizer() if quantize in BY_QUANTIZER else ""
    shape = shape_of(model)
    arch = choose(shape)
    words = vocabulary(tokenizer, shape.vocabulary, model.config.bos_token_id)
    metadata = describe(model.config, shape, arch) | words
    pieces = list(_pieces(model, shape, arch, codes or {}))
    with atomic.file(path, overwrite) as work:
        if quantizer:
            plain = work.with_name("plain.gguf")
            _write(plain, arch, metadata, pieces, "F16", tick)
            tick(QUANTIZER, 0, 1)
            _requantize(quantizer, plain, work, quantize)
            tick(QUANTIZER, 1, 1)
            types = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(work).tensors}
        else:
            types = _write(work, arch, metadata, pieces, quantize, tick)
        outcome = {"arch": arch.name, "quantize": quantize, "types": dict(Counter(types.values()))}
        return {**outcome, **_fallback(pieces, quantize), "bytes": work.stat().st_size}


def shape_of(model: Any) -> Shape:
    """Sizes, tensors and rotary type of a model.

    Raises:
        BillhookError: no architecture of llama.cpp computes what the model does.
    """
    model_type = families.stock_type(model.config.model_type)
    if stands := within(model):
        raise ModelError(f"billhook writes no GGUF of {stands.model_type}, which is multimodal: {FOLDER}")
    if model_type not in CHOICES:
        if families.family_of(model_type).derived:
            raise ModelError(f"no GGUF is written of {model_type}, whose row is derived from the model: {FOLDER}")
        raise ModelError(f"billhook writes no GGUF of {model_type}: {FOLDER}")
    row = families.family_of(model_type)
    sizes = [families.sizes(model, n) for n in range(len(families.layers(model)))]
    widths, heads, kv_heads, head_dims = (
        [layer[row.keys[key]] for layer in sizes] for key in ("width", "heads", "kv_heads", "head_dim")
    )
    if factored := next((f"layer {n}'s {min(found)}" for n in range(len(sizes)) if (found := sizes[n].get(RANKS))), ""):
        raise ModelError(
            f"{factored} is two thin matrices, which no graph of llama.cpp takes: "
            f"{MERGE} multiplies them out, which saves nothing, or {FOLDER}"
        )
    for n in range(len(sizes)):
        heads_of = families.attention(model, n)
        if not heads_of.value_dim == heads_of.key_dim == head_dims[0]:
            raise ModelError(
                f"layer {n} has value heads of {heads_of.value_dim} channels beside key heads of {heads_of.key_dim}, and "
                f"every graph of llama.cpp wants {head_dims[0]}: {MERGE} fills them with zeros, which saves nothing, or "
                f"prune heads or groups instead, or {FOLDER}"
            )
    return Shape(
        model_type,
        model.get_input_embeddings().weight.shape[0],
        model.get_input_embeddings().weight.shape[1],
        head_dims[0],
        [max(1, width) for width in widths],
        heads,
        kv_heads,
        frozenset(tensor for _, tensor in _named(model)),
        rope.kind_of(model.config),
    )


def choose(shape: Shape) -> Architecture:
    """The first architecture of the family that holds the model.

    Raises:
        BillhookError: no architecture does; the message says what each lacks.
    """
    lacks = {name: list(_misfits(shape, ARCHITECTURES[name])) for name in CHOICES[shape.model_type]}
    for name, misfits in lacks.items():
        if not misfits:
            return ARCHITECTURES[name]
    why = "; ".join(f"{name} {', '.join(misfits)}" for name, misfits in lacks.items())
    advice = "prune all layers alike, or " if [EQUAL] in lacks.values() else ""
    raise ModelError(f"no architecture of llama.cpp holds this {shape.model_type}: {why}; {advice}{FOLDER}")


def describe(config: Any, shape: Shape, arch: Architecture) -> dict[str, Any]:
    """The metadata of the model; sizes are lists where layers differ."""
    _check(config)
    turns = config.rope_parameters
    sizes = {
        "vocab_size": shape.vocabulary,  # read by transformers; llama.cpp counts the tokens
        "context_length": config.max_position_embeddings,
        "embedding_length": shape.hidden,
        "block_count": len(shape.widths),
        "feed_forward_length": _one_or_all(shape.widths),
        "attention.head_count": _one_or_all(shape.heads),
        "attention.head_count_kv": _one_or_all(shape.kv_heads),
        "attention.key_length": shape.head_dim,
        "attention.value_length": shape.head_dim,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.dimension_count": shape.head_dim,
        "rope.freq_base": float(turns["rope_theta"]),
    }
    if shape.rope == "linear":
        sizes |= {"rope.scaling.type": shape.rope, "rope.scaling.factor": float(turns["factor"])}
    general = {
        "general.type": "model",
        "general.name": Path(config.name_or_path).name or shape.model_type,
        "general.quantization_version": QUANTIZATION_VERSION,
    }
    return general | {f"{arch.name}.{key}": value for key, value in sizes.items()}


def _misfits(shape: Shape, arch: Architecture) -> Iterator[str]:
    if shape.uneven and not arch.uneven:
        yield EQUAL
    if arch.square and shape.heads[0] * shape.head_dim != shape.hidden:
        yield f"wants heads × head size = hidden size {shape.hidden}"
    if extra := sorted(shape.tensors - COMMON - arch.optional):
        yield f"has no place for {extra[0]}"
    if shape.rope not in arch.ropes:
        yield f"knows no RoPE of type {shape.rope}"


def _check(config: Any) -> None:
    """Refuse what every architecture would silently compute in another way."""
    if config.hidden_act not in ("silu", "swish"):
        raise ModelError(f"llama.cpp computes SiLU in this family's FFN, not {config.hidden_act}: {FOLDER}")
    if getattr(config, "is_causal", True) is False:
        raise ModelError(f"llama.cpp's positions see only those before them, and this model's see all: {FOLDER}")
    window, longest = getattr(config, "sliding_window", None), config.max_position_embeddings
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"]
    if window and window < longest and "sliding_attention" in kinds:
        raise ModelError(
            f"this model attends to its last {window} positions, and llama.cpp to all in this family's architectures: "
            "set "
            f"max_position_embeddings to {window} in config.json, since up to there nothing differs, or {FOLDER}"
        )


def _one_or_all(values: Sequence[int]) -> int | list[int]:
    return values[0] if len(set(values)) == 1 else list(values)


def _named(model: Any) -> dict[tuple[int | None, str], Tensor]:
    """Parameters by layer number and GGUF name; a tied head is the embedding and has no entry."""
    prefix = families.family_of(model.config.model_type).layers + "."
    named: dict[tuple[int | None, str], Tensor] = {}
    for name, param in model.named_parameters():
        module, _, leaf = name.removeprefix(prefix).rpartition(".")
        number, _, inner = module.partition(".") if name.startswith(prefix) else ("", "", "")
        kind = IN_LAYER.get(inner) if number else TOP.get(module)
        if kind is None:
            raise ModelError(f"tensor {name} has no place in a GGUF of this family: {FOLDER}")
        named[int(number) if number else None, f"{kind}.{leaf}"] = param
    return named


def tensor_of(model: Any, path: str) -> str:
    """The name that the weight of a linear module of a decoder layer has in a GGUF."""
    prefix = families.family_of(model.config.model_type).layers + "."
    number, _, inner = path.removeprefix(prefix).partition(".")
    return f"blk.{number}.{IN_LAYER[inner]}.weight"


def _pieces(model: Any, shape: Shape, arch: Architecture, codes: Mapping[str, Quantised]) -> Iterator[Piece]:
    """The file's tensors."""
    of_param = {id(model.get_parameter(f"{path}.weight")): one for path, one in codes.items()}
    if shape.rope in FACTORED:
        yield Piece("rope_freqs.weight", (rope.factors_of(model.config, shape.head_dim),))
    heads = {"attn_q": shape.heads, "attn_k": shape.kv_heads} if arch.interleaved else {}
    named = _named(model)
    for (layer, tensor), param in named.items():
        kind = tensor.partition(".")[0]
        if layer is None:
            yield Piece(tensor, (param,), codes=_codes((param,), of_param))
        elif not (arch.fused and kind in ("attn_q", "attn_k", "attn_v")):
            turned = heads[kind][layer] if kind in heads else 0
            yield Piece(f"blk.{layer}.{tensor}", (param,), turned, _codes((param,), of_param))
        elif kind == "attn_q":
            parts = tuple(named[layer, f"attn_{part}.weight"] for part in "qkv")
            yield Piece(f"blk.{layer}.attn_qkv.weight", parts, codes=_codes(parts, of_param))


def _codes(parts: tuple[Tensor, ...], of_param: Mapping[int, Quantised]) -> tuple[Quantised, ...]:
    """The codes of all parts; none where one has none.

    Raises:
        BillhookError: parts of one tensor are on different grids, which no tensor of a GGUF can be.
    """
    found = tuple(of_param[id(part)] for part in parts if id(part) in of_param)
    if len({one.grid for one in found}) > 1:
        raise ModelError("q, k and v are one tensor in this architecture of llama.cpp: give them one type")
    return found if len(found) == len(parts) else ()


def _type(piece: Piece, quantize: str) -> str:
    if piece.codes:
        return piece.codes[0].grid.name
    if len(piece.shape) == 1:
        return "F32"
    wanted = "Q8_0" if quantize in COARSE and piece.name in EMBEDDINGS else quantize
    return "F16" if piece.shape[-1] % BLOCK.get(wanted, 32) else wanted


def _fallback(pieces: list[Piece], quantize: str) -> dict[str, Any]:
    """How many matrices have rows that the type's blocks do not divide, and why they fall back."""
    block = BLOCK.get(quantize, 32)
    rows = [piece.shape[-1] for piece in pieces if len(piece.shape) > 1 and piece.shape[-1] % block]
    lengths = f"{min(rows)} to {max(rows)}" if len(set(rows)) > 1 else f"{rows[0]}" if rows else ""
    why = f"{quantize} packs {block} entries of a row together, and these rows have {lengths}" if rows else ""
    return {"fallback": len(rows), "fallback_why": why}


def _write(
    path: Path,
    arch: Architecture,
    metadata: Mapping[str, Any],
    pieces: list[Piece],
    quantize: str,
    tick: Tick,
) -> dict[str, str]:
    """Write one file, with one tensor in memory at a time; return the type of each tensor."""
    types = {piece.name: _type(piece, quantize) for piece in pieces}
    with closing(gguf.GGUFWriter(path, arch.name)) as writer:
        for key, value in {**metadata, "general.file_type": FILE_TYPES[quantize]}.items():
            add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
            add.get(type(value), writer.add_array)(key, value)
        for piece in pieces:
            kind = gguf.GGMLQuantizationType[types[piece.name]]
            in_bytes = gguf.quant_shape_to_byte_shape(piece.shape, kind)
            writer.add_tensor_info(piece.name, in_bytes, np.dtype(np.uint8), math.prod(in_bytes), kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for piece in ticked(pieces, "writing GGUF", tick):
            writer.write_tensor_data(piece.packed() if piece.codes else _packed(piece, types[piece.name]))
    return types


def _packed(piece: Piece, kind: str) -> np.ndarray:
    with np.errstate(over="ignore"):
        values = gguf.quants.quantize(piece.array(), gguf.GGMLQuantizationType[kind])
    if kind == "F16" and not np.isfinite(values).all():
        raise ModelError(f"{piece.name} holds values that float16 cannot (65504 at most): export as F32 or BF16")
    return values


def _quantizer() -> str:
    if path := shutil.which(QUANTIZER):
        return path
    raise ModelError(
        f"K-quants are made by llama.cpp's {QUANTIZER}, which is not on PATH: "
        f"put it there, or choose one of {', '.join(FILE_TYPES)}"
    )


def _requantize(quantizer: str, plain: Path, to: Path, quantize: str) -> None:
    done = subprocess.run([quantizer, str(plain), str(to), quantize], capture_output=True, text=True)
    if done.returncode or not to.exists():
        lines = (done.stderr or done.stdout).strip().splitlines()
        raise ModelError(f"{quantizer} failed with code {done.returncode}: {lines[-1] if lines else 'no message'}")
