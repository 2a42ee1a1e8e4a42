"""Cut a model in several processes: in the dense stream no layer sees what became of another, so each process takes some."""

import itertools
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict
from typing import Any

import torch
from safetensors.torch import load, save
from transformers import PreTrainedModel

from billhook.crew import Hands
from billhook.cuts import Cut
from billhook.families import axes, layers
from billhook.journal import Journal
from billhook.methods.fasp import Piece, carry_out, pieces
from billhook.paging import held
from billhook.plan import Plan
from billhook.progress import Clock, Tick, quiet
from billhook.spreading import spread
from billhook.surgery import drop_layers
from billhook.tensors import Scores, Tokens

Said = tuple[str, str, list[int], bytes, dict[str, Any]]  # kind, reader, units that go, its new weight, the record


@torch.no_grad()
def shared(
    model: PreTrainedModel,
    tokens: Tokens,
    plan: Plan,
    settings: Any,
    hands: Hands,
    *,
    scores: Mapping[tuple[int, str], Scores] | None = None,
    journal: Journal | None = None,
    clock: Clock | None = None,
    tick: Tick = quiet,
) -> list[Cut]:
    """Bit by bit what `fasp(stream="dense")` does by its `settings`, in processes that each take some layers.

    Args:
        journal: keeps every layer once it is done, and has those that an earlier run of the same work has.

    Raises:
        BillhookError: as `fasp` and `crew`.
    """
    clock, journal = clock or Clock(), journal or Journal(None, model)
    cuts, given = [Cut(**one) for one in journal.found], (tokens, plan, settings, scores or {})
    for n, said in spread(model, hands, _said, given, journal, gone=plan.layers, clock=clock, tick=tick):
        every = {(axis.kind, axis.reader.param): axis for axis in axes(model, plan.kinds)}
        found = []
        with held(layers(model)[n]):
            for kind, reader, units, packed, cut in said:
                drop, weight = torch.tensor(units, dtype=torch.long), load(packed)["weight"].to(model.device)
                found.append(Piece(every[kind, reader], drop, weight, Cut(**cut)))
                carry_out(model, found[-1], clock)
            with clock("saving"):
                journal.commit(n, [asdict(one.cut) for one in found], [(one.axis, one.drop) for one in found])
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
    journal: Journal,
) -> Iterator[tuple[int, list[Said]]]:
    """What becomes of every layer `at`."""
    every = pieces(model, tokens, plan, settings, scores, at=at, finished=journal)
    for n, found in itertools.groupby(every, key=lambda one: one.axis.layer):
        yield n, [_plain(one) for one in found]


def _plain(one: Piece) -> Said:
    weight = save({"weight": one.weight.cpu().contiguous()})
    return one.axis.kind, one.axis.reader.param, one.drop.tolist(), weight, asdict(one.cut)
