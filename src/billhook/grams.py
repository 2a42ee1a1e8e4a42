"""Grams of what enters a model's readers, kept on disk: in the dense stream they are the same whatever is cut, by whichever method.

A file holds one reader's, 8 bytes for every pair of its inputs, twice where windows are held out.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from billhook import atomic, store, tensorfile
from billhook.doubles import place
from billhook.headers import load
from billhook.tensors import Gram


class Grams:
    """Those in `folder` that belong to `key`, all that decides them: model, code, text, and what it is computed in."""

    def __init__(self, folder: Path, key: dict[str, Any]) -> None:
        self.folder, self.key = folder, key

    def has(self, readers: Iterable[str]) -> bool:
        """Whether all of these are there."""
        return all(self._file(reader).exists() for reader in readers)

    def read(self, reader: str, device: torch.device) -> tuple[Gram, Gram | None]:
        """From the windows to fit, and from those held out.

        Raises:
            BillhookError: the file cannot be read.
        """
        found, where = load(self._file(reader), "delete it, it will be made again", ["fit"]), place(device)
        return found["fit"].to(where), found["held_out"].to(where) if "held_out" in found else None

    def keep(self, reader: str, fit: Gram, held_out: Gram | None) -> None:
        """Raises BillhookError where the disk does not take them."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with atomic.file(self._file(reader)) as work:
            tensorfile.write({"fit": fit} | ({} if held_out is None else {"held_out": held_out}), work)

    def _file(self, reader: str) -> Path:
        return store.path(self.folder, "gram", {**self.key, "reader": reader}, "safetensors")
