"""FASP: Fast and Accurate Structured Pruning of Large Language Models (Hu et al. 2025, arXiv:2501.09412).

W (out, in) reads an axis;  X (tokens, in) is what enters it;  G = X^T X.
1. Coupling     column j of a reader is fed by row j of its writers (and their biases): they go together, and the rows
                cost nothing beyond what the column costs.
2. Score        s_j = sum_i |W_ij| ||X_j||_2, Wanda summed over the column (`score="wanda"`); a unit of several columns
                takes their sum.
3. Restoration  W_S = argmin_V ||V X_S^T - W X^T||_F^2 over the kept columns S, in closed form from G.

How many units each axis gives is the plan's (billhook.planning.allocation); the paper takes the same from every layer.
Where this differs from the paper.  The default score is the optimal-brain-surgery column score, the error left *after*
step 3.  The ridge of step 3 draws toward the kept weights.  In the default stream, `dense_target`, step 3 also makes up
E: a share `correction` of what the layers before have cost the residual stream, and all that layers which the plan
drops right after this one would have added: W X^T + E^T in place of W X^T.  docs/LOG.md has what each is worth.  The
paper prunes value channels in attention, which no stock attention class can hold; here whole query heads or KV groups
go, where the user asks for them.  The paper's body was not at hand (abstract and reviews were): its damping, its stream
and its tables are open, and nothing here claims to reproduce them.
"""

import copy
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass

import torch
from transformers import PreTrainedModel

from billhook.calibration.passage import Route
from billhook.calibration.walk import Layer, ReaderSums, walk
from billhook.cuts.restoration import errors, fitted
from billhook.cuts.settings import Narrowing as Settings
from billhook.math import selection
from billhook.math.scores import COLUMN_SCORES
from billhook.models.axes import Axis, reader_weight
from billhook.models.plan import Cut, Plan, UnitScores
from billhook.models.surgery import drop_layers, remove
from billhook.runtime import plug_ins
from billhook.runtime.memory import return_freed
from billhook.runtime.progress import Clock
from billhook.runtime.run import Run
from billhook.tensors import Gram, Kept, Narrowed, Scores, Tokens, Units, Weight


@dataclass(frozen=True)
class Fit:
    """What steps 2 and 3 found for one axis."""

    drop: Units
    kept: Kept  # columns of the reader that stay
    weight: Narrowed  # the reader's, restored
    damping: float  # the ridge that it took
    share: float  # what the dropped units hold of the sum of all scores


@dataclass(frozen=True)
class Piece:
    """One axis's fit, kept for later, with its record."""

    axis: Axis
    drop: Units
    weight: Narrowed  # the reader's new weight, in the model's dtype
    cut: Cut


@torch.no_grad()
def narrow(
    model: PreTrainedModel,
    tokens: Tokens,
    plan: Plan,
    settings: Settings,
    run: Run,
    scores: UnitScores | None = None,
) -> list[Cut]:
    """Cut a model by a plan, in place, and restore what reads the axes that were cut.

    Args:
        tokens: calibration windows (windows, length).
        scores: of the units of each axis, by (layer, kind), where they come from elsewhere (gradients) than step 2.
    """
    if plan.empty:
        return []
    # an FFN may make up that loses nothing itself
    makes_up = plan.layers and settings.stream == "dense_target" and settings.restoration
    kinds = plan.kinds if "ffn" in plan.kinds or not makes_up else (*plan.kinds, "ffn")
    correction = settings.correction if settings.restoration else 0.0
    route = Route(settings.stream, dropped=plan.layers, correction=correction)
    cuts = [Cut(**one) for one in run.finished.found]
    for layer in walk(model, tokens, kinds, run, route):
        pieces = [_cut(model, axis, layer, plan, settings, run.clock, scores or {}) for axis in layer.axes]
        number = layer.number
        del layer  # its Grams would stand beside the next layer's
        with run.clock("saving"):
            run.finished.save(number, [asdict(p.cut) for p in pieces], [(p.axis, p.drop) for p in pieces])
        cuts += [one.cut for one in pieces]
    drop_layers(model, plan.layers)
    return sorted(cuts, key=lambda one: one.layer)  # an earlier run may have been of several processes


@torch.no_grad()
def narrow_each(
    model: PreTrainedModel,
    tokens: Tokens,
    plans: Sequence[Plan],
    settings: Settings,
    run: Run,
    scores: Sequence[UnitScores] | None = None,
) -> Iterator[tuple[PreTrainedModel, list[Cut]]]:
    """A cut copy of the model for every plan, by `scores` of its own if there are any, from one walk in the dense
    stream, where no cut sees another.

    Bit by bit what `narrow` makes of each plan alone.  What is kept meanwhile is every plan's narrowed readers.
    """
    clock, scores = run.clock, scores or [{}] * len(plans)
    kinds = tuple(dict.fromkeys(kind for plan in plans for kind in plan.kinds))
    pieces: list[list[Piece]] = [[] for _ in plans]
    for layer in walk(model, tokens, kinds, run):
        for axis in layer.axes:
            place = (axis.layer, axis.kind)
            for plan, own, found in zip(plans, scores, pieces, strict=True):
                if axis.layer not in plan.layers and axis.kind in plan.kinds:
                    count = plan.drops.get(place, 0)
                    found.append(fitted_piece(model, axis, layer, count, settings, clock, own.get(place)))
    for plan, found in zip(plans, pieces, strict=True):
        smaller = copy.deepcopy(model)
        for piece in found:
            carry_out(smaller, piece, clock)
        drop_layers(smaller, plan.layers)
        yield smaller, [piece.cut for piece in found]
        found.clear()


@torch.no_grad()
def pieces(
    model: PreTrainedModel,
    tokens: Tokens,
    plan: Plan,
    settings: Settings,
    scores: UnitScores,
    at: Collection[int],
    run: Run,
) -> Iterator[Piece]:
    """What becomes of the layers `at` in the dense stream; the model stays as it is."""
    for layer in walk(model, tokens, plan.kinds, run, Route(dropped=plan.layers, only=at)):
        for axis in layer.axes:
            place = (axis.layer, axis.kind)
            yield fitted_piece(model, axis, layer, plan.drops.get(place, 0), settings, run.clock, scores.get(place))


def _cut(
    model: PreTrainedModel,
    axis: Axis,
    layer: Layer,
    plan: Plan,
    settings: Settings,
    clock: Clock,
    scores: UnitScores,
) -> Piece:
    """All steps on one axis, in place."""
    place = (axis.layer, axis.kind)
    piece = fitted_piece(model, axis, layer, plan.drops.get(place, 0), settings, clock, scores.get(place))
    carry_out(model, piece, clock)
    return piece


def fitted_piece(
    model: PreTrainedModel,
    axis: Axis,
    layer: Layer,
    count: int,
    settings: Settings,
    clock: Clock,
    scores: Scores | None,
) -> Piece:
    """Steps 2 and 3 on one axis.  The held-out windows first judge a fit on the others, then join it."""
    fitted_on, held = layer.fit[axis.reader_module], layer.held_out.get(axis.reader_module)
    seen = fitted_on if held is None else fitted_on + held
    reader = reader_weight(model, axis)
    W = reader.to(seen.gram.device)
    found = fit(axis, W, seen, count, settings, clock, scores)
    with clock("errors"):
        kept, V = found.kept, found.weight
        off = errors(W, V, kept, fitted_on, held, lambda on: _restored(W, on, kept, settings)[0])
    said = Cut(axis.layer, axis.kind, axis.units, len(found.drop), found.damping, *off, found.share)
    return Piece(axis, found.drop, V.to(reader), said)


def carry_out(model: PreTrainedModel, piece: Piece, clock: Clock) -> None:
    """Cut an axis as was found, in place."""
    with clock("surgery"):
        remove(model, piece.axis, piece.drop)
        reader_weight(model, piece.axis).copy_(piece.weight)


def fit(
    axis: Axis,
    W: Weight,
    evidence: ReaderSums,
    count: int,
    settings: Settings,
    clock: Clock,
    scores: Scores | None = None,
) -> Fit:
    """Steps 2 and 3: which units go, and what the reader then should be; the model stays as it is."""
    with clock("score"):
        s = axis_scores(axis, W, evidence.gram, settings) if scores is None else scores
        drop, keep = selection.lowest(s, count, axis.blocks)
        kept = axis.columns(keep)
        share = (s[drop].sum() / s.sum()).item() if s.sum() > 0 else 0.0
    return_freed()
    with clock("restoration"):
        V, used = _restored(W, evidence, kept, settings)
    return Fit(drop, kept, V, used, share)


def axis_scores(axis: Axis, W: Weight, G: Gram, settings: Settings) -> Scores:
    """Step 2: one number for each unit."""
    score = COLUMN_SCORES.get(settings.score) or plug_ins.load("scores", settings.score)
    return axis.pool(score(W.to(G.device), G, settings.damping))


def _restored(W: Weight, evidence: ReaderSums, kept: Kept, settings: Settings) -> tuple[Narrowed, float]:
    if not settings.restoration:
        return W[:, kept], 0.0
    return fitted(W, evidence, kept, settings.damping)
