"""Evaluate cuts of a model on windows of text, in place, in one process or several; losses are kept on disk."""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from billhook.checkpoints import load
from billhook.evaluation.perplexity import head_batches
from billhook.math.losses import divergence, most_likely, next_token
from billhook.models.axes import axes
from billhook.models.plan import WHOLE, AxisKey
from billhook.models.surgery import with_weight, without
from billhook.runtime import cache
from billhook.runtime.precision import autocast_dtype, computing
from billhook.runtime.progress import Tick, quiet
from billhook.runtime.workers import ParallelMap, Workers, worker_pool
from billhook.search.layer_blocks import Block, Patch
from billhook.search.metrics import digest
from billhook.tensors import Tokens

TOP_K = 256  # predictions of the unpruned model that kl compares, for each token
Mask = Mapping[AxisKey, Tensor]  # units that go, by place; an empty tensor at (n, "layers") drops layer n whole


@dataclass(frozen=True)
class Evaluator:
    """A model, and how cuts of it are evaluated."""

    model: PreTrainedModel
    objective: str  # a name in OBJECTIVES
    autocast: torch.dtype | None
    folder: Path | None  # where every loss is kept
    key: Mapping[str, Any]  # what decides a loss besides mask and windows
    each: ParallelMap | None = None  # distributes masks over workers that have opened the same model
    memory: dict[str, list[float]] = field(default_factory=dict)  # every loss so far, by the digest of its key
    patches: Mapping[Block, Patch] = field(default_factory=dict)  # weights that make up for dropped layers

    def losses(
        self, masks: Sequence[Mask], windows: Tokens, tick: Tick = quiet, stage: str = "trials"
    ) -> list[list[float]]:
        """The mean loss of every window (windows, length) under every mask; nothing is evaluated twice."""
        windows_sha256 = hashlib.sha256(windows.numpy().tobytes()).hexdigest()
        common = {**self.key, "objective": self.objective, "windows": windows_sha256}
        keys = [{**common, **self._mask_key(mask)} for mask in masks]
        missing = {key["mask"]: mask for key, mask in zip(keys, masks, strict=True) if not self._is_known(key)}
        measured = self._measure(list(missing.values()), windows, tick, stage)
        for key in keys:
            name = cache.digest(key)
            if name not in self.memory:
                self.memory[name] = cache.cached(self.folder, "trial", key, lambda: next(measured))
        return [self.memory[cache.digest(key)] for key in keys]

    def finished_losses(
        self, key: Mapping[str, Any], finish: Callable[[], PreTrainedModel], windows: Sequence[Tensor]
    ) -> list[list[float]]:
        """The next token's loss of the model that `finish` makes, on each of several parts (windows, length)."""

        def measure() -> list[list[float]]:
            model = finish()
            return [masked_losses(model, {}, part, None, None, self.autocast) for part in windows]

        seen = [cache.digest({"tokens": part.tolist()}) for part in windows]
        return cache.cached(self.folder, "final", {**key, "windows": seen}, measure)

    def _patch(self, mask: Mask) -> Patch | None:
        dropped = dropped_layers(mask)
        return self.patches.get((dropped[0], len(dropped))) if dropped else None

    def _mask_key(self, mask: Mask) -> dict[str, str]:
        patch = self._patch(mask)
        return {"mask": digest(mask), **({"patch": patch.sha256} if patch else {})}

    def _is_known(self, key: dict[str, Any]) -> bool:
        return cache.digest(key) in self.memory or cache.has(self.folder, "trial", key)

    def _measure(self, masks: Sequence[Mask], windows: Tokens, tick: Tick, stage: str) -> Iterator[list[float]]:
        targets = self.dense_predictions(windows) if masks and self.objective == "kl" else None
        if self.each is not None:
            items = [(dict(mask), self._patch(mask)) for mask in masks]
            for n, losses in enumerate(self.each(_losses_in_worker, items, windows, targets, self.autocast)):
                tick(stage, n + 1, len(masks))
                yield losses
            return
        for n, mask in enumerate(masks):
            tick(stage, n, len(masks))
            yield masked_losses(self.model, mask, windows, targets, self._patch(mask), self.autocast)

    @torch.inference_mode()
    def dense_predictions(self, windows: Tokens) -> list[tuple[Tensor, ...]]:
        """The unpruned model's likeliest tokens and their probabilities, batch by batch: what kl compares with."""
        device = self.model.device
        with computing(device, self.autocast):
            return [
                most_likely(self.model(batch.to(device), use_cache=False).logits[:, :-1], TOP_K)
                for batch in head_batches(windows)
            ]


def evaluator_of(model: PreTrainedModel, objective: str, folder: Path | None) -> Evaluator:
    """An evaluator without workers, in the precision in which the device is fastest."""
    autocast = autocast_dtype("auto", model.device)
    key = cache.model_key(model) | {"computed in": str(autocast or model.dtype)}
    return Evaluator(model, objective, autocast, folder, key)


@torch.inference_mode()
def masked_losses(
    model: PreTrainedModel,
    mask: Mask,
    windows: Tokens,
    targets: Sequence[tuple[Tensor, ...]] | None,
    patch: Patch | None,
    autocast: torch.dtype | None,
) -> list[float]:
    """The loss of the model without the units of `mask`, on each window; afterwards the model is as it was.

    Args:
        targets: predictions of the unpruned model, batch by batch, to measure the divergence from; None: the next
            token's loss.
        patch: a weight that makes up for the layers that go.
    """
    kinds = tuple(dict.fromkeys(kind for _, kind in mask if kind != WHOLE))
    dropped = [(axis, mask[axis.layer, axis.kind]) for axis in axes(model, kinds) if (axis.layer, axis.kind) in mask]
    losses: list[Tensor] = []  # read once: on an accelerator each value would be waited for
    patched = with_weight(model, patch.param, patch.weight) if patch else nullcontext()
    with patched, without(model, dropped, dropped_layers(mask)), computing(model.device, autocast):
        for n, batch in enumerate(head_batches(windows)):
            batch = batch.to(model.device)
            logits = model(batch, use_cache=False).logits
            for row in range(len(batch)):
                row_logits = logits[row : row + 1]
                if targets is None:
                    loss = next_token(row_logits, batch[row : row + 1])
                else:
                    loss = divergence(row_logits[:, :-1], *(target[row : row + 1] for target in targets[n]))
                losses.append(loss.mean())
    return torch.stack(losses).tolist() if losses else []


def dropped_layers(mask: Mask) -> tuple[int, ...]:
    """The layers that go whole."""
    return tuple(n for n, kind in mask if kind == WHOLE)


@contextmanager
def with_workers(evaluator: Evaluator, workers: Workers) -> Iterator[Evaluator]:
    """The same evaluator with all its processes at work, which share the cores."""
    if not workers.many:
        yield evaluator
        return
    device = workers.device(evaluator.model.device)
    how = {"dtype": workers.dtype, "family_row": workers.family_row}
    prepare = partial(load.open_model, workers.name, device=device, **how)
    with worker_pool(workers, device, prepare) as pool:
        yield replace(evaluator, each=pool.map)


def _losses_in_worker(
    opened: load.Opened, windows: Tokens, targets: Any, autocast: torch.dtype | None, item: tuple[Mask, Patch | None]
) -> list[float]:
    mask, patch = item
    return masked_losses(opened.model, mask, windows, targets, patch, autocast)
