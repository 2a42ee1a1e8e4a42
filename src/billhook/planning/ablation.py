"""What a model loses without each of its modules, one at a time: MoPE-CLIP's table (arXiv:2403.07839).

A module is zero while it is missed, which is as good as gone (`models.surgery.silenced`), and nothing is restored.  The
windows that modules of a layer are missed on have come as far as that layer: those before it are run once.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from billhook.calibration.forward import head
from billhook.calibration.passage import Route
from billhook.calibration.walk import walk
from billhook.cuts.narrowing import Settings, axis_scores
from billhook.errors import BillhookError
from billhook.math import mope
from billhook.math.losses import next_token
from billhook.models.axes import Axis, axes, reader_weight
from billhook.models.families import layers
from billhook.models.plan import WHOLE, AxisKey, Curves, UnitScores
from billhook.models.surgery import silenced
from billhook.planning import planners
from billhook.planning.sensitivity import Probe
from billhook.runtime.progress import quiet
from billhook.runtime.run import Run
from billhook.tensors import Probes, Scores, Tokens

CLEARLY = 2.0  # standard errors by which an accuracy must be above chance
STAGE = "missing modules"
Dropped = Sequence[tuple[Axis, Tensor]]  # units by number


@dataclass(frozen=True)
class Accuracy:
    """The accuracy of tasks: of each a row as `evaluation.zeroshot` has it."""

    rows: Sequence[Mapping[str, Any]]

    @property
    def mean(self) -> float:
        return sum(row["accuracy"] for row in self.rows) / len(self.rows)

    @property
    def chance(self) -> float:
        """Of guessing; 0 where a task has no choices."""
        return sum(row["chance"] or 0.0 for row in self.rows) / len(self.rows)

    @property
    def error(self) -> float | None:
        """Standard error; None of a single document."""
        errors = [row["standard_error"] for row in self.rows]
        if any(error is None for error in errors):
            return None
        return sum(error**2 for error in errors) ** 0.5 / len(errors)

    def check(self, named: str) -> None:
        """Refuse tasks that the model does no better than by guessing: nothing can be missed by them."""
        if self.error is None or self.mean - self.chance < max(CLEARLY * self.error, 1e-9):
            error = "unknown" if self.error is None else f"{self.error:.3f}"
            raise BillhookError(
                f"metric {named}: the unpruned model is right in {self.mean:.3f} of the documents (standard error {error}), and "
                f"guessing in {self.chance:.3f}: no module can be missed by it; name another task, or more --documents"
            )


class Judge:
    """How much less a model is worth as it is now than when this was made.

    Args:
        metric: kl, loss, or the name of what `score` measures.
        score: the accuracy of the model as it is now, for other metrics than kl and loss.
    """

    def __init__(
        self, model: PreTrainedModel, windows: Probes, metric: str, score: Callable[[], Accuracy] | None = None
    ) -> None:
        self.model, self.metric, self.score = model, metric, score
        self.probe = Probe(model, windows)
        before = score() if score else None
        if before:
            before.check(metric)
        self.whole = before.mean if before else self._next_token(0) if metric == "loss" else 0.0

    def lost(self, start: int) -> tuple[float, float]:
        """By the metric, and by the divergence where the metric has ties; layers before `start` are as they were when
        they were passed."""
        if self.score:
            return self.whole - self.score().mean, self.probe.divergence(start)
        if self.metric == "loss":
            return self._next_token(start) - self.whole, 0.0
        return self.probe.divergence(start), 0.0

    @torch.no_grad()
    def _next_token(self, start: int) -> float:
        return next_token(head(self.model, self.probe.tokens, self.probe.after(start)), self.probe.tokens).item()


@dataclass(frozen=True)
class Module:
    """A module, and what the model loses without it."""

    layer: int
    kind: str
    units: tuple[int, ...]  # of its axis, by their scores, the lowest first; none: the layer as a whole
    lost: float  # by the metric
    finer: float  # by the divergence, where the metric has ties


@dataclass(frozen=True)
class Table:
    """Every module, and what is missed without it."""

    modules: tuple[Module, ...]

    @classmethod
    def read(cls, plain: Sequence[Sequence[Any]]) -> "Table":
        """From what `plain` gave."""
        return cls(tuple(Module(n, kind, tuple(units), lost, finer) for n, kind, units, lost, finer in plain))

    def plain(self) -> list[list[Any]]:
        """As plain data."""
        return [[one.layer, one.kind, list(one.units), one.lost, one.finer] for one in self.modules]

    @cached_property
    def losses(self) -> list[float]:
        """Of each module, ties broken."""
        return mope.ties_broken([one.lost for one in self.modules], [one.finer for one in self.modules])

    @cached_property
    def layers(self) -> dict[int, float]:
        """What each whole layer costs, if that was measured."""
        pairs = zip(self.modules, self.losses, strict=True)
        return {module.layer: loss for module, loss in pairs if module.kind == WHOLE}

    @cached_property
    def worths(self) -> dict[AxisKey, Scores]:
        """What each unit is worth, by (layer, kind)."""
        return {
            place: mope.worth([module.units for module, _ in found], [loss for _, loss in found])
            for place, found in self._by_place().items()
        }

    def module_losses(self) -> dict[AxisKey, Scores]:
        """For each unit, the loss of the module that it is of."""
        found = {place: torch.zeros_like(worths) for place, worths in self.worths.items()}
        for place, modules in self._by_place().items():
            for module, loss in modules:
                found[place][list(module.units)] = loss
        return found

    def curves(self, model: PreTrainedModel, whole_layers: bool) -> Curves:
        """What any number of units of an axis costs if losses add up."""
        found = planners.score_curves(model, self.worths)
        return found | {(n, WHOLE): {1: loss} for n, loss in self.layers.items() if whole_layers}

    def rows(self) -> list[dict[str, Any]]:
        """Of each layer and kind what every module costs by the metric; of FFNs the part of lowest scores first."""
        found: dict[AxisKey, list[float]] = {}
        for one in self.modules:
            found.setdefault((one.layer, one.kind), []).append(one.lost)
        return [{"layer": n, "kind": kind, "lost": lost} for (n, kind), lost in found.items()]

    def check(self, judge: Judge) -> None:
        """Refuse a metric that does not fall, whatever goes."""
        if self.modules and (most := max(one.lost for one in self.modules)) <= 0:
            raise BillhookError(
                f"metric {judge.metric}: the unpruned model's is {judge.whole:.4g}, and no module that goes makes it worse (the "
                f"most by {most:.2g}): name another metric"
            )

    def _by_place(self) -> dict[AxisKey, list[tuple[Module, float]]]:
        found: dict[AxisKey, list[tuple[Module, float]]] = {}
        for module, loss in zip(self.modules, self.losses, strict=True):
            if module.kind != WHOLE:
                found.setdefault((module.layer, module.kind), []).append((module, loss))
        return found


def measured(
    judge: Judge,
    tokens: Tokens,
    kinds: Sequence[str],
    count: int,
    settings: Settings,
    run: Run,
    scores: UnitScores,
) -> Table:
    """What the model loses without each module of some kinds; the model is left as it was.

    Args:
        tokens: calibration windows (windows, length), for the score by which channels are parted.
        count: parts of an FFN.
        scores: of FFN channels, where they come from elsewhere than `settings`.
    """
    model, total, found = judge.model, len(layers(judge.model)), list[Module]()
    others = axes(model, tuple(kind for kind in kinds if kind not in ("ffn", WHOLE)))
    judge.probe.begin()
    for n, parted in _parted(model, tokens, "ffn" in kinds, settings, run, scores):
        run.tick(STAGE, n, total)
        whole = [(axis, torch.arange(axis.units).split(1)) for axis in others if axis.layer == n]
        with run.clock(STAGE):
            for axis, scored in parted:
                whole.append((axis, mope.parts(scored, count)))
            for axis, modules in whole:
                for units in modules:
                    with silenced(model, [(axis, units)]):
                        found.append(Module(n, axis.kind, tuple(units.tolist()), *judge.lost(n)))
            if WHOLE in kinds:
                with silenced(model, [], [n]):
                    found.append(Module(n, WHOLE, (), *judge.lost(n)))
            judge.probe.advance()
    run.tick(STAGE, total, total)
    return Table(tuple(found))


def _parted(
    model: PreTrainedModel, tokens: Tokens, wanted: bool, settings: Settings, run: Run, given: UnitScores
) -> Iterator[tuple[int, list[tuple[Axis, Tensor]]]]:
    """Each layer with its FFN axes and the scores of their channels, if they are wanted."""
    known = {n: list[tuple[Axis, Tensor]]() for n in range(len(layers(model)))}
    ffn = axes(model, ("ffn",)) if wanted else []
    if not ffn or given:
        for axis in ffn:
            known[axis.layer].append((axis, given[axis.layer, axis.kind]))
        yield from known.items()
        return
    for layer in walk(model, tokens, ("ffn",), replace(run, tick=quiet), Route(held_out=0.0)):
        yield (
            layer.number,
            [
                (axis, axis_scores(axis, reader_weight(model, axis), layer.fit[axis.reader_module].gram, settings))
                for axis in layer.axes
            ],
        )


def missed_least(
    judge: Judge, dropped: Dropped, count: int, alone: Mapping[int, float], run: Run
) -> list[dict[str, Any]]:
    """The `count` layers that are missed least on the model without `dropped`, one after another, each time measured
    anew.

    Args:
        alone: what each layer costs the unpruned model, for the record.

    Returns:
        of each its number, what it costs alone (`alone`), and what it adds to what is lost already (`lost`).
    """
    model, total, found = judge.model, len(layers(judge.model)), list[dict[str, Any]]()
    for done in range(count):
        run.tick("missing layers", done, count)
        gone = [one["layer"] for one in found]
        each: dict[int, tuple[float, float]] = {}
        judge.probe.begin()
        with run.clock(STAGE), silenced(model, dropped, gone):
            before = judge.lost(0)
            for n in range(total):
                if n not in gone:
                    with silenced(model, [], [n]):
                        each[n] = judge.lost(n)
                judge.probe.advance()
        least = min(each, key=lambda n: each[n])  # where the metric has ties, by the divergence
        found.append({"layer": least, "alone": alone.get(least), "lost": each[least][0] - before[0]})
    run.tick("missing layers", count, count)
    return found
