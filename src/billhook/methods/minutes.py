"""What `auto` may spend, and what each part of it costs: counted in windows that pass a layer, before any of it is
done."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from billhook.errors import SettingsError
from billhook.planning.method import Passes, Price
from billhook.planning.recipe import Calibration
from billhook.runtime.progress import least_seconds

EFFORTS = {
    "quick": "one way to cut, whole layers where they can be had; one pass of refinement",
    "normal": "up to three ways, each fitted on a quarter of the windows",
    "thorough": "every way, each fitted on all windows; a longer refinement",
}


@dataclass(frozen=True)
class Effort:
    """What may be spent."""

    rivals: int  # the most cuts to try
    trial: float | int  # share of the calibration windows that a trial is fitted on
    blocks: int  # probe windows by which blocks of layers, or curves of layers, are measured
    passes: float | int  # of the refinement over the calibration windows
    share: float = 1.0  # of the calibration windows that are used at all
    seconds: float | None = None  # that the refinement may take, if its passes take longer

    def within(self, work: "Work", price: Price) -> "Effort":
        """The same, with as many passes as the seconds let it have."""
        if self.seconds is None:
            return self
        each = Passes(self.share * work.windows * work.span * TRAINED).seconds(*price())
        return replace(self, passes=min(self.passes, self.seconds / each))


SPENT = {
    "quick": Effort(rivals=1, trial=0.25, blocks=1, passes=1.0),
    "normal": Effort(rivals=3, trial=0.25, blocks=2, passes=2.0),
    "thorough": Effort(rivals=8, trial=1.0, blocks=8, passes=4.0),
}
MOST = 8.0  # passes of a refinement that has time left
LEAST = 1.0  # a pass that has to fit before more is tried
SOLVE = 10  # operations of a refit, in cubes of the width that it reads
FEWER = 0.5, 0.25  # shares of the windows that are used where all would take too long
SPAN = 10  # layers that are refined together: `billhook.training.refinement`, which brings torch
TRAINED = 5  # passes that a step of training costs: forth, back, Adam
STREAMS = 2  # of hidden states, in a fit: the unpruned model's and the cut one's
BEFORE = 2 / 3  # of the layers, which a patch has to see: those up to the end of the gap
POINTS = 8  # of a curve's counts, over FFN channels and KV groups
LOOKED = 40  # windows' worth of a whole model that the two looks take: most of it is text, token by token


@dataclass(frozen=True)
class Work:
    """What decides the cost: of the model, of the cut, and of the text."""

    layers: int
    gone: int  # layers that go whole
    windows: int
    probes: int
    span: int  # layers in a refined span
    solve: float  # a refit of one layer's FFN, in windows that pass a layer
    patched: bool  # whether nothing but whole layers goes

    @classmethod
    def of(cls, model: Any, plan: Any, read: Calibration) -> "Work":
        from billhook.models.axes import axes
        from billhook.models.families import layers
        from billhook.models.sizes import layer_parameters

        total = len(layers(model))
        widths = [axis.units for axis in axes(model, ("ffn",)) if axis.layer == total - 1]
        solve = SOLVE * sum(width**3 for width in widths) / (2 * read.seq_len * layer_parameters(model, total - 1))
        patched = not any(plan.drops.values())
        span = min(SPAN if patched else total, total - len(plan.layers))
        return cls(total, len(plan.layers), read.samples, read.probes, span, solve, patched)

    def stages(self, effort: Effort, rivals: Collection[str], refined: bool, looks: bool) -> Mapping[str, Passes]:
        """Every stage, but for the cut of widths, which a rehearsal times better."""
        total, windows, found = self.layers, max(2, round(effort.share * self.windows)), dict[str, Passes]()
        starts = range(1, total - self.gone) if self.gone else range(0)
        blocks = min(effort.blocks, self.probes)
        if starts:
            found["layers"] = Passes(
                blocks * (total + sum(total - self.gone - n for n in starts)), blocks * len(starts)
            )
        if any("uneven" in name for name in rivals):
            curve = Passes(POINTS * blocks * total * total / 2 + total * POINTS * self.solve, POINTS * blocks * total)
            found["sensitivity"] = curve
        if len(rivals) > 1:
            fits = len(rivals) * (STREAMS + 1) * effort.trial * windows * total
            solves = sum(total if "widths" in name else 1 for name in rivals) * self.solve
            probes = (1 + len(rivals)) * self.probes
            spans = sum(total if "widths" in name else min(SPAN, total) for name in rivals)
            refining = effort.trial * windows * (TRAINED * spans + len(rivals) * total) if refined else 0
            found["trials"] = Passes(fits + solves + refining + probes * total, probes)
        if self.patched:
            found["patch"] = Passes(STREAMS * windows * total * BEFORE + self.solve)
        if refined:
            found["goals"] = Passes(windows * total)
            found["refinement"] = Passes(effort.passes * windows * self.span * TRAINED)
        if looks:
            found["look"] = Passes(LOOKED * total, LOOKED)
        return found


def spent(
    minutes: float | int, work: Work, rivals: Collection[str], asked: tuple[bool, bool], price: tuple[float, float]
) -> Effort:
    """The greatest effort whose parts, and a pass of refinement, fit into the minutes; the refinement has what is left.

    Args:
        asked: whether it is refined, and whether it ends with a look.
        price: seconds of a window through a layer, and through the head.

    Raises:
        SettingsError: the quickest cut takes longer.
    """
    took, whole = 0.0, 60 * minutes
    for effort in (*reversed(SPENT.values()), *(replace(SPENT["quick"], share=share) for share in FEWER)):
        windows = max(2, round(effort.share * work.windows))
        stages = work.stages(replace(effort, passes=LEAST), list(rivals)[: effort.rivals], *asked)
        widths = Passes(0 if work.patched else ((STREAMS + 1) * windows + work.solve) * work.layers)
        took = sum(one.seconds(*price) for one in (*stages.values(), widths))
        if took <= whole:
            left = whole - took + stages.get("refinement", Passes()).seconds(*price)
            return replace(effort, passes=MOST, seconds=left)
    raise SettingsError(f"--minutes {minutes:g}: the quickest cut takes about {took / 60:.1f} here: give as many")


def price(model: Any, length: int) -> tuple[float, float]:
    """Seconds that a window takes through the middle layer, and through the head, here and now.

    Args:
        length: tokens in a window.
    """
    import torch

    from billhook.calibration.forward import enter, head, run_layer
    from billhook.models.families import layers

    window = torch.zeros(1, length, dtype=torch.long, device=model.device)
    (state,), (calls,) = enter(model, [window])
    n = len(layers(model)) // 2
    acts = (lambda: run_layer(layers(model)[n], state, calls[n])), (lambda: head(model, window, state))
    layer, logits = (least_seconds(act) for act in acts)
    return layer, logits
