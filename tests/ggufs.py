"""GGUF files for tests: written from fields and tensors, or an export with some of them changed."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import tiny

from billhook.checkpoints.gguf.write import write_gguf

Fields = dict[str, Any]


def written(path: Path, fields: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> Path:
    """A GGUF file of float32 tensors with these fields."""
    writer = gguf.GGUFWriter(path, fields["general.architecture"])
    for key, value in fields.items():
        add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        if key != "general.architecture":
            add.get(type(value), writer.add_array)(key, value)
    for name, values in tensors.items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def parts(model: Any, tmp_path: Path) -> tuple[Fields, dict[str, np.ndarray]]:
    """Fields and tensors of what export writes."""
    write_gguf(model, tiny.tokenizer(), tmp_path / "export.gguf", "F32")
    reader = gguf.GGUFReader(tmp_path / "export.gguf")
    fields = {key: one.contents() for key, one in reader.fields.items() if not key.startswith("GGUF.")}
    return fields, {one.name: np.array(one.data) for one in reader.tensors}


def edited(
    model: Any, tmp_path: Path, changes: Mapping[str, Any], more: Mapping[str, np.ndarray] | None = None
) -> Path:
    """An export with other fields, None for none, and other tensors."""
    fields, tensors = parts(model, tmp_path)
    fields = {key: value for key, value in {**fields, **changes}.items() if value is not None}
    return written(tmp_path / "edited.gguf", fields, {**tensors, **(more or {})})
