"""An importance matrix in llama.cpp's format: how large what enters each weight is, for `llama-quantize --imatrix`.

The file is a GGUF of type `imatrix` (llama.cpp, tools/imatrix/imatrix.cpp): for each weight the sum of squares of each
input, `NAME.in_sum2`, and over how many tokens, `NAME.counts`.
"""

from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from torch import Tensor

from billhook.checkpoints.gguf.write import tensor_of
from billhook.runtime import atomic


def write_imatrix(model: Any, path: Path, energies: Mapping[str, Tensor], tokens: int, text: str) -> None:
    """Write what enters linear modules.

    Args:
        energies: sums of squares of each input, float32 (in,), by the module's path.
        tokens: how many those sums are over.
        text: name of the calibration text.
    """
    with atomic.file(path) as work, closing(gguf.GGUFWriter(work, "")) as writer:
        writer.kv_data[0].pop(gguf.Keys.General.ARCHITECTURE, None)
        writer.add_type("imatrix")
        writer.add_array("imatrix.datasets", [text])
        writer.add_uint32("imatrix.chunk_count", 1)
        writer.add_uint32("imatrix.chunk_size", tokens)
        for name, energy in energies.items():
            tensor = tensor_of(model, name)
            writer.add_tensor(f"{tensor}.in_sum2", energy.numpy()[None])
            writer.add_tensor(f"{tensor}.counts", np.array([[tokens]], np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
