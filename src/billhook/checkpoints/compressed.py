"""A folder in the format of compressed-tensors: linear weights as packed integers, a scale for each block of inputs.

    X.weight_packed   int32 (out, in bits / 32)   the codes, each raised by 2^(bits - 1), the first in the lowest bits
    X.weight_scale    float16 (out, in / block)   what a code is multiplied with; it may be negative, as ggml's is
    X.weight_shape    int64 (2,)                  out, in

config.json says how in `quantization_config`: format `pack-quantized`, symmetric, in groups of a block.  transformers
and vLLM read it (github.com/vllm-project/compressed-tensors, compressors/pack_quantized).  Of experts the scales are
float32: transformers multiplies theirs in the dtype of the scale, and float16 does not hold every product.
"""

import json
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from billhook.checkpoints.refused import DEQUANTISED
from billhook.checkpoints.shards import AGAIN, INDEX, SINGLE, read_json, weight_files
from billhook.errors import ModelError, first_line
from billhook.math.grids import BLOCK, GRIDS, Grid, Quantised
from billhook.runtime import tensor_files

KEY, METHOD, FORMAT = "quantization_config", "compressed-tensors", "pack-quantized"
PACKED, SCALE, SHAPE = ("weight_packed", "weight_scale", "weight_shape")
WORD = 32  # bits that are packed together


def width(grid: Grid) -> int:
    """Bits of a code."""
    return (grid.highest - grid.lowest).bit_length()


# grids that the format holds, by bits and block
HELD = {(width(grid), grid.block): grid for grid in GRIDS.values() if not grid.offset}


def compress(folder: Path, codes: Mapping[str, Quantised], experts: Collection[str] = ()) -> None:
    """Put codes in the place of weights, in a folder that `save` has just written of a model in memory.

    Matrices without codes become float16, in which they lose nothing that the model has; vectors stay float32.

    Args:
        codes: of linear modules, by the names that they have on disk.
        experts: those of experts of a mixture.
    """
    tensors = load_file(folder / SINGLE)
    for name, tensor in list(tensors.items()):
        path = name.removesuffix(".weight")
        if path in codes:
            one = codes[path]
            tensors |= {
                f"{path}.{PACKED}": packed(one.codes, width(one.grid)),
                f"{path}.{SCALE}": one.scales.float() if path in experts else one.scales,
                f"{path}.{SHAPE}": torch.tensor(one.codes.shape),
            }
            del tensors[name]
        elif tensor.ndim > 1:
            tensors[name] = tensor.half()
    tensor_files.write(tensors, folder / "packed.partial")  # what was loaded is mapped from the file itself
    (folder / "packed.partial").replace(folder / SINGLE)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    whole = [name.removesuffix(".weight") for name, one in tensors.items() if one.ndim > 1 and name.endswith(".weight")]
    config[KEY] = described(codes, whole)
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def described(codes: Mapping[str, Quantised], whole: list[str]) -> dict[str, Any]:
    """What config.json says of the weights: a group for each grid, its modules by name where there are several.

    Args:
        whole: modules whose weights keep what they are.
    """
    by_grid: dict[Grid, list[str]] = defaultdict(list)
    for path, one in codes.items():
        by_grid[one.grid].append(path)
    groups = {}
    for n, (grid, paths) in enumerate(sorted(by_grid.items(), key=lambda each: each[0].bits)):
        form = {"num_bits": width(grid), "type": "int", "symmetric": True, "strategy": "group", "dynamic": False}
        groups[f"group_{n}"] = {"targets": ["Linear"] if len(by_grid) == 1 else paths, "format": FORMAT}
        groups[f"group_{n}"]["weights"] = {**form, "group_size": grid.block}
    how = {"quant_method": METHOD, "format": FORMAT, "quantization_status": "compressed"}
    return {**how, "ignore": sorted({"lm_head", *whole}), "config_groups": groups}


def packed(codes: Tensor, bits: int) -> Tensor:
    """Codes, int8 (out, in), as int32 (out, in bits / 32): without gaps, the first in the lowest bits."""
    raised = (codes.cpu().numpy().astype(np.int16) + (1 << bits - 1)).astype(np.uint8)
    each = np.unpackbits(raised[..., None], axis=-1, count=bits, bitorder="little")
    words = np.packbits(each.reshape(len(raised), -1), axis=-1, bitorder="little")
    return torch.from_numpy(words.view("<i4").copy())


def unpacked(words: Tensor, columns: int, bits: int) -> Tensor:
    """Codes again, int8 (out, columns)."""
    each = np.unpackbits(words.numpy().view(np.uint8), axis=-1, bitorder="little")
    raised = np.packbits(each.reshape(len(words), columns, bits), axis=-1, bitorder="little")[..., 0]
    return torch.from_numpy((raised.astype(np.int16) - (1 << bits - 1)).astype(np.int8))


def is_compressed(folder: Path) -> bool:
    """Whether a folder's config.json says that its weights are packed in this format."""
    if not (folder / "config.json").is_file():
        return False
    said = read_json(folder / "config.json", str(folder)).get(KEY)
    return isinstance(said, dict) and said.get("quant_method") == METHOD and said.get("format") == FORMAT


@contextmanager
def plain(folder: Path, name: str) -> Iterator[Path]:
    """The folder itself; of a compressed one a copy without the format, whose weights are float32, while it is open.

    Args:
        name: the model's name, for messages.

    Raises:
        BillhookError: its tensors are not of this format, or not of a symmetric grid that billhook writes.
    """
    if not is_compressed(folder):
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="billhook-") as place:
        to = Path(place)
        for file in folder.iterdir():
            if file.is_file() and file.suffix not in (".safetensors", ".gguf") and file.name != INDEX:
                shutil.copy(file, to)
        tensors: dict[str, Tensor] = {}
        for file in weight_files(folder, name)[0]:
            try:
                tensors |= load_file(file)
            except (SafetensorError, OSError) as error:
                raise ModelError(f"{name}: {file.name} cannot be read ({first_line(error)}): {AGAIN}") from error
        tensor_files.write(values(tensors, name), to / SINGLE)
        config = read_json(folder / "config.json", name)
        del config[KEY]
        (to / "config.json").write_text(json.dumps(config), encoding="utf-8")
        yield to


def values(tensors: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """The weights of packed tensors, and all others, float32.

    Raises:
        BillhookError: as `plain`.
    """
    found = {}
    for key, tensor in tensors.items():
        path, _, kind = key.rpartition(".")
        if kind == PACKED:
            found[f"{path}.weight"] = _weight(tensors, path, name)
        elif kind not in (SCALE, SHAPE):
            found[key] = tensor.float()
    return found


def _weight(tensors: Mapping[str, Tensor], path: str, name: str) -> Tensor:
    widths = sorted({str(bits) for bits, _ in HELD})
    words, scales, shape = (tensors.get(f"{path}.{kind}") for kind in (PACKED, SCALE, SHAPE))
    wrong = ModelError(
        f"{name}: {path} is not packed in symmetric groups of {BLOCK} with {', '.join(widths)} bits, as "
        f"billhook reads compressed-tensors: load it with transformers, {DEQUANTISED['compressed-tensors']} "
        "and save_pretrained"
    )
    if words is None or scales is None or shape is None or shape.shape != (2,) or words.dtype != torch.int32:
        raise wrong
    rows, columns = shape.tolist()
    if min(rows, columns) < 1 or scales.ndim != 2 or len(scales) != rows or not scales.shape[1]:
        raise wrong
    bits, block = words.shape[-1] * WORD / columns, columns / scales.shape[1]
    if len(words) != rows or (bits, block) not in HELD or f"{path}.weight_zero_point" in tensors:
        raise wrong
    return Quantised(HELD[int(bits), int(block)], unpacked(words, columns, int(bits)), scales.half()).values()
