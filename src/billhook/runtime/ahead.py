"""Weights on their way to a device that computes with others meanwhile."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor


class Ahead:
    """Weights that a thread reads from `files` and copies to a device, on a stream of its own if that is a GPU."""

    def __init__(self, device: torch.device, files: dict[str, Path], read: Callable[[], dict[str, Tensor]]) -> None:
        self.device, self.files, self.read = device, files, read
        reader = ThreadPoolExecutor(1)
        self.future = reader.submit(self._brought)
        reader.shutdown(wait=False)

    def _brought(self) -> dict[str, Tensor]:
        if self.device.type != "cuda":
            return self.read()
        stream = torch.cuda.Stream(self.device)
        with torch.cuda.stream(stream):
            found = self.read()
        stream.synchronize()
        return found

    def arrived(self) -> Iterator[tuple[str, Tensor]]:
        """Wait for the weights, and yield them with their names.

        Raises:
            BillhookError: a parameter holds NaN or infinite values.
        """
        for name, value in self.future.result().items():
            if self.device.type == "cuda":  # or its memory is given away while kernels still read it
                value.record_stream(torch.cuda.current_stream(self.device))
            yield name, value
