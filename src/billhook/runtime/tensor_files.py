"""Write safetensors files, tensor by tensor.

The library's own writer wants all tensors of a file at once, and takes seven times as long as a plain copy
(docs/log/scale.md).
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

NAMES = {  # names in safetensors of the dtypes that a model or its sums may have
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
ALIGNED = 8  # bytes; the data begin at a multiple of it, so that every number lies at a multiple of its size


def write(tensors: Mapping[str, Tensor], to: Path) -> None:
    """Write tensors, from any device, under their names; one that is not contiguous is copied first.

    When this returns the system has the file's content; it is on the disk only once the file is synced.

    Raises:
        OSError: the file cannot be written.
    """
    order = sorted(
        tensors, key=lambda name: (-tensors[name].dtype.itemsize, name)
    )  # wide numbers first: all stay aligned
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in order:
        tensor = tensors[name]
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text = text.ljust(ALIGNED * math.ceil(len(text) / ALIGNED))
    with to.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            file.write(tensors[name].detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
