"""LLM-ROM: the last layers' weights become two thin ones, by what they put out (`billhook.cuts.low_rank`)."""

from functools import partial
from math import ceil
from typing import Any

from billhook.choices import EXPERT_STREAMS
from billhook.cuts.settings import Factoring
from billhook.errors import SettingsError
from billhook.methods.factored import Factored, moment
from billhook.methods.narrowed import stream
from billhook.planning.method import MethodSettings, Opened, Planned, Run, Texts
from billhook.planning.recipe import Recipe
from billhook.runtime.options import option

# the paper's three sizes: share of the decoder that is kept -> share of the layers, the last ones, that are factored
PUBLISHED = {1.0: 0.0, 0.9: 8 / 32, 0.8: 12 / 32, 0.5: 24 / 32, 0.0: 1.0}


class RomSettings(MethodSettings):
    """What may be chosen; why these defaults: docs/methods/rom.md."""

    moment: str = moment(Factoring.moment)
    stream: str = stream(Factoring.stream, EXPERT_STREAMS)
    last: int | None = option(None, "how many layers, the last ones, are factored", ge=1, shown="as in the paper")


class Rom(Factored):
    name = "rom"
    title = "Rethinking Compression: Reduced Order Modelling of Latent Features in Large Language Models"
    paper = "arXiv:2312.07046"
    does = (
        "Goes through the last layers and replaces each of their weights by two thin ones: the principal axes of what it puts out, "
        "and the weight seen from them, at one share of the entries for all. Every layer sees what became of those before. "
        "--moment plain is truncated SVD."
    )
    costs = "one forward pass, and an eigendecomposition for each weight"
    example = "billhook prune demo --method rom --ratio 0.2 --layout per_layer -o smaller"
    Settings = RomSettings

    def plan(self, opened: Opened, recipe: Recipe, texts: Texts, run: Run) -> Planned:
        from billhook.planning.budget import solved

        chosen: RomSettings = recipe.settings
        plan = solved(opened, recipe, planner(opened.model, chosen.last), run.tick)
        return Planned(plan, Factoring(chosen.moment, chosen.stream))


def planner(model: Any, last: int | None) -> Any:
    """From parameters to save to one share for all weights of the `last` layers; None: of as many as in the paper.

    Where factors of the smallest ranks save too little in these, more layers are factored.

    Raises:
        BillhookError: there are not so many layers.
    """
    import numpy as np

    from billhook.models.families import layers
    from billhook.models.sizes import decoder_parameters, saved_by
    from billhook.planning.budget import Planner
    from billhook.planning.rank_plan import fitting, rank_plan, weights

    every, total, decoder = weights(model), len(layers(model)), decoder_parameters(model)
    if last is not None and last > total:
        raise SettingsError(f"--last {last}: the model has {total} layers")

    def of_last(count: int, share: float) -> Any:
        return rank_plan(model, {path: share for path, (n, _) in every.items() if n >= total - count})

    def most(count: int) -> int:
        return saved_by(model, of_last(count, 0.0))

    def make(saving: float | int) -> Any:
        kept = sorted(PUBLISHED)
        count = last or ceil(total * np.interp(1 - saving / decoder, kept, [PUBLISHED[one] for one in kept]))
        while last is None and count < total and most(count) < saving:
            count += 1
        return fitting(model, partial(of_last, count), saving)

    return Planner(make, most(last or total), 1)


METHOD = Rom()
