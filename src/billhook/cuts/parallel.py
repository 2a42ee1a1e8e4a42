"""Cut a model in several processes:
in the dense stream no layer sees what became of another, so each process takes some."""

import itertools
from collections.abc import Callable, Collection, Iterator
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from safetensors.torch import load, save
from transformers import PreTrainedModel

from billhook.checkpoints.load import open_model
from billhook.cuts.narrowing import Piece, Settings, carry_out, pieces
from billhook.models.axes import axes
from billhook.models.families import layers
from billhook.models.plan import Cut, Plan, UnitScores
from billhook.models.surgery import drop_layers
from billhook.runtime.activations import Room
from billhook.runtime.offload import is_offloaded, loaded
from billhook.runtime.run import Finished, Run
from billhook.runtime.workers import portions, worker_pool
from billhook.tensors import Tokens

Said = tuple[str, str, list[int], bytes, dict[str, Any]]  # kind, reader, units that go, its new weight, the record


@torch.no_grad()
def shared(
    model: PreTrainedModel,
    tokens: Tokens,
    plan: Plan,
    settings: Settings,
    run: Run,
    scores: UnitScores | None = None,
) -> list[Cut]:
    """Bit by bit what `narrow` does in the dense stream, in processes that each take some layers.

    Raises:
        BillhookError: as `narrow` and `worker_pool`.
    """
    if plan.empty:
        return []
    cuts, given = [Cut(**one) for one in run.finished.found], (tokens, plan, settings, scores or {})
    for n, said in spread(model, _said, given, run, gone=plan.layers):
        every = {(axis.kind, axis.reader.param): axis for axis in axes(model, plan.kinds)}
        found = []
        with loaded(layers(model)[n]):
            for kind, reader, units, packed, cut in said:
                drop, weight = torch.tensor(units, dtype=torch.long), load(packed)["weight"].to(model.device)
                found.append(Piece(every[kind, reader], drop, weight, Cut(**cut)))
                carry_out(model, found[-1], run.clock)
            with run.clock("saving"):
                run.finished.save(n, [asdict(one.cut) for one in found], [(one.axis, one.drop) for one in found])
        cuts += [one.cut for one in found]
    drop_layers(model, plan.layers)
    return sorted(cuts, key=lambda one: one.layer)


def _said(
    model: PreTrainedModel,
    tokens: Tokens,
    plan: Plan,
    settings: Settings,
    scores: UnitScores,
    at: Collection[int],
    run: Run,
) -> Iterator[tuple[int, list[Said]]]:
    """What becomes of every layer `at`."""
    every = pieces(model, tokens, plan, settings, scores, at, run)
    for n, found in itertools.groupby(every, key=lambda one: one.axis.layer):
        yield n, [_plain(one) for one in found]


def _plain(one: Piece) -> Said:
    weight = save({"weight": one.weight.cpu().contiguous()})
    return one.axis.kind, one.axis.reader.param, one.drop.tolist(), weight, asdict(one.cut)


def spread(
    model: PreTrainedModel,
    work: Callable[..., Iterator[Any]],
    given: tuple[Any, ...],
    run: Run,
    gone: Collection[int] = (),
) -> Iterator[Any]:
    """What `work(model, *given, at, its_run)` yields in the workers of a run, as it comes.

    Layers that the run has finished are made what they became, and given to nobody; whoever takes what is yielded saves
    it there.

    Args:
        work: a generator that yields once for each of the layers `at`, of a model of its own; `its_run` has nothing
            finished, the same cache of Grams, and as much room for hidden states.
        gone: layers that nobody is to do.

    Raises:
        BillhookError: as `work` and `worker_pool`.
    """
    finished, workers, tick = run.finished, run.workers, run.tick
    for n in finished.records:
        finished.reload(n)
    total = len(layers(model))
    todo = [n for n in range(total) if n not in finished.records and n not in gone]
    device = workers.device(model.device)
    opens = {"name": workers.name, "device": device, "dtype": workers.dtype, "stream": is_offloaded(model)}
    opens |= {"family_row": workers.family_row}
    what = (opens, run.hidden.limit, work, given, finished.grams)
    tick("pruning in workers", total - len(todo), total)
    with run.clock("workers"), worker_pool(workers, device, partial(tuple, what)) as pool:
        parts = [[todo[n] for n in part] for part in portions(len(todo), pool.size)]
        for done, found in enumerate(pool.map_stream(_work, parts), total - len(todo) + 1):
            yield found
            tick("pruning in workers", done, total)
    tick("pruning in workers", total, total)


def _work(what: tuple[Any, ...], at: list[int]) -> Iterator[Any]:
    """What `work` yields of a model opened anew:
    a process may come to do several parts, and the layers before each are the unpruned ones."""
    opens, limit, work, given, grams = what
    model = open_model(**opens).model
    with torch.no_grad():
        yield from work(model, *given, at, Run(hidden=Room(limit), finished=Finished(grams)))
