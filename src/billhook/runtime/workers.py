"""Work in several processes: of this machine, or of a Ray cluster, which also repeats the work of a worker that died.

    with worker_pool(workers, "cpu", prepare) as pool:
        for result in pool.map(function, items, *common):  # function(state, *common, item), in the order of the items
            ...
        for result in pool.map_stream(generator, items, *common):  # whatever it yields for any item, as it comes
            ...

`prepare()` is called once in every process; the state is what it returned there, often a model.
ray is an optional extra, `pip install 'billhook[ray]'`; no other module imports it.
"""

import functools
import itertools
import logging
import multiprocessing
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from multiprocessing.util import Finalize
from typing import Any, NoReturn

import torch

from billhook.errors import BillhookError, first_line
from billhook.runtime import cache, signals
from billhook.runtime.scratch import scratch

RETRIES = 3  # how often a task is started again after its worker died
PATIENCE = 5.0  # seconds within which a Ray address must answer
ParallelMap = Callable[
    ..., Iterator[Any]
]  # (function, items, *common) -> function(state, *common, item) for every item


@dataclass(frozen=True)
class Workers:
    """How many processes work: `jobs` of this machine, or as many as the Ray cluster at the address `ray` has room for.

    Each process opens the model for itself, by `name`, `dtype` and `family_row`.
    """

    jobs: int = 1
    ray: str = ""
    name: str = ""
    dtype: str = "auto"
    family_row: str = ""

    @property
    def many(self) -> bool:
        return self.jobs > 1 or bool(self.ray)

    def device(self, own: torch.device) -> str:
        """What each computes on, where this process computes on `own`: a Ray task sees the GPU it is given as the only
        one."""
        return own.type if self.ray else str(own)

    @property
    def flag(self) -> str:
        """The flag that asked for several processes."""
        return "--ray" if self.ray else "--jobs"


ONE_PROCESS = Workers()


@dataclass(frozen=True)
class WorkerPool:
    """Processes that wait for work."""

    size: int
    map_stream: ParallelMap  # for generators: everything they yield; what one item yields comes in order

    def map(self, function: Callable[..., Any], items: Iterable[Any], *common: Any) -> Iterator[Any]:
        """`function(state, *common, item)` for every item, in the order of the items."""
        waiting, following = dict[int, Any](), 0
        for n, result in self.map_stream(_numbered, enumerate(items), function, *common):
            waiting[n] = result
            while following in waiting:
                yield waiting.pop(following)
                following += 1


def _numbered(state: Any, function: Callable[..., Any], *arguments: Any) -> Iterator[tuple[int, Any]]:
    *common, (n, item) = arguments
    yield n, function(state, *common, item)


def portions(total: int, count: int) -> list[range]:
    """The numbers 0 to `total` - 1 as at most `count` consecutive ranges of nearly equal length."""
    count = min(count, total)
    return [range(total * n // count, total * (n + 1) // count) for n in range(count)]


@contextmanager
def worker_pool(workers: Workers, device: str, prepare: Callable[[], Any]) -> Iterator[WorkerPool]:
    """Processes, each prepared when it is first needed.

    Args:
        device: what they compute on; a Ray task takes a GPU if this is one, else all cores of a machine.
        prepare: called in every process before its first work; what it returns goes to every call.

    Raises:
        BillhookError: no Ray cluster answers; it has no room or another version of billhook; a process died.
    """
    if workers.ray:
        with _cluster(workers.ray, device, prepare) as pool:
            yield pool
        return
    threads = max(1, torch.get_num_threads() // workers.jobs)
    start_process = functools.partial(
        ProcessPoolExecutor, 1, multiprocessing.get_context("spawn"), _prepared, (threads, prepare)
    )
    with ExitStack() as stack:
        yield WorkerPool(
            workers.jobs, functools.partial(_flow, [stack.enter_context(start_process()) for _ in range(workers.jobs)])
        )


def _flow(
    idle: Sequence[ProcessPoolExecutor], function: Callable[..., Iterator[Any]], items: Iterable[Any], *common: Any
) -> Iterator[Any]:
    """Every item's generator runs in one process from start to end.

    So each process is a pool of its own.  It computes its next result while the caller uses the last one.
    """
    todo, busy = iter(items), dict[Future[list[Any]], ProcessPoolExecutor]()
    try:
        while True:
            for pool, item in zip(idle, todo, strict=False):  # `idle` comes first, or an item would be lost
                with _interrupts_blocked():  # the process starts with its first work
                    busy[pool.submit(_step, function, *common, item)] = pool
            if not busy:
                return
            idle = []
            for future in wait(busy, return_when=FIRST_COMPLETED).done:
                pool = busy.pop(future)
                if results := future.result():
                    busy[pool.submit(_step)] = pool
                    yield results[0]
                else:
                    idle.append(pool)
    except BrokenProcessPool as error:
        raise BillhookError("--jobs: a worker process died, perhaps of too little memory: use fewer jobs") from error


@contextmanager
def _interrupts_blocked() -> Iterator[None]:
    """A terminal sends Ctrl-C to all processes of a command: those that start while this is open ignore it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGHUP})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@dataclass
class _Process:
    """What a worker process keeps between calls."""

    setup: str = ""  # what it is prepared for, by name
    state: Any = None  # what `prepare` returned
    running: Iterator[Any] | None = None  # the generator that it is running


_process = _Process()


def _step(function: Callable[..., Iterator[Any]] | None = None, *arguments: Any) -> list[Any]:
    """The next result of the generator that `function` makes, or of the running one; an empty list at its end."""
    if function is not None:
        _process.running = function(_process.state, *arguments)
    assert _process.running is not None
    return list(itertools.islice(_process.running, 1))


def _prepared(threads: int, prepare: Callable[[], Any]) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    signal.signal(signal.SIGTERM, _end)
    stack = ExitStack()
    stack.enter_context(scratch())
    Finalize(None, stack.close, exitpriority=0)
    torch.set_num_threads(threads)
    logging.getLogger("billhook").setLevel(logging.ERROR)  # the first process has shown the warnings
    _process.state = prepare()


def _end_with_parent() -> None:
    """End with the parent, even if that was killed and could not say so: a waiting process holds a model."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    _end()


def _end(*_: object) -> NoReturn:
    """End at once, after the registered cleanups."""
    signals.run_cleanups()
    os._exit(1)


@contextmanager
def _cluster(address: str, device: str, prepare: Callable[[], Any]) -> Iterator[WorkerPool]:
    try:
        import ray
    except ImportError as error:
        raise BillhookError("--ray needs the extra: pip install 'billhook[ray]'") from error
    _check_answers(address)
    started = not ray.is_initialized()
    if started:
        try:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise _no_answer(address, first_line(error)) from error
    try:
        size, cores, gpus = _room([node["Resources"] for node in ray.nodes() if node["Alive"]], address, device)
        resources = {"num_cpus": cores, "num_gpus": gpus, "max_retries": RETRIES, "num_returns": "streaming"}
        setup = ray.put((cache.code_sha256(), cores, prepare))
        yield WorkerPool(size, functools.partial(_in_cluster, ray, ray.remote(_on_worker).options(**resources), setup))
    finally:
        if started:
            ray.shutdown()


def _in_cluster(
    ray: Any, task: Any, setup: Any, function: Callable[..., Iterator[Any]], items: Iterable[Any], *common: Any
) -> Iterator[Any]:
    shared = ray.put(common)
    waiting = [task.remote(setup, setup.hex(), function, shared, item) for item in items]
    try:
        while waiting:
            (first,), _ = ray.wait(waiting)
            if (reference := next(first, None)) is None:
                waiting.remove(first)
            else:
                yield ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, BillhookError):
            raise error.cause from None
        raise
    except ray.exceptions.RayError as error:
        raise BillhookError(
            f"--ray: a task was lost {RETRIES + 1} times ({first_line(error)}): its machine may lack memory"
        ) from error
    finally:
        for generator in waiting:  # without force: Ray 2.60 aborts this process if such a task has just ended
            ray.cancel(generator)


def _check_answers(address: str) -> None:
    """Try to connect to HOST:PORT first: Ray itself would wait for more than a minute."""
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
        f"--ray {address}: no Ray cluster answers ({why}): start one with 'ray start --head'; if it wants a token, "
        "set RAY_AUTH_MODE=token"
    )


def _room(machines: list[dict[str, float]], address: str, device: str) -> tuple[int, int, int]:
    """How many tasks run at a time, and cores and GPUs of each task.

    A task takes one GPU, or as many cores as the smallest machine has.
    """
    if torch.device("cpu" if device == "auto" else device).type == "cuda":
        machines = [machine for machine in machines if machine.get("GPU", 0) >= 1]
        tasks = [int(machine["GPU"]) for machine in machines]
        shares = (int(machine.get("CPU", 0)) // count for machine, count in zip(machines, tasks, strict=True))
        cores = min(shares, default=0)
        gpus = 1
    else:
        counts = [int(machine["CPU"]) for machine in machines if machine.get("CPU", 0) >= 1]
        cores, gpus = min(counts, default=0), 0
        tasks = [count // cores for count in counts]
    if not sum(tasks):
        raise BillhookError(f"--ray {address}: its machines have no free {'GPU' if gpus else 'core'}")
    return sum(tasks), cores, gpus


def _on_worker(
    setup: tuple[str, int, Callable[[], Any]],
    name: str,
    function: Callable[..., Iterator[Any]],
    common: tuple[Any, ...],
    item: Any,
) -> Iterator[Any]:
    code, cores, prepare = setup
    if code != cache.code_sha256():
        raise BillhookError("--ray: a worker has another version of billhook: install the same one on every machine")
    if _process.setup != name:
        torch.set_num_threads(max(1, cores))
        _process.state = prepare()
        _process.setup = name
    yield from function(_process.state, *common, item)
