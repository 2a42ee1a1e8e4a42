"""What cannot be done by the means that a prune was given, said before it computes anything."""

import shutil
from pathlib import Path
from typing import Any

import torch

from billhook.checkpoints.load import Opened
from billhook.choices import GRADIENT_SCORES
from billhook.errors import BillhookError
from billhook.models import sizes
from billhook.models.residual import embedding_and_head
from billhook.pruning.carry_out import MANY_PLANS
from billhook.pruning.recipe import Recipe
from billhook.runtime.offload import is_offloaded
from billhook.runtime.workers import Workers


def check_shared(chosen: Recipe, workers: Workers) -> None:
    """Refuse what one process alone can do.

    Raises:
        BillhookError: says what, and what to do.
    """
    says, one = workers.flag, "leave it out"
    layers_alone = chosen.method in MANY_PLANS
    refused = {
        "--ray: the cluster says how many processes there are: leave out --jobs": bool(workers.ray)
        and workers.jobs > 1,
        f"{says}: {chosen.method} works in one process; fasp in the dense stream, methods that make zeros and adapruner share "
        "their work": not (chosen.searches or chosen.masks or layers_alone),
        f"{says}: in the stream {chosen.stream} a layer sees what became of those before: use --stream dense, or {one}": layers_alone
        and not chosen.searches
        and chosen.stream != "dense",
        f"{says}: the search for a metric of zeros works in one process: {one}": chosen.shears,
        f"{says}: other processes would open the model with its whole vocabulary: {one} with --vocab-from": bool(
            chosen.vocab_from
        ),
    }
    if why := next((why for why, so in refused.items() if so), ""):
        raise BillhookError(why)


def why_whole(chosen: Recipe) -> str:
    """Why a prune needs all weights at once, or ''."""
    reasons = {
        "a search tries candidates on the whole model": chosen.searches or chosen.shears,
        "--select healed trains candidates": chosen.select == "healed",
        "--vocab-from cuts the embedding table": bool(chosen.vocab_from),
        "--speedup times the whole model": chosen.speedup is not None,
        f"allocation {chosen.allocation} tries cuts on the whole model": chosen.allocation
        in ("sensitivity", "auto", "global"),
        f"score {chosen.score} needs gradients of the whole model": chosen.score in GRADIENT_SCORES,
        f"preset {chosen.preset} needs gradients of the whole model": chosen.chops and chosen.preset == "taylor",
    }
    return next((why for why, so in reasons.items() if so), "")


def above(output: Path) -> Path:
    """The folder that is there, in which an output will be."""
    return next(one for one in output.expanduser().absolute().parents if one.exists())


def disk_bytes(model: Any, chosen: Recipe, computed: torch.dtype, stored: torch.dtype, gone: int = 0) -> int:
    """Of what a prune keeps while it works, and of a result without `gone` parameters."""
    return computed.itemsize * _kept(model, chosen) + stored.itemsize * (sizes.total_parameters(model) - gone)


def _kept(model: Any, chosen: Recipe) -> int:
    """Parameters that lie on the disk while it works, at most: all layers as they are done; of a stream that is cut in its files,
    all that was turned, and beside it what is cut, which layers that are done take the place of."""
    if not (chosen.slices and is_offloaded(model)):
        return sizes.decoder_parameters(model)
    embedding, head = embedding_and_head(model)
    untied = embedding.weight.numel() if chosen.rotate and head.weight is embedding.weight else 0
    copies = 2 if chosen.rotate and chosen.restoration else 1
    return copies * (sizes.total_parameters(model) + untied)


def check_room(opened: Opened, chosen: Recipe, work: Path) -> None:
    """Refuse a disk too small for what a prune keeps and for the result, before anything is computed."""
    model, there = opened.model, above(work)
    need = disk_bytes(model, chosen, model.dtype, opened.dtype)
    if (free := shutil.disk_usage(there).free) < need:
        raise BillhookError(
            f"{there} has {free / 1e9:,.2f} GB free, and this takes up to {need / 1e9:,.2f}, for the result and for its layers as they are "
            "done: free some, or choose another output"
        )
