"""Files of weights that were edited while a model stays in its files."""

import shutil
import tempfile
import weakref
from itertools import count
from pathlib import Path
from typing import Any


class SwapFiles:
    """Files of edited weights of a model and its copies.

    A file is removed once none of them reads it, and all files are removed with the last model.
    """

    def __init__(self) -> None:
        self.stores: weakref.WeakSet[Any] = weakref.WeakSet()  # of billhook.runtime.offload
        self.folder: Path | None = None  # None stands for a temporary folder
        self.made, self.numbers, self.written = False, count(), set[Path]()

    def file(self, module: str) -> Path:
        """A new file name: a file that a copy reads is never overwritten."""
        if not self.made:
            self.folder = self.folder or Path(tempfile.mkdtemp(prefix="billhook-pages-"))
            self.folder.mkdir(parents=True, exist_ok=True)
            weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)
            self.made = True
        assert self.folder is not None
        return self.folder / f"{module}-{next(self.numbers)}.safetensors"

    def sweep(self) -> None:
        """Remove files that no model reads any more."""
        needed = {file for store in self.stores for file in store.files.values()}
        for file in self.written - needed:
            file.unlink(missing_ok=True)
        self.written &= needed
