"""Work in several processes: of this machine, or of a Ray cluster, which places it and does again what a dead worker had.

    with crew(hands, "cpu", open_worker, (name, dtype)) as gang:
        for found in gang.each(function, items):  # in the order of the items
            ...
        for found in gang.flow(generator, items):  # what the generator yields for any of them, as it comes
            ...

`prepare(*given)` is called once in every process, which then may keep what it made in a global of its module.  ray is an
optional extra, `pip install 'billhook[ray]'`; only this module knows it.
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

RETRIES = 3  # of what a worker had that died
PATIENCE = 5.0  # seconds for a Ray address to answer
ParallelMap = Callable[..., Iterator[Any]]  # (function, items, *common): function(*common, item) of each


@dataclass(frozen=True)
class Workers:
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
    def flag(self) -> str:
        """The flag that asked for them."""
        return "--ray" if self.ray else "--jobs"


ONE_PROCESS = Workers()


@dataclass(frozen=True)
class WorkerPool:
    """Processes that wait for work."""

    size: int
    map_stream: ParallelMap  # function is a generator; what it yields for all items, those of one item in order

    def map(self, function: Callable[..., Any], items: Iterable[Any], *common: Any) -> Iterator[Any]:
        """`function(*common, item)` of each item, in the order of the items."""
        early, due = dict[int, Any](), 0
        for n, found in self.map_stream(_numbered, enumerate(items), function, *common):
            early[n] = found
            while due in early:
                yield early.pop(due)
                due += 1


def _numbered(function: Callable[..., Any], *given: Any) -> Iterator[tuple[int, Any]]:
    *common, (n, item) = given
    yield n, function(*common, item)


def portions(total: int, count: int) -> list[range]:
    """`total` things in at most `count` runs that follow one another, as even as can be."""
    count = min(count, total)
    return [range(total * n // count, total * (n + 1) // count) for n in range(count)]


@contextmanager
def worker_pool(
    workers: Workers, device: str, prepare: Callable[..., None], given: tuple[Any, ...]
) -> Iterator[WorkerPool]:
    """Processes, each prepared when it is first needed.

    Args:
        device: what they compute on: a Ray task takes a GPU where this is one, else all cores of a machine.

    Raises:
        BillhookError: no Ray cluster answers, or one without room or with another version; a process died for good.
    """
    if workers.ray:
        with _cluster(workers.ray, device, prepare, given) as found:
            yield found
        return
    threads = max(1, torch.get_num_threads() // workers.jobs)
    one = functools.partial(
        ProcessPoolExecutor, 1, multiprocessing.get_context("spawn"), _prepared, (threads, prepare, given)
    )
    with ExitStack() as stack:
        yield WorkerPool(
            workers.jobs, functools.partial(_flow, [stack.enter_context(one()) for _ in range(workers.jobs)])
        )


def _flow(
    idle: Sequence[ProcessPoolExecutor], function: Callable[..., Iterator[Any]], items: Iterable[Any], *common: Any
) -> Iterator[Any]:
    """Pools of one process, for a generator goes on where it began; each makes the next thing while the last is used."""
    todo, busy = iter(items), dict[Future[list[Any]], ProcessPoolExecutor]()
    try:
        while True:
            for pool, item in zip(idle, todo, strict=False):  # a pool first, or an item would be lost
                with _heard_by_this_process_alone():  # a process starts with its first work
                    busy[pool.submit(_step, functools.partial(function, *common, item))] = pool
            if not busy:
                return
            idle = []
            for future in wait(busy, return_when=FIRST_COMPLETED).done:
                pool = busy.pop(future)
                if found := future.result():
                    busy[pool.submit(_step)] = pool
                    yield found[0]
                else:
                    idle.append(pool)
    except BrokenProcessPool as error:
        raise BillhookError("--jobs: a worker process died, perhaps for want of memory: use fewer jobs") from error


@contextmanager
def _heard_by_this_process_alone() -> Iterator[None]:
    """A terminal sends Ctrl-C to all processes of a command: those that are started now leave it to this one."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGHUP})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


_begun: list[Iterator[Any]] = []  # the generator that this process is at


def _step(begins: Callable[[], Iterator[Any]] | None = None) -> list[Any]:
    """The next thing of the generator that `begins`, or of the one before; nothing at its end."""
    if begins is not None:
        _begun[:] = [begins()]
    return list(itertools.islice(_begun[0], 1))


def _prepared(threads: int, prepare: Callable[..., None], given: tuple[Any, ...]) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    signal.signal(signal.SIGTERM, _end)
    here = ExitStack()
    here.enter_context(scratch())
    Finalize(None, here.close, exitpriority=0)
    torch.set_num_threads(threads)
    logging.getLogger("billhook").setLevel(logging.ERROR)  # what it warns of was said by the process that began
    prepare(*given)


def _end_with_parent() -> None:
    """A process that waits for work is told that there will be none, but not by one that was killed; and holds a model."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    _end()


def _end(*_: object) -> NoReturn:
    """At once, with what must not outlive a process gone."""
    signals.run_cleanups()
    os._exit(1)


@contextmanager
def _cluster(address: str, device: str, prepare: Callable[..., None], given: tuple[Any, ...]) -> Iterator[WorkerPool]:
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
        how = {"num_cpus": cores, "num_gpus": gpus, "max_retries": RETRIES, "num_returns": "streaming"}
        setup = ray.put((cache.code_sha256(), cores, prepare, given))
        yield WorkerPool(size, functools.partial(_in_cluster, ray, ray.remote(_on_a_worker).options(**how), setup))
    finally:
        if own:
            ray.shutdown()


def _in_cluster(
    ray: Any, task: Any, setup: Any, function: Callable[..., Iterator[Any]], items: Iterable[Any], *common: Any
) -> Iterator[Any]:
    shared = ray.put(common)
    waiting = [task.remote(setup, setup.hex(), function, shared, item) for item in items]
    try:
        while waiting:
            (first,), _ = ray.wait(waiting)
            if (one := next(first, None)) is None:
                waiting.remove(first)
            else:
                yield ray.get(one)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, BillhookError):
            raise error.cause from None
        raise
    except ray.exceptions.RayError as error:
        raise BillhookError(
            f"--ray: a task was lost {RETRIES + 1} times ({first_line(error)}): its machine may lack memory"
        ) from error
    finally:
        for one in waiting:  # not by force: Ray 2.60 aborts this process where such a task has just ended
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
    function: Callable[..., Iterator[Any]],
    common: tuple[Any, ...],
    item: Any,
) -> Iterator[Any]:
    code, cores, prepare, given = setup
    if code != cache.code_sha256():
        raise BillhookError("--ray: a worker has another version of billhook: install the same one on every machine")
    if _ready.get("name") != name:
        torch.set_num_threads(max(1, cores))
        prepare(*given)
        _ready["name"] = name
    yield from function(*common, item)
