"""Layers of a model that see nothing of one another, each done by one of several processes, and kept as it comes back."""

from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from transformers import PreTrainedModel

from billhook import checkpoint, hidden
from billhook.crew import Hands, crew, portions
from billhook.families import layers
from billhook.journal import Journal
from billhook.paging import is_paged
from billhook.progress import Clock, Tick


def spread(
    model: PreTrainedModel,
    hands: Hands,
    work: Callable[..., Iterator[Any]],
    given: tuple[Any, ...],
    journal: Journal,
    *,
    gone: Collection[int] = (),
    clock: Clock,
    tick: Tick,
) -> Iterator[Any]:
    """What `work(model, *given, at, empty)` yields in the processes, as it comes, where `at` are layers that one of them has.

    Args:
        work: a generator that yields once for each layer, of a model of its own; `empty` is a journal of it with the same Grams.
        journal: layers that are made what they became, and given to nobody; whoever takes what is yielded commits it there.
        gone: layers that nobody is to do.

    Raises:
        BillhookError: as `work` and `crew`.
    """
    for n in journal.records:
        journal.replay(n)
    total = len(layers(model))
    todo = [n for n in range(total) if n not in journal.records and n not in gone]
    opens = {"name": hands.name, "device": str(model.device), "dtype": hands.dtype, "stream": is_paged(model)}
    what = (opens, hidden.limit(), work, given, journal.grams)
    tick("pruning in workers", total - len(todo), total)
    with clock("workers"), crew(hands, str(model.device), _prepare, what) as gang:
        parts = [[todo[n] for n in part] for part in portions(len(todo), gang.size)]
        for done, found in enumerate(gang.flow(_work, parts), total - len(todo) + 1):
            yield found
            tick("pruning in workers", done, total)
    tick("pruning in workers", total, total)


_worker: dict[str, tuple[Any, ...]] = {}  # of a process of its own: how to open the model, and what to do


def _prepare(*what: Any) -> None:
    _worker["what"] = what


def _work(at: list[int]) -> Iterator[Any]:
    """Of a model opened anew: a process may come to do several parts, and the layers before each are the unpruned ones."""
    opens, limit, work, given, grams = _worker["what"]
    model = checkpoint.open_model(**opens).model
    with torch.no_grad(), hidden.budget(limit):
        yield from work(model, *given, at, Journal(None, model, grams))
