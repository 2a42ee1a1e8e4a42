"""Greedy Output Approximation (Li, Dong and Lei 2024, arXiv:2407.19126).

A module is two steps of linear weights: q, k and v, then o; gate and up, then down.  Module by module, each with what
the modules before it have become, X* where the unpruned model has X and Y = X W^T:

1. Level 1    W = argmin_V ||V X*^T - Y^T||_F^2 for q, k and v, or gate and up                             (Algorithm 1)
2. Level 2    X* of the second step, computed anew; the same for o, or down
3. Heads      D_ij = mean over windows and queries of JS(P_i || P_j), P the attention maps; heads go that are like
              another (billhook.math.divergence)                                                           (Algorithm 2)
   Channels   M_j = 1/2 ||B_:,j||^2 a_j^T Sigma a_j, for a gated FFN the product of its two, Sigma = X*^T X* of the
              module's input (billhook.math.scores.output_metric); `score="measured"`: ||B_:,j||^2 E[z_j^2], z what
              enters down
4. Prune      the units of lowest score; nothing makes up for them, but the next module's own steps 1 and 2

Where this differs from the paper.  How many go is the plan's, not a threshold's: the threshold that gives as many is
reported.  A ridge draws towards the weights as they were, and `share` goes a part of the way; the paper has neither.
With grouped queries D compares the query heads of one KV group, or whole KV groups, head by head.  What stands before
the first cut sees what the unpruned model does, and stays as it is.  With `after` step 4 is followed by the restoration
of FASP (billhook.math.restore), towards what the module put out before it was cut; the paper has none.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from math import sqrt
from typing import Any

import torch
from transformers import PreTrainedModel

from billhook.calibration.attention_maps import Alike, watched
from billhook.calibration.linears import Group, OperatorSums, named_operators
from billhook.calibration.passage import Route
from billhook.calibration.walk import Layer, ReaderSums
from billhook.cuts.masking import target_of
from billhook.cuts.narrowing import carry_out, fitted_piece
from billhook.cuts.settings import Approximating as Settings
from billhook.cuts.settings import Narrowing
from billhook.errors import BillhookError
from billhook.math.divergence import redundancy
from billhook.math.layerwise import squared_error, target_cross
from billhook.math.restore import toward
from billhook.math.scores import energy_columns, output_metric
from billhook.models.axes import ATTENTION, Axis, axes, reader_weight
from billhook.models.families import attention_module, layers, linears, row_of, weight_of
from billhook.models.plan import Cut, Plan, UnitScores
from billhook.runtime.run import Run
from billhook.tensors import Gram, Moment, Scores, Tokens, Units, Weight, Writer, precise

WRITES_FFN = ("gate", "up", "gate_up")  # roles


@dataclass(frozen=True)
class Rebuilt:
    """One weight after steps 1 and 2.  Errors are relative, ||V X*^T - Y^T|| / ||Y||, on the calibration text."""

    layer: int
    role: str
    damping: float  # the ridge that it took
    before: float  # of the weight as it was
    after: float
    held_out: float | None  # on windows that another fit did not see


@dataclass(frozen=True)
class Threshold:
    """What step 3 comes to in one layer: the largest D, in nats, that has to be below the paper's tau."""

    layer: int
    kind: str
    tau: list[float]  # of every block of units: one for KV groups; for query heads one a KV group


@dataclass(frozen=True)
class Approximated:
    """What became of a model, or of one layer."""

    cuts: list[Cut] = field(default_factory=list)
    rebuilt: list[Rebuilt] = field(default_factory=list)
    thresholds: list[Threshold] = field(default_factory=list)

    def add(self, other: "Approximated") -> None:
        self.cuts.extend(other.cuts)
        self.rebuilt.extend(other.rebuilt)
        self.thresholds.extend(other.thresholds)


@torch.no_grad()
def approximate(model: PreTrainedModel, tokens: Tokens, plan: Plan, settings: Settings, run: Run) -> Approximated:
    """Cut a model by a plan, in place.

    Args:
        tokens: calibration windows (windows, length).
        plan: units of FFN channels, and of query heads or KV groups.

    Raises:
        BillhookError: an activation is not finite; a Gram that cannot be factored (names the weight).
    """
    done = Approximated()
    for one in run.finished.found:
        done.add(_read(one))
    if plan.empty:
        return done
    cut = {axis.reader_module: axis for axis in axes(model, plan.kinds) if plan.drops.get((axis.layer, axis.kind))}
    steps = _steps(model, cut, settings)
    first, maps, inputs = min(axis.layer for axis in cut.values()), dict[int, Alike](), None
    now, gone = Approximated(), list[tuple[Axis, Units]]()

    def around(n: int, groups: Sequence[Mapping[str, str]]) -> AbstractContextManager[object]:
        for name in (name for group in groups for name in group.values()):
            if name in cut and cut[name].kind in ATTENTION:
                maps[n] = Alike(cut[name].kind)
                return watched(attention_module(model, n), maps[n])
        return nullcontext()

    route = Route("dense_target" if settings.recovery else "true_sequential")
    for group in named_operators(model, tokens, steps, run, route, around):
        n = group.layer
        if settings.recovery and (n > first or gone):
            now.rebuilt.extend(_rebuilt(model, group, settings, run))
        seen = _seen(group)
        for name in (name for name in group.names.values() if name in cut):
            axis = cut[name]
            with run.clock("score"):
                scores = (
                    redundancy(maps.pop(n).mean)
                    if axis.kind in ATTENTION
                    else _channels(model, axis, inputs, seen.gram, settings)
                )
            found = _cut(model, axis, group, plan.drops[n, axis.kind], scores, settings, run)
            now.add(found[0])
            gone.append((axis, found[1]))
        inputs = seen.gram if set(group.names) & set(WRITES_FFN) else None
        if group.names == steps[n][-1]:
            with run.clock("saving"):
                run.finished.save(n, [asdict(now)], gone)
            done.add(now)
            now, gone = Approximated(), []
    return Approximated(*(sorted(part, key=lambda one: one.layer) for part in vars(done).values()))


@torch.no_grad()
def unit_scores(
    model: PreTrainedModel, tokens: Tokens, kinds: Sequence[str], settings: Settings, run: Run
) -> UnitScores:
    """What every unit puts out in the unpruned model, by (layer, kind): M_j; for heads and groups ||B_:,j||^2 E[z_j^2].

    Which layers give how much may go by it.
    """
    cut, found = {axis.reader_module: axis for axis in axes(model, tuple(kinds))}, dict[tuple[int, str], Scores]()
    inputs = None
    for group in named_operators(model, tokens, _steps(model, cut, settings, True), run, Route("dense", held_out=0.0)):
        for axis in (cut[name] for name in group.names.values() if name in cut):
            with run.clock("score"):
                found[axis.layer, axis.kind] = _channels(model, axis, inputs, group.fit.gram, settings)
        inputs = group.fit.gram if set(group.names) & set(WRITES_FFN) else None
    return found


def _steps(
    model: PreTrainedModel, cut: Mapping[str, Axis], settings: Settings, scored: bool = False
) -> dict[int, list[Mapping[str, str]]]:
    """The groups of weights of each layer that are refitted, cut, or that a score needs; experts' never are.

    Args:
        scored: only what scores need.
    """
    first, experts = min(axis.layer for axis in cut.values()), f".{row_of(model).experts}."
    found: dict[int, list[Mapping[str, str]]] = {}
    for n in range(len(layers(model))):
        axes_here = [axis for axis in cut.values() if axis.layer == n]
        ffn, heads = (any((axis.kind in ATTENTION) == side for axis in axes_here) for side in (False, True))
        for group in linears(model, n):
            names, feeds = set(group.values()), set(group) & {*WRITES_FFN, "down"}
            drifted = settings.recovery and not scored and (n > first or (n == first and heads and feeds))
            wanted = names & set(cut) or drifted or (ffn and set(group) & set(WRITES_FFN))
            if wanted and not (row_of(model).experts and any(experts in name for name in names)):
                found.setdefault(n, []).append(group)
    return found


def _seen(group: Group) -> OperatorSums:
    return group.fit if group.held_out is None else group.fit + group.held_out


def _rebuilt(model: PreTrainedModel, group: Group, settings: Settings, run: Run) -> list[Rebuilt]:
    """Steps 1 or 2 for the weights that share an input, in place.

    The held-out windows first judge a fit on the others, then join it.
    """
    seen, found = _seen(group), []
    if seen.cross is None:
        return found
    for role, name in group.names.items():
        weight = weight_of(model, name)
        W = precise(weight).contiguous()
        with run.clock("restoration"):
            V, used = _fitted(W, seen, name, settings)
        with run.clock("errors"):
            off = None
            if group.held_out is not None:
                off = _error(_fitted(W, group.fit, name, settings)[0], W, group.held_out)
            found.append(Rebuilt(group.layer, role, used, _error(W, W, seen), _error(V, W, seen), off))
        weight.copy_(V)
    return found


def _fitted(W: Weight, sums: OperatorSums, name: str, settings: Settings) -> tuple[Weight, float]:
    try:
        return toward(W, target_cross(W, target_of(W, sums)), sums.gram, settings.damping, settings.share)
    except BillhookError as error:
        raise BillhookError(f"{name}: {error}") from error


def _error(V: Weight, W: Weight, sums: OperatorSums) -> float:
    target = target_of(W, sums)
    assert target.energy is not None
    whole = target.energy.sum()
    return sqrt(float(squared_error(V, W, target).sum() / whole)) if whole > 0 else 0.0


def _channels(model: PreTrainedModel, axis: Axis, inputs: Moment | None, G: Gram, settings: Settings) -> Scores:
    """Step 3 for units of channels, from the Grams of what enters their writers, and their reader."""
    B = precise(reader_weight(model, axis))
    if settings.score == "measured" or axis.kind in ATTENTION:
        return axis.pool(energy_columns(B, G))
    assert inputs is not None
    return axis.pool(output_metric(B, _writers(model, axis), inputs))


def _writers(model: PreTrainedModel, axis: Axis) -> list[Writer]:
    """The weights that write an axis of channels, a row for each: two of one matrix, where that holds gate and up."""
    return [
        precise(model.get_parameter(slot.param).data.movedim(slot.dim, 0)[rows.to(model.device)])
        for slot in axis.writers
        if slot.param.endswith(".weight")
        for rows in slot.index.T
    ]


def _cut(
    model: PreTrainedModel, axis: Axis, group: Group, count: int, scores: Scores, settings: Settings, run: Run
) -> tuple[Approximated, Units]:
    """Step 4, in place, with FASP's restoration if asked for; what became of the axis, and the units that went."""
    fit, held = ({axis.reader_module: ReaderSums(one.gram)} if one else {} for one in (group.fit, group.held_out))
    layer = Layer(axis.layer, [axis], fit, held)
    how = Narrowing(damping=settings.damping, restoration=settings.after)
    found = fitted_piece(model, axis, layer, count, how, run.clock, scores)
    carry_out(model, found, run.clock)
    taken = scores[found.drop.to(scores.device)].view(axis.blocks, -1)
    tau = [Threshold(axis.layer, axis.kind, taken.amax(1).tolist())] if axis.kind in ATTENTION else []
    return Approximated([found.cut], [], tau), found.drop


def _read(said: Mapping[str, Any]) -> Approximated:
    """What an earlier run has kept of a layer."""
    return Approximated(
        [Cut(**one) for one in said["cuts"]],
        [Rebuilt(**one) for one in said["rebuilt"]],
        [Threshold(**one) for one in said["thresholds"]],
    )
