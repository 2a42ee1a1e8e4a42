"""Layers that a prune has finished, kept in a folder: the same prune goes on from there, bit for bit.

A layer is finished once its record is in the folder.  The record is written after the weights, and each file gets its
name when it is complete on the disk.  The inputs of the next layer are computed anew by a forward pass through the
finished ones.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from billhook.errors import ModelError, first_line
from billhook.models.axes import Axis, axes
from billhook.models.families import layers, ranks, row_of
from billhook.models.modeling_per_layer import make_low_rank
from billhook.models.surgery import remove
from billhook.runtime import offload, tensor_files
from billhook.runtime.atomic import disk_full, rename
from billhook.runtime.cache import Grams
from billhook.runtime.documents import read_sealed, sealed
from billhook.runtime.headers import check_tensors, load
from billhook.runtime.run import Finished

AGAIN = "start over with --fresh"


class FinishedLayers(Finished):
    """The layers that `folder` holds of a prune of `model`, and those that are added.

    `grams` caches the Grams of the dense stream, for this prune and others.
    """

    def __init__(self, folder: Path, model: PreTrainedModel, grams: Grams | None = None) -> None:
        super().__init__(grams)
        self.folder, self.model = folder, model
        for n in range(len(layers(model))):
            if os.path.lexists(record := self._file(n, "json")):
                self.records[n] = read_sealed(record, str(record), AGAIN)

    def save(self, n: int, found: list[dict[str, Any]], drops: Sequence[tuple[Axis, Tensor]]) -> None:
        """Keep layer n as it is now.

        Args:
            found: what became of it, as plain data.
            drops: the units that were dropped from each axis, in the order of dropping.

        Raises:
            BillhookError: the disk is full, or cannot be written.
        """
        weights, record = self._file(n, "safetensors"), self._file(n, "json")
        prefix = f"{row_of(self.model).layers}.{n}."
        tensors = {f"{prefix}{name}": param.data for name, param in layers(self.model)[n].named_parameters()}
        content = {"found": found, "drops": [(axis.kind, axis.reader.param, units.tolist()) for axis, units in drops]}
        content["ranks"] = ranks(self.model, n)
        with self._writing(weights) as work:
            tensor_files.write(tensors, work)
            rename(work, weights)
            work.write_text(sealed(content), encoding="utf-8")
            rename(work, record)
        offload.read_from(self.model, weights, list(tensors))

    def once(self, name: str, make: Callable[[], Tensor]) -> Tensor:
        """What `make` gives, kept beside the layers, which were pruned by it; made again, its last bits might differ.

        Raises:
            BillhookError: the disk is full, or cannot be written.
        """
        file = self.folder / f"{name}.safetensors"
        if not file.exists():
            with self._writing(file) as work:
                tensor_files.write({name: make()}, work)
                rename(work, file)
        return load(file, AGAIN, [name])[name]

    def reload(self, n: int) -> None:
        """Restore layer n as it was saved."""
        for kind, reader, units in self.records[n]["drops"]:
            axis = next(axis for axis in axes(self.model, (kind,)) if axis.reader.param == reader)
            remove(self.model, axis, torch.tensor(units, dtype=torch.long))
        make_low_rank(layers(self.model)[n], self.records[n]["ranks"])
        file = self._file(n, "safetensors")
        prefix = f"{row_of(self.model).layers}.{n}."
        shapes = {prefix + name: tuple(param.shape) for name, param in layers(self.model)[n].named_parameters()}
        check_tensors(file, AGAIN, shapes)
        if offload.is_offloaded(self.model):
            offload.read_from(self.model, file, list(shapes))
            return
        for name, tensor in load(file, AGAIN, shapes).items():
            param = self.model.get_parameter(name)
            param.data = tensor.to(param)

    @contextmanager
    def _writing(self, file: Path) -> Iterator[Path]:
        """A temporary file, to be renamed to `file`."""
        work = file.with_name("layer.partial")
        try:
            yield work
        except OSError as error:
            work.unlink(missing_ok=True)
            why = disk_full(error) or first_line(error)
            raise ModelError(f"cannot write {file}: {why}; the layers before it are kept") from error

    def _file(self, n: int, ending: str) -> Path:
        return self.folder / f"layer-{n}.{ending}"


class FinishedTogether(FinishedLayers):
    """The same in a process that is not the first of those that share the text: the first one writes."""

    def save(self, n: int, found: list[dict[str, Any]], drops: Sequence[tuple[Axis, Tensor]]) -> None:
        """Layer n is kept by the first process."""
