"""Cut a model in several processes: in the dense stream no layer sees what became of another, so each process takes some."""

import itertools
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from safetensors.torch import load, save
from transformers import PreTrainedModel

from billhook.checkpoints.load import open_model
from billhook.checkpoints.resume import FinishedLayers
from billhook.cuts.narrowing import Piece, carry_out, pieces
from billhook.models.axes import axes
from billhook.models.families import layers
from billhook.models.plan import Cut, Plan
from billhook.models.surgery import drop_layers
from billhook.runtime import activations
from billhook.runtime.offload import is_offloaded, loaded
from billhook.runtime.progress import Clock, Tick, quiet
from billhook.runtime.workers import Workers, portions, worker_pool
from billhook.tensors import Scores, Tokens

Said = tuple[str, str, list[int], bytes, dict[str, Any]]  # kind, reader, units that go, its new weight, the record


@torch.no_grad()
def shared(
    model: PreTrainedModel,
    tokens: Tokens,
    plan: Plan,
    settings: Any,
    workers: Workers,
    *,
    scores: Mapping[tuple[int, str], Scores] | None = None,
    finished: FinishedLayers | None = None,
    clock: Clock | None = None,
    tick: Tick = quiet,
) -> list[Cut]:
    """Bit by bit what `narrow(stream="dense")` does by its `settings`, in processes that each take some layers.

    Args:
        finished: keeps every layer once it is done, and has those that an earlier run of the same work has.

    Raises:
        BillhookError: as `fasp` and `worker_pool`.
    """
    clock, finished = clock or Clock(), finished or FinishedLayers(None, model)
    cuts, given = [Cut(**one) for one in finished.found], (tokens, plan, settings, scores or {})
    for n, said in spread(model, workers, _said, given, finished, gone=plan.layers, clock=clock, tick=tick):
        every = {(axis.kind, axis.reader.param): axis for axis in axes(model, plan.kinds)}
        found = []
        with loaded(layers(model)[n]):
            for kind, reader, units, packed, cut in said:
                drop, weight = torch.tensor(units, dtype=torch.long), load(packed)["weight"].to(model.device)
                found.append(Piece(every[kind, reader], drop, weight, Cut(**cut)))
                carry_out(model, found[-1], clock)
            with clock("saving"):
                finished.save(n, [asdict(one.cut) for one in found], [(one.axis, one.drop) for one in found])
        cuts += [one.cut for one in found]
    drop_layers(model, plan.layers)
    return sorted(cuts, key=lambda one: one.layer)


def _said(
    model: PreTrainedModel,
    tokens: Tokens,
    plan: Plan,
    settings: Any,
    scores: Mapping[tuple[int, str], Scores],
    at: Collection[int],
    finished: FinishedLayers,
) -> Iterator[tuple[int, list[Said]]]:
    """What becomes of every layer `at`."""
    every = pieces(model, tokens, plan, settings, scores, at=at, finished=finished)
    for n, found in itertools.groupby(every, key=lambda one: one.axis.layer):
        yield n, [_plain(one) for one in found]


def _plain(one: Piece) -> Said:
    weight = save({"weight": one.weight.cpu().contiguous()})
    return one.axis.kind, one.axis.reader.param, one.drop.tolist(), weight, asdict(one.cut)


def spread(
    model: PreTrainedModel,
    workers: Workers,
    work: Callable[..., Iterator[Any]],
    given: tuple[Any, ...],
    finished: FinishedLayers,
    *,
    gone: Collection[int] = (),
    clock: Clock,
    tick: Tick,
) -> Iterator[Any]:
    """What `work(model, *given, at, empty)` yields in the processes, as it comes, where `at` are layers that one of them has.

    Args:
        work: a generator that yields once for each layer, of a model of its own; `empty` is a `FinishedLayers` of it with the same Grams.
        finished: layers that are made what they became, and given to nobody; whoever takes what is yielded saves it there.
        gone: layers that nobody is to do.

    Raises:
        BillhookError: as `work` and `worker_pool`.
    """
    for n in finished.records:
        finished.reload(n)
    total = len(layers(model))
    todo = [n for n in range(total) if n not in finished.records and n not in gone]
    opens = {"name": workers.name, "device": str(model.device), "dtype": workers.dtype, "stream": is_offloaded(model)}
    what = (opens, activations.limit(), work, given, finished.grams)
    tick("pruning in workers", total - len(todo), total)
    with clock("workers"), worker_pool(workers, str(model.device), partial(tuple, what)) as pool:
        parts = [[todo[n] for n in part] for part in portions(len(todo), pool.size)]
        for done, found in enumerate(pool.map_stream(_work, parts), total - len(todo) + 1):
            yield found
            tick("pruning in workers", done, total)
    tick("pruning in workers", total, total)


def _work(what: tuple[Any, ...], at: list[int]) -> Iterator[Any]:
    """What `work` yields of a model opened anew: a process may come to do several parts, and the layers before each are the unpruned ones."""
    opens, limit, work, given, grams = what
    model = open_model(**opens).model
    with torch.no_grad(), activations.budget(limit):
        yield from work(model, *given, at, FinishedLayers(None, model, grams))
