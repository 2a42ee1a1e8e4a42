"""An output that is the same to the last byte as one that was verified, of the same model, is not verified again.

Laws that compare two ways to one result write it twice, and many write what another test has written.
"""

import hashlib
from pathlib import Path
from typing import Any

from billhook.checkpoints import verify as real
from billhook.runtime import cache
from billhook.runtime.offload import is_offloaded

_answers: dict[str, dict[str, Any]] = {}
_verify = real.verify


def verify(path: Path, model: Any) -> dict[str, Any]:
    if real.verify is not _verify:  # a test has put something else there
        return real.verify(path, model)
    total = hashlib.sha256(f"{type(model)} {model.device} {is_offloaded(model)} {cache.model_sha256(model)}".encode())
    for file in sorted(file for file in path.rglob("*") if file.is_file()):
        total.update(f"{file.relative_to(path)} {file.stat().st_size} ".encode() + file.read_bytes())
    if (key := total.hexdigest()) not in _answers:
        _answers[key] = real.verify(path, model)
    return dict(_answers[key])
