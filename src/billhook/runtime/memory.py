"""Memory of the process: give freed memory back, and watch how much is taken."""

import ctypes
import gc
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import psutil
import torch

M_MMAP_THRESHOLD = -3  # malloc.h
LARGE = 1_000_000  # bytes; gives a peak of 1,113 MB, sixteen times as much gives 1,117 MB (docs/LOG.md)


def return_freed() -> None:
    """Have the C library give freed memory back.

    Holes that small cuts leave are reused late, and a measurement would count them as used.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):  # glibc alone has it
        libc.malloc_trim(0)


def return_large() -> None:
    """From now on have the C library map large blocks one by one, and give each back when it is freed.

    By default glibc does so from 128 kB on, but raises that to as much as 32 MB once such blocks were freed.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(M_MMAP_THRESHOLD, LARGE)


def free_bytes(device: torch.device) -> int:
    """Bytes that new tensors on a device can take."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available


@contextmanager
def peak_growth(device: torch.device) -> Iterator[Callable[[], int]]:
    """Yield a function that returns, afterwards, by how many bytes memory grew at most while the context was open.

    On CUDA this is the allocator's own peak; elsewhere the resident set, sampled every 5 ms.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield lambda: torch.cuda.max_memory_allocated(device) - before
        return
    gc.collect()
    return_freed()
    process, done = psutil.Process(), threading.Event()
    before = highest = process.memory_info().rss

    def sample() -> None:
        nonlocal highest
        while not done.wait(0.005):
            highest = max(highest, process.memory_info().rss)

    watcher = threading.Thread(target=sample, daemon=True)
    watcher.start()
    try:
        yield lambda: highest - before
    finally:
        done.set()
        watcher.join()
