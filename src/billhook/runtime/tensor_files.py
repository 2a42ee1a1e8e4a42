"""Safetensors files out, tensor by tensor: safetensors' own writer wants a whole file's tensors at once, and takes seven times
as long as a plain copy (docs/LOG.md, "Larger than memory")."""

import json
import math
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

NAMES = {  # safetensors', of the dtypes that a model or its sums may have
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
ALIGNED = 8  # bytes: where the data begin, so that every number lies on a multiple of its size


def write(tensors: Mapping[str, Tensor], to: Path) -> None:
    """Write tensors, on whatever device, under their names; what is not contiguous is copied, one at a time.

    The file is written when this returns, and on the disk when the system sees fit, or once it is synced.

    Raises:
        OSError: it cannot be.
    """
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))  # wide numbers first, all aligned
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in order:
        one = tensors[name]
        start, end = end, end + one.numel() * one.element_size()
        header[name] = {"dtype": NAMES[one.dtype], "shape": list(one.shape), "data_offsets": [start, end]}
    said = json.dumps(header, separators=(",", ":")).encode()
    said = said.ljust(ALIGNED * math.ceil(len(said) / ALIGNED))
    with to.open("wb") as file:
        file.write(len(said).to_bytes(8, "little") + said)
        for name in order:
            file.write(tensors[name].detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
