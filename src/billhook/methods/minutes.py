"""What `auto` may spend, and what each part of it costs:
counted in windows that pass a layer, before any of it is done."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from billhook.errors import SettingsError
from billhook.planning.method import LOOKED, Passes, Price
from billhook.planning.recipe import SAMPLES, Recipe
from billhook.runtime.progress import least_seconds

EFFORTS = {
    "quick": "one way to cut, whole layers where they can be had, 64 windows; one pass of refinement",
    "normal": "up to three ways, each fitted on 16 windows, and the best on 192",
    "thorough": "every way, each fitted on 64 windows, and the best on 512",
}


@dataclass(frozen=True)
class Effort:
    """What may be spent."""

    windows: int  # to calibrate on, where the user says no number
    rivals: int  # the most cuts to try
    trial: int  # calibration windows that a trial is fitted on
    curves: int  # probe windows by which curves of layers are measured
    passes: float | int  # of the refinement over the calibration windows
    seconds: float | None = None  # that the refinement may take, if its passes take longer

    def within(self, work: "Work", price: Price) -> "Effort":
        """The same, with as many passes as the seconds let it have."""
        if self.seconds is None:
            return self
        each = Passes(steps=work.fitted(self) * work.refined).seconds(*price())
        return replace(self, passes=min(self.passes, self.seconds / each))


SPENT = {
    "quick": Effort(SAMPLES, rivals=1, trial=16, curves=1, passes=1.0),
    "normal": Effort(3 * SAMPLES, rivals=3, trial=16, curves=2, passes=2.0),
    "thorough": Effort(8 * SAMPLES, rivals=8, trial=64, curves=8, passes=2.0),
}
MOST = 8.0  # passes of a refinement that has time left
LEAST = 1.0  # a pass that has to fit before more is tried
FEWER = 3 * SAMPLES, SAMPLES, SAMPLES // 2, SAMPLES // 4  # windows of the quickest cut, as far as time lets it
SHORTLIST = 6  # blocks of layers that are tried on all probe windows
COMPARED = 4  # positions of which one goes through the head, where blocks are compared
SPAN = 10  # layers that are refined together
SOLVE = 10  # operations of a refit, in cubes of the width that it reads
STREAMS = 2  # of hidden states, in a fit of widths: the unpruned model's and the cut one's
BEFORE = 2 / 3  # of the layers, which a patch has to see: those up to the end of the gap
POINTS = 8  # of a curve's counts, over FFN channels and KV groups


@dataclass(frozen=True)
class Way:
    """One way to cut: what goes, and in which layouts."""

    name: str
    kinds: tuple[str, ...]
    layouts: tuple[str, ...]


@dataclass(frozen=True)
class Work:
    """What decides the cost: of the model, of the cut, and of the text."""

    layers: int
    windows: int
    probes: int  # of the calibration's text
    judges: int  # of all kinds
    solve: float  # a refit of one layer's FFN, in windows that pass a layer
    gone: int = 0  # layers that go whole
    alone: bool = False  # whether nothing else goes
    refined: int = 0  # layers that are refined, all spans together
    patched: bool = False  # whether they are made up for

    @classmethod
    def of(cls, model: Any, windows: int, recipe: Recipe, plan: Any = None, patched: bool = False) -> "Work":
        """Args: plan: the likeliest, if one can be told without a measurement."""
        from billhook.models.axes import axes
        from billhook.models.families import layers
        from billhook.models.sizes import layer_parameters

        total, read = len(layers(model)), recipe.calibration
        widths = [axis.units for axis in axes(model, ("ffn",)) if axis.layer == total - 1]
        solve = SOLVE * sum(width**3 for width in widths) / (2 * read.seq_len * layer_parameters(model, total - 1))
        gone, alone = len(plan.layers) if plan else 0, bool(plan and plan.layers and not any(plan.drops.values()))
        judges = (1 if recipe.settings.second(read) is None else 2) * read.probes
        refined = min(SPAN if alone else total, total - gone)
        return cls(total, windows, read.probes, judges, solve, gone, alone, refined, patched)

    def fitted(self, effort: Effort) -> int:
        """Windows that the cut is fitted on."""
        return max(2, min(effort.windows, self.windows))

    def stages(self, effort: Effort, rivals: Sequence[Way], refined: bool) -> Mapping[str, Passes]:
        """Every stage, but for the cut of widths, which a rehearsal times better, and the look."""
        total, windows, found = self.layers, self.fitted(effort), dict[str, Passes]()
        curves, uneven = min(effort.curves, self.probes), [one for one in rivals if one.layouts == ("per_layer",)]
        by_blocks = sum("layers" in one.kinds for one in rivals)
        if by_blocks and self.gone:
            ways = range(1, total - self.gone)
            again = (self.probes - 1) * min(SHORTLIST, len(ways))
            passes = self.probes * total + sum(total - self.gone - n for n in ways)
            heads = (len(ways) + again) / COMPARED
            found["layers"] = Passes(by_blocks * (passes + again * (total - self.gone) / 2), by_blocks * heads)
        if uneven:
            tried = POINTS * curves * total
            found["sensitivity"] = Passes(windows * total + tried * total / 2 + POINTS * total * self.solve, tried)
        if len(rivals) > 1:
            few, everywhere = min(effort.trial, windows), sum(not self._spares(one) for one in rivals)
            fits = few * total * (everywhere * (STREAMS + 1) + (len(rivals) - everywhere) * BEFORE)
            solves = (everywhere * total + len(rivals) - everywhere) * self.solve
            spans = everywhere * total + (len(rivals) - everywhere) * min(SPAN, total)
            goals, steps = (few * len(rivals) * total, few * spans) if refined else (0, 0)
            compared = (2 if refined else 1) * len(rivals) * self.judges
            # by one of two positions, and both models' heads
            found["trials"] = Passes(fits + solves + goals + (self.judges + compared) * total, compared, steps)
        if self.patched:
            found["patch"] = Passes(windows * total * BEFORE + self.solve)
        if refined:
            found["goals"] = Passes(windows * total)
            found["refinement"] = Passes(steps=effort.passes * windows * self.refined)
        return found

    def _spares(self, rival: Way) -> bool:
        """Whether most layers stay as they are."""
        return self.alone and rival.kinds == ("layers",)


def words(effort: Effort, work: Work, rivals: Sequence[Way], refined: bool) -> str:
    """What an effort comes to, in a line."""
    windows, names = work.fitted(effort), "; ".join(one.name for one in rivals)
    trial = (
        f" (each fitted on {min(effort.trial, windows)} windows, judged by {work.judges})" if len(rivals) > 1 else ""
    )
    last = f", then refined by up to {effort.passes:.2g} passes over {work.refined} layers" if refined else ""
    return f"tries {names}{trial}: {'the best' if trial else 'it'} is fitted on {windows} windows{last}"


def spent(
    minutes: float | int, work: Work, rivals: Sequence[Way], asked: tuple[bool, bool], price: tuple[float, float, float]
) -> Effort:
    """The greatest effort whose parts, and a pass of refinement, fit into the minutes; the refinement has what is left.

    Args:
        asked: whether it is refined, and whether it ends with a look.
        price: seconds of a window through a layer, through the head, and through a layer that is trained on it.

    Raises:
        SettingsError: the quickest cut takes longer.
    """
    refined, looks = asked
    quickest = [replace(SPENT["quick"], windows=windows) for windows in FEWER]
    took, whole, look = 0.0, 60 * minutes, Passes(LOOKED * work.layers, LOOKED) if looks else Passes()
    for effort in (SPENT["thorough"], SPENT["normal"], *quickest):
        stages = work.stages(replace(effort, passes=LEAST), rivals[: effort.rivals], refined)
        widths = ((STREAMS + 1) * work.fitted(effort) + work.solve) * work.layers
        took = sum(one.seconds(*price) for one in (*stages.values(), look, Passes(0 if work.alone else widths)))
        if took <= whole:
            left = whole - took + stages.get("refinement", Passes()).seconds(*price)
            return replace(effort, passes=MOST, seconds=left)
    needs = math.ceil(took / 6) / 10
    raise SettingsError(f"--minutes {minutes:g}: the quickest cut takes about {needs:g} here: give --minutes {needs:g}")


def price(model: Any, length: int) -> tuple[float, float, float]:
    """Seconds that a window takes through the middle layer, through the head, and through that layer when it is
    refined, here and now.

    Args:
        length: tokens in a window.
    """
    import torch

    from billhook.calibration.forward import enter, head, run_layer
    from billhook.evaluation.speed import synchronise
    from billhook.models.families import layers
    from billhook.training.refinement import rehearsed

    window = torch.zeros(1, length, dtype=torch.long, device=model.device)
    (state,), (calls,) = enter(model, [window])
    n = len(layers(model)) // 2

    def timed(act: Callable[[], Any]) -> float:
        return least_seconds(lambda: (act(), synchronise(model.device)))

    passed, logits = (
        timed(lambda: run_layer(layers(model)[n], state, calls[n])),
        timed(lambda: head(model, window, state)),
    )
    with rehearsed(model, n, state, calls[n]) as step:
        return passed, logits, timed(step)
