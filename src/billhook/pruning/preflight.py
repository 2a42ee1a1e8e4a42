"""What cannot be done by the means that a prune was given, said before it computes anything."""

import shutil
from pathlib import Path
from typing import Any

import torch

from billhook.checkpoints.load import Opened
from billhook.errors import SettingsError
from billhook.models import sizes
from billhook.models.residual import embedding_and_head
from billhook.planning.recipe import Recipe
from billhook.runtime.offload import is_offloaded
from billhook.runtime.run import Run
from billhook.runtime.workers import Workers


def check_shared(recipe: Recipe, workers: Workers) -> None:
    """Refuse what one process alone can do.

    Raises:
        BillhookError: says what, and what to do.
    """
    if workers.ray and workers.jobs > 1:
        raise SettingsError("--ray: the cluster says how many processes there are: leave out --jobs")
    if why := recipe.method.why_alone(recipe):
        raise SettingsError(f"{workers.flag}: {why}")
    if recipe.budget.vocab_from:
        raise SettingsError(
            f"{workers.flag}: other processes would open the model with its whole vocabulary: leave it out with --vocab-from"
        )


def check_together(recipe: Recipe, run: Run) -> None:
    """Refuse what processes of `accelerate launch` cannot do together.

    Raises:
        BillhookError: says what, and what to do.
    """
    together = f"{run.peers.count} processes"
    if why := recipe.method.why_apart(recipe, run.peers.count):
        raise SettingsError(f"{together}: {why}")
    if recipe.budget.speedup is not None:
        raise SettingsError(f"{together}: each would time the model for itself: use --ratio or --params")
    for flag, given in (("--statistics", run.statistics), (run.workers.flag, run.workers.many)):
        if given:
            raise SettingsError(f"{flag}: {together} of accelerate launch share the work already: leave it out")


def why_whole(recipe: Recipe) -> str:
    """Why a prune needs all weights at once, or ''."""
    if recipe.budget.vocab_from:
        return "--vocab-from cuts the embedding table"
    if recipe.budget.speedup is not None:
        return "--speedup times the whole model"
    return recipe.method.why_whole(recipe)


def above(output: Path) -> Path:
    """The folder that is there, in which an output will be."""
    return next(one for one in output.expanduser().absolute().parents if one.exists())


def disk_bytes(model: Any, recipe: Recipe, computed: torch.dtype, stored: torch.dtype, gone: int = 0) -> int:
    """Of what a prune keeps while it works, and of a result without `gone` parameters."""
    return computed.itemsize * _kept(model, recipe) + stored.itemsize * (sizes.total_parameters(model) - gone)


def _kept(model: Any, recipe: Recipe) -> int:
    """Parameters that lie on the disk while it works, at most: all layers as they are done; of a stream that is cut in
    its files, all that was turned, and beside it what is cut, which layers that are done take the place of."""
    if not ("residual" in recipe.kinds and is_offloaded(model)):
        return sizes.decoder_parameters(model)
    embedding, head = embedding_and_head(model)
    chosen = recipe.settings
    rotates, restores = (getattr(chosen, name, False) for name in ("rotate", "restoration"))
    untied = embedding.weight.numel() if rotates and head.weight is embedding.weight else 0
    copies = 2 if rotates and restores else 1
    return copies * (sizes.total_parameters(model) + untied)


def check_room(opened: Opened, recipe: Recipe, work: Path) -> None:
    """Refuse a disk too small for what a prune keeps and for the result, before anything is computed."""
    model, there = opened.model, above(work)
    need = disk_bytes(model, recipe, model.dtype, opened.dtype)
    if (free := shutil.disk_usage(there).free) < need:
        raise SettingsError(
            f"{there} has {free / 1e9:,.2f} GB free, and this takes up to {need / 1e9:,.2f}, for the result and for its layers as they are "
            "done: free some, or choose another output"
        )
