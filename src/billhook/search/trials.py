"""Try cuts of a model on windows of text: in place, one after the other or in several processes, each on disk once and for all."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from billhook.checkpoints import load
from billhook.math.losses import divergence, most_likely, next_token
from billhook.models.axes import axes
from billhook.models.plan import AxisKey
from billhook.models.surgery import with_weight, without
from billhook.runtime import cache
from billhook.runtime.precision import autocast_dtype, computing
from billhook.runtime.progress import Tick, quiet
from billhook.runtime.workers import ONE_PROCESS, ParallelMap, Workers, worker_pool
from billhook.search.layer_blocks import Block, Patch
from billhook.search.metrics import digest
from billhook.tensors import Tokens

OBJECTIVES = {
    "nll": "the cut model's loss on the next token",
    "kl": "its divergence from the unpruned model's predictions",
}
TOP_K = 256  # predictions of the unpruned model that are kept of each token, for kl
BATCH_TOKENS = 2048
WHOLE = "layers"
Mask = Mapping[AxisKey, Tensor]  # units that go; an empty one at (n, "layers"): layer n goes whole


@dataclass(frozen=True)
class Bench:
    """A model, and how cuts of it are tried."""

    model: PreTrainedModel
    objective: str
    autocast: torch.dtype | None
    folder: Path | None  # keeps every loss
    key: Mapping[str, Any]  # what decides them besides mask and windows
    each: ParallelMap | None = None  # has workers try them that have the same model
    memory: dict[str, list[float]] = field(default_factory=dict)  # of the losses, folder or not
    patches: Mapping[Block, Patch] = field(default_factory=dict)  # what makes up for whole layers that go

    def losses(
        self, masks: Sequence[Mask], windows: Tokens, tick: Tick = quiet, stage: str = "trials"
    ) -> list[list[float]]:
        """The mean loss of every window (windows, length) under every mask; no mask is ever tried on the same windows twice."""
        seen = hashlib.sha256(windows.numpy().tobytes()).hexdigest()
        keys = [{**self.key, "objective": self.objective, "windows": seen, **self._said(mask)} for mask in masks]
        missing = {key["mask"]: mask for key, mask in zip(keys, masks, strict=True) if not self._known(key)}
        fresh = self._tried(list(missing.values()), windows, tick, stage)
        for key in keys:
            name = cache.digest(key)
            if name not in self.memory:
                self.memory[name] = cache.cached(self.folder, "trial", key, lambda: next(fresh))
        return [self.memory[cache.digest(key)] for key in keys]

    def _patch(self, mask: Mask) -> Patch | None:
        gone = gone_in(mask)
        return self.patches.get((gone[0], len(gone))) if gone else None

    def _said(self, mask: Mask) -> dict[str, str]:
        patch = self._patch(mask)
        return {"mask": digest(mask), **({"patch": patch.sha256} if patch else {})}

    def _known(self, key: dict[str, Any]) -> bool:
        return cache.digest(key) in self.memory or cache.has(self.folder, "trial", key)

    def _tried(self, masks: Sequence[Mask], windows: Tokens, tick: Tick, stage: str) -> Iterator[list[float]]:
        taught = self.taught(windows) if masks and self.objective == "kl" else None
        if self.each is not None:
            given = [(dict(mask), self._patch(mask)) for mask in masks]
            for n, found in enumerate(self.each(_in_worker, given, windows, taught)):
                tick(stage, n + 1, len(masks))
                yield found
            return
        for n, mask in enumerate(masks):
            tick(stage, n, len(masks))
            yield tried(self.model, mask, windows, taught, self._patch(mask), self.autocast)

    @torch.inference_mode()
    def taught(self, windows: Tokens) -> list[tuple[Tensor, ...]]:
        """The unpruned model's predictions, batch by batch."""
        with computing(self.model.device, self.autocast):
            return [
                most_likely(self.model(b.to(self.model.device), use_cache=False).logits[:, :-1], TOP_K)
                for b in _batches(windows)
            ]


def bench_of(model: PreTrainedModel, objective: str, folder: Path | None) -> Bench:
    """A bench without workers, which computes as fast as the device can."""
    autocast = autocast_dtype("auto", model.device)
    key = cache.model_key(model) | {"computed in": str(autocast or model.dtype)}
    return Bench(model, objective, autocast, folder, key)


@torch.inference_mode()
def tried(
    model: PreTrainedModel,
    mask: Mask,
    windows: Tokens,
    taught: Sequence[tuple[Tensor, ...]] | None,
    patch: Patch | None,
    autocast: torch.dtype | None,
) -> list[float]:
    """Of every window, the loss of the model without the units of `mask`; the model is as it was afterwards."""
    gone = gone_in(mask)
    kinds = tuple(dict.fromkeys(kind for _, kind in mask if kind != WHOLE))
    dropped = [(axis, mask[axis.layer, axis.kind]) for axis in axes(model, kinds) if (axis.layer, axis.kind) in mask]
    found: list[float] = []
    patched = with_weight(model, patch.param, patch.weight) if patch else nullcontext()
    with patched, without(model, dropped, gone), computing(model.device, autocast):
        for n, batch in enumerate(_batches(windows)):
            batch = batch.to(model.device)
            logits = model(batch, use_cache=False).logits
            for row in range(len(batch)):
                own = logits[row : row + 1]
                if taught is None:
                    loss = next_token(own, batch[row : row + 1])
                else:
                    loss = divergence(own[:, :-1], *(each[row : row + 1] for each in taught[n]))
                found.append(loss.mean().item())
    return found


def gone_in(mask: Mask) -> tuple[int, ...]:
    """The layers that go whole."""
    return tuple(n for n, kind in mask if kind == WHOLE)


def _batches(windows: Tokens) -> Sequence[Tensor]:
    return windows.split(max(1, BATCH_TOKENS // windows.shape[1]))


@dataclass(frozen=True)
class Means:
    """By what means a search is carried out; none of it decides the result.

    `study` is a folder that belongs to one search: it goes on there after a kill, and another one is refused unless `fresh`.
    """

    study: Path | None = None
    fresh: bool = False
    workers: Workers = ONE_PROCESS


@contextmanager
def workers(bench: Bench, workers: Workers) -> Iterator[Bench]:
    """The same bench with all its processes at work, which share the cores."""
    if not workers.many:
        yield bench
        return
    device = str(bench.model.device)
    with worker_pool(workers, device, _open_worker, (workers.name, device, workers.dtype, bench.autocast)) as pool:
        yield replace(bench, each=pool.map)


_worker: dict[str, Any] = {}  # of a process of its own: the model it has opened


def _open_worker(name: str, device: str, dtype: str, autocast: torch.dtype | None) -> None:
    _worker.update(model=load.open_model(name, device=device, dtype=dtype).model, autocast=autocast)


def _in_worker(windows: Tokens, taught: Any, given: tuple[Mask, Patch | None]) -> list[float]:
    mask, patch = given
    return tried(_worker["model"], mask, windows, taught, patch, _worker["autocast"])
