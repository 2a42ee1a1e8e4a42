"""Work in several processes: of this machine, or of a Ray cluster, which places it and does again what a dead worker had.

    with crew(hands, "cpu", open_worker, (name, dtype)) as (size, each):
        for found in each(function, items):  # in the order of the items
            ...

`prepare(*given)` is called once in every process, which then may keep what it made in a global of its module.  ray is an
optional extra, `pip install 'billhook[ray]'`; only this module knows it.
"""

import functools
import logging
import multiprocessing
import socket
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from billhook import store
from billhook.errors import BillhookError, first_line

RETRIES = 3  # of what a worker had that died
PATIENCE = 5.0  # seconds for a Ray address to answer
Each = Callable[..., Iterator[Any]]  # (function, items, *common): function(*common, item) of each


@dataclass(frozen=True)
class Hands:
    """How many processes work: `jobs` of this machine, or all that the Ray cluster at the address `ray` has room for.

    Each opens the model for itself, by `name` and `dtype`.
    """

    jobs: int = 1
    ray: str = ""
    name: str = ""
    dtype: str = "auto"

    @property
    def many(self) -> bool:
        return self.jobs > 1 or bool(self.ray)

    @property
    def what(self) -> str:
        """The flag that asked for them."""
        return "--ray" if self.ray else "--jobs"


OWN = Hands()


def portions(total: int, count: int) -> list[range]:
    """`total` things in at most `count` runs that follow one another, as even as can be."""
    count = min(count, total)
    return [range(total * n // count, total * (n + 1) // count) for n in range(count)]


@contextmanager
def crew(hands: Hands, device: str, prepare: Callable[..., None], given: tuple[Any, ...]) -> Iterator[tuple[int, Each]]:
    """How many processes there are, and what has all of them work.

    Args:
        device: what they compute on: a Ray task takes a GPU where this is one, else all cores of a machine.

    Raises:
        BillhookError: no Ray cluster answers, or one without room or with another version; a process died for good.
    """
    if hands.ray:
        with _cluster(hands.ray, device, prepare, given) as found:
            yield found
        return
    threads = max(1, torch.get_num_threads() // hands.jobs)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(hands.jobs, context, _prepared, (threads, prepare, given)) as pool:

        def each(function: Callable[..., Any], items: Iterable[Any], *common: Any) -> Iterator[Any]:
            try:
                yield from pool.map(functools.partial(function, *common), items)
            except BrokenProcessPool as error:
                raise BillhookError(
                    "--jobs: a worker process died, perhaps for want of memory: use fewer jobs"
                ) from error

        yield hands.jobs, each


def _prepared(threads: int, prepare: Callable[..., None], given: tuple[Any, ...]) -> None:
    torch.set_num_threads(threads)
    prepare(*given)


@contextmanager
def _cluster(
    address: str, device: str, prepare: Callable[..., None], given: tuple[Any, ...]
) -> Iterator[tuple[int, Each]]:
    try:
        import ray
    except ImportError as error:
        raise BillhookError("--ray needs the extra: pip install 'billhook[ray]'") from error
    _check_answers(address)
    own = not ray.is_initialized()
    if own:
        try:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise _no_answer(address, first_line(error)) from error
    try:
        size, cores, gpus = _room([node["Resources"] for node in ray.nodes() if node["Alive"]], address, device)
        task = ray.remote(_on_a_worker).options(num_cpus=cores, num_gpus=gpus, max_retries=RETRIES)
        setup = ray.put((store.code_sha256(), cores, prepare, given))
        yield size, functools.partial(_in_cluster, ray, task, setup)
    finally:
        if own:
            ray.shutdown()


def _in_cluster(
    ray: Any, task: Any, setup: Any, function: Callable[..., Any], items: Iterable[Any], *common: Any
) -> Iterator[Any]:
    shared = ray.put(common)
    waiting = [task.remote(setup, setup.hex(), function, shared, item) for item in items]
    done = 0
    try:
        for one in waiting:
            found = ray.get(one)
            done += 1
            yield found
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, BillhookError):
            raise error.cause from None
        raise
    except ray.exceptions.RayError as error:
        raise BillhookError(
            f"--ray: a task was lost {RETRIES + 1} times ({first_line(error)}): its machine may lack memory"
        ) from error
    finally:
        # behind one that failed; Ray 2.60 aborts this process where a task that is forced to end has just ended
        for one in waiting[done + 1 :]:
            ray.cancel(one)


def _check_answers(address: str) -> None:
    """Knock at HOST:PORT: Ray itself would wait a minute and more."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if address in ("auto", "local"):
        return
    if not colon or not port.isdigit():
        raise BillhookError(f"--ray {address}: write auto, or HOST:PORT as 'ray start --head' prints it")
    try:
        socket.create_connection((host, int(port)), PATIENCE).close()
    except (OSError, OverflowError) as error:
        raise _no_answer(address, str(error)) from error


def _no_answer(address: str, why: str) -> BillhookError:
    return BillhookError(
        f"--ray {address}: no Ray cluster answers ({why}): start one with 'ray start --head'; where it wants a token, set "
        "RAY_AUTH_MODE=token"
    )


def _room(machines: list[dict[str, float]], address: str, device: str) -> tuple[int, int, int]:
    """Tasks at a time, and the cores and GPUs of each: every task takes what the smallest machine has, or one GPU."""
    if torch.device("cpu" if device == "auto" else device).type == "cuda":
        machines = [one for one in machines if one.get("GPU", 0) >= 1]
        tasks = [int(one["GPU"]) for one in machines]
        cores = min((int(one.get("CPU", 0)) // n for one, n in zip(machines, tasks, strict=True)), default=0)
        gpus = 1
    else:
        every = [int(one["CPU"]) for one in machines if one.get("CPU", 0) >= 1]
        cores, gpus = min(every, default=0), 0
        tasks = [one // cores for one in every]
    if not sum(tasks):
        raise BillhookError(f"--ray {address}: its machines have no {'GPU' if gpus else 'core'} to work on")
    return sum(tasks), cores, gpus


_ready: dict[str, str] = {}  # what this worker process is prepared for


def _on_a_worker(
    setup: tuple[str, int, Callable[..., None], tuple[Any, ...]],
    name: str,
    function: Callable[..., Any],
    common: tuple[Any, ...],
    item: Any,
) -> Any:
    code, cores, prepare, given = setup
    if code != store.code_sha256():
        raise BillhookError("--ray: a worker has another version of billhook: install the same one on every machine")
    if _ready.get("name") != name:
        torch.set_num_threads(max(1, cores))
        prepare(*given)
        _ready["name"] = name
    return function(*common, item)
