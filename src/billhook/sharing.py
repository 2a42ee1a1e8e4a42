"""Cut a model in several processes: in the dense stream no layer sees what became of another, so each process takes some."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from safetensors.torch import load, save
from transformers import PreTrainedModel

from billhook import checkpoint
from billhook.crew import Hands, crew, portions
from billhook.cuts import Cut
from billhook.families import axes, layers
from billhook.methods.fasp import Piece, carry_out, pieces
from billhook.paging import held, is_paged
from billhook.plan import Plan
from billhook.progress import Clock, Tick, quiet
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
    clock: Clock | None = None,
    tick: Tick = quiet,
) -> list[Cut]:
    """Bit by bit what `fasp(stream="dense")` does by its `settings`, in processes that each take layers which follow one another.

    Raises:
        BillhookError: as `fasp` and `crew`.
    """
    clock = clock or Clock()
    given = (hands.name, str(model.device), hands.dtype, is_paged(model), tokens, plan, settings, scores or {})
    cuts: list[Cut] = []
    with clock("workers"), crew(hands, str(model.device), _open_worker, given) as (size, each):
        parts = portions(len(layers(model)), size)
        tick("pruning in workers", 0, len(parts))
        for n, found in enumerate(each(_work, parts)):
            for layer, said in found.items():
                with held(layers(model)[layer]):
                    cuts += _carried_out(model, plan, said, clock)
            tick("pruning in workers", n + 1, len(parts))
    drop_layers(model, plan.layers)
    return cuts


def _carried_out(model: PreTrainedModel, plan: Plan, said: list[Said], clock: Clock) -> list[Cut]:
    """Cut one layer as a worker says."""
    every = {(axis.kind, axis.reader.param): axis for axis in axes(model, plan.kinds)}
    found = []
    for kind, reader, units, packed, cut in said:
        drop = torch.tensor(units, dtype=torch.long)
        piece = Piece(every[kind, reader], drop, load(packed)["weight"].to(model.device), Cut(**cut))
        carry_out(model, piece, clock)
        found.append(piece.cut)
    return found


_worker: dict[str, Any] = {}  # of a process of its own: the model it has opened, and what to do


def _open_worker(name: str, device: str, dtype: str, stream: bool, *given: Any) -> None:
    _worker.update(model=checkpoint.open_model(name, device=device, dtype=dtype, stream=stream).model, given=given)


def _work(part: range) -> dict[int, list[Said]]:
    """What becomes of some layers, by layer."""
    found: dict[int, list[Said]] = {}
    for one in pieces(_worker["model"], *_worker["given"], at=part):
        packed = save({"weight": one.weight.cpu().contiguous()})
        said = (one.axis.kind, one.axis.reader.param, one.drop.tolist(), packed, asdict(one.cut))
        found.setdefault(one.axis.layer, []).append(said)
    return found
