"""From a recipe to a plan: gather what the allocation needs to know, then solve it for the budget."""

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from billhook.calibration import layer_importance
from billhook.calibration.gradients import WINDOW, gradient_sums
from billhook.calibration.walk import walk
from billhook.choices import GRADIENT_SCORES
from billhook.cuts.chopping import check_patch
from billhook.cuts.narrowing import axis_scores
from billhook.errors import BillhookError, first_line
from billhook.math import layer_presets
from billhook.math.scores import standardised
from billhook.math.taylor import FROM_GRADIENTS, NEED_MEAN_GRADIENT
from billhook.models import limits, sizes
from billhook.models.axes import axes, reader_weight
from billhook.models.families import layers
from billhook.models.layout import layout_of
from billhook.models.plan import Curves, Plan, UnitScores
from billhook.pruning import allocation, budget, planners, residual_budget
from billhook.pruning.budget import Planner
from billhook.pruning.carry_out import CUTS
from billhook.pruning.latency import layer_times
from billhook.pruning.method_settings import settings_of
from billhook.pruning.recipe import BUDGETS, Recipe
from billhook.pruning.sensitivity import Probe, curves
from billhook.pruning.texts import Texts, hashes
from billhook.runtime import cache
from billhook.runtime.progress import Clock, Tick, quiet
from billhook.tensors import Scores, Tokens

GLOBAL_SCORE = "taylor2_element"  # where the recipe's own score does not compare across layers
PATIENCE = 2  # trials of `auto` without a gain before it stops


def make_plan(
    model: PreTrainedModel,
    chosen: Recipe,
    texts: Texts,
    dtype: torch.dtype,
    scores: UnitScores | None = None,
    statistics: Path | None = None,
    clock: Clock | None = None,
    tick: Tick = quiet,
) -> Plan:
    """What to cut of `model` so that the recipe's budget is met.

    Args:
        dtype: what the result will be stored in, for a budget in bytes.
        scores: of `unit_scores`.
        statistics: a folder that keeps what was measured, for the next ratio.

    Raises:
        BillhookError: the budget cannot be met; says what can.
    """
    clock, scores, said = clock or Clock(), scores or {}, allocation.parse(chosen.allocation)
    kinds = chosen.unit_kinds
    limits.check_kinds(model, chosen.kinds, chosen.layout)
    if chosen.slices:
        if all(getattr(chosen, name) is None for name in BUDGETS):
            return Plan()  # the vocabulary alone
        return _solved(model, chosen, residual_budget.planner(model, chosen.width_step, chosen.rotate), dtype, tick)
    if chosen.layout == "uniform" and layout_of(model) == "per_layer":
        raise BillhookError("the layers of this model differ already: use --layout per_layer")
    if not chosen.chops and "layers" in chosen.kinds and said.name not in ("sensitivity", "auto"):
        raise BillhookError("axis 'layers' is weighed against the others: use --allocation sensitivity, or auto")
    if chosen.chops:
        with clock("layers"):
            return _chop_plan(model, chosen, texts, dtype, statistics, tick)
    if said.name != "file" and all(getattr(chosen, name) is None for name in BUDGETS):
        return Plan()  # the vocabulary alone
    if said.keep is not None:
        return planners.file_plan(model, kinds, said.keep)
    if said.name == "auto":
        return _auto(model, chosen, texts, dtype, scores, clock, tick)
    weighed = None
    if said.name in allocation.NEED_CURVES:
        _check_possible(model, chosen, kinds, said, dtype)
        weighed = _kept(
            statistics,
            _key(model, chosen, said.name, texts),
            lambda: _curves(model, chosen, said.name, texts, scores, clock, tick),
        )
    planner = planners.planner(
        model, kinds, said, multiple_of=chosen.width_step, floor=chosen.floor, layout=chosen.layout, curves=weighed
    )
    return _solved(model, chosen, planner, dtype, tick)


def _check_possible(
    model: PreTrainedModel, chosen: Recipe, kinds: tuple[str, ...], said: allocation.Allocation, dtype: torch.dtype
) -> None:
    """Refuse what no measurement could help: solved as if nothing cost anything.  A budget in speed must time first."""
    free: Curves = {(axis.layer, axis.kind): {} for axis in axes(model, kinds)}
    if "layers" in chosen.kinds:
        free |= {(n, "layers"): {1: 0.0} for n in range(len(layers(model)))}
    planner = planners.planner(
        model, kinds, said, multiple_of=chosen.width_step, floor=chosen.floor, layout=chosen.layout, curves=free
    )
    if chosen.speedup is None:
        _solved(model, chosen, planner, dtype, quiet)


def unit_scores(
    model: PreTrainedModel, chosen: Recipe, tokens: Tokens, clock: Clock | None = None, tick: Tick = quiet
) -> UnitScores:
    """The gradient score that the recipe names, of every unit; nothing where it names one that needs no gradients."""
    if chosen.score not in GRADIENT_SCORES or not chosen.unit_kinds:
        return {}
    limits.check_kinds(model, chosen.kinds, chosen.layout)
    return _gradient_scores(model, chosen.score, chosen.unit_kinds, tokens, clock or Clock(), tick)


def _solved(model: PreTrainedModel, chosen: Recipe, planner: Planner, dtype: torch.dtype, tick: Tick) -> Plan:
    total = sizes.total_parameters(model)
    if chosen.ratio is not None:
        return planner.make(chosen.ratio * sizes.decoder_parameters(model))
    if chosen.params is not None:
        kept, say = (lambda plan: total - sizes.saved_by(model, plan)), "{:,.0f} parameters".format
        return budget.reach(planner, kept, chosen.params, say, parameters=not chosen.slices)
    if chosen.memory is not None:

        def held(plan: Plan) -> int:
            cached = sizes.kv_cache_entries(model, plan, chosen.context, chosen.batch)
            return dtype.itemsize * (total - sizes.saved_by(model, plan) + cached)

        return budget.reach(planner, held, chosen.memory, "{:,.0f} bytes".format)
    assert chosen.speedup is not None
    seconds = layer_times(model, chosen.unit_kinds, tick=tick)
    dense = seconds(Plan())
    return budget.reach(
        planner,
        seconds,
        dense / chosen.speedup,
        lambda found: f"{found:.2g} s for a prefill ({dense / found:,.2f} times as fast)",
    )


def _curves(
    model: PreTrainedModel, chosen: Recipe, name: str, texts: Texts, scores: UnitScores, clock: Clock, tick: Tick
) -> Curves:
    if name == "global":
        found = scores or _gradient_scores(model, GLOBAL_SCORE, chosen.unit_kinds, texts.calibration, clock, tick)
        return planners.score_curves(model, found)
    if name == "standardised":
        found = standardised(scores or _forward_scores(model, chosen, texts.calibration, clock, tick))
        # losses are not negative; what is added to all alike moves no threshold
        least = min(each.min() for each in found.values())
        return planners.score_curves(model, {place: each - least for place, each in found.items()})
    return curves(
        model,
        texts.calibration,
        texts.probe,
        chosen.unit_kinds,
        settings_of(chosen),
        scores=scores,
        whole_layers="layers" in chosen.kinds,
        clock=clock,
        tick=tick,
    )


def _gradient_scores(
    model: PreTrainedModel, score: str, kinds: tuple[str, ...], tokens: Tokens, clock: Clock, tick: Tick
) -> UnitScores:
    with clock("gradients"):
        sums = gradient_sums(model, tokens[:, :WINDOW], kinds, mean_gradient=score in NEED_MEAN_GRADIENT, tick=tick)
        return {place: FROM_GRADIENTS[score](found) for place, found in sums.items()}


def _forward_scores(
    model: PreTrainedModel, chosen: Recipe, tokens: Tokens, clock: Clock, tick: Tick
) -> dict[tuple[int, str], Scores]:
    settings, steps = settings_of(chosen), walk(model, tokens, chosen.unit_kinds, held_out=0.0, clock=clock, tick=tick)
    return {
        (axis.layer, axis.kind): axis_scores(
            axis, reader_weight(model, axis), layer.fit[axis.reader_module].gram, settings
        )
        for layer in steps
        for axis in layer.axes
    }


def _chop_plan(
    model: PreTrainedModel, chosen: Recipe, texts: Texts, dtype: torch.dtype, statistics: Path | None, tick: Tick
) -> Plan:
    """The layers that the recipe names, or as many as its budget asks for, by its preset."""
    total = len(layers(model))
    if chosen.patches:
        check_patch(model)
    if chosen.drop or chosen.keep:
        named = layer_presets.parse_layers(chosen.drop or chosen.keep, total)
        gone = named if chosen.drop else [n for n in range(total) if n not in named]
        if not gone:
            raise BillhookError(f"--keep {chosen.keep} names all {total} layers: none would go")
        return Plan(layers=tuple(gone))
    if chosen.layers is not None:
        count = total - chosen.layers
    elif all(getattr(chosen, name) is None for name in BUDGETS):
        return Plan()  # the vocabulary alone
    else:
        count = len(_solved(model, chosen, _by_depth(model), dtype, tick).layers)
    if not 0 < count <= total - 2:
        raise BillhookError(
            f"{count} of {total} layers would go: at least one goes, and the first and the last stay; name others with --drop"
        )
    key = cache.model_key(model) | {"tokens": hashes(texts)} if statistics else {}
    return Plan(
        layers=tuple(
            layer_importance.chosen(
                model,
                chosen.preset,
                count,
                texts.calibration,
                texts.probe,
                seed=chosen.seed,
                folder=statistics,
                key=key,
                tick=tick,
            )
        )
    )


def _by_depth(model: PreTrainedModel) -> Planner:
    """Parameters to save -> that many layers from the middle, which stand for whichever will go.

    Raises:
        BillhookError: the model has no layer between its first and its last.
    """
    total = len(layers(model))
    if total < 3:
        raise BillhookError(
            f"the first and the last layer stay, and this model has {total}: none can go for a budget; name one with --drop, or "
            "use a method that cuts inside the layers: fasp"
        )
    inner = sum(sizes.layer_parameters(model, n) for n in range(1, total - 1))

    def make(saving: float | int) -> Plan:
        count = round(saving * (total - 2) / inner)
        if not 0 < count <= total - 2:
            raise BillhookError(
                f"the budget asks for {saving:,.0f} parameters, {count} of {total} layers: at least one goes, and the first and "
                "the last stay"
            )
        return Plan(layers=tuple(layer_presets.middle(total, count)))

    return Planner(make, inner, inner / (total - 2))


def _auto(
    model: PreTrainedModel,
    chosen: Recipe,
    texts: Texts,
    dtype: torch.dtype,
    scores: UnitScores,
    clock: Clock,
    tick: Tick,
) -> Plan:
    """The best of the (layers dropped, common width) pairs on the budget line, each tried on a copy of the model.

    A trial is the whole prune, on all calibration windows: with a quarter of them what makes up for a dropped layer is
    fitted too loosely, and depth did not win (docs/LOG.md).
    """
    settings, kinds = settings_of(chosen), chosen.unit_kinds
    if kinds:  # what equal widths cannot give is refused before anything is measured
        whole = planners.even_planner(model, kinds, chosen.width_step, chosen.layout)
        if chosen.speedup is None:
            _solved(model, chosen, whole, dtype, quiet)
    alone = curves(model, texts.calibration[:1], texts.probe, (), settings, whole_layers=True, clock=clock, tick=tick)
    probe, best, since = Probe(model, texts.probe), (float("inf"), Plan()), 0
    for count in range(0 if kinds else 1, len(layers(model)) // 2):
        gone = _apart({n: loss[1] for (n, _), loss in alone.items()}, count)
        planner = planners.even_planner(model, kinds, chosen.width_step, chosen.layout, gone=gone)
        try:
            plan = _solved(model, chosen, planner, dtype, tick)
        except BillhookError:
            if not count:
                raise
            if not kinds:
                continue
            break  # these layers alone are more than the budget
        tick("trying depths", count, count + PATIENCE)
        with clock("trials"):
            trial = copy.deepcopy(model)
            CUTS[chosen.method](
                trial, texts.calibration, plan, settings, scores=scores, stream=chosen.stream, tick=tick
            )
            loss = probe.divergence_of(trial)
            del trial  # before the next copy is made
        best, since = ((loss, plan), 0) if loss < best[0] else (best, since + 1)
        if since == PATIENCE:
            break
    tick("trying depths", 1, 1)
    return best[1]


def _apart(losses: Mapping[int, float], count: int) -> list[int]:
    """`count` layers of least loss, no two neighbours (the FFN before a layer that goes makes up for it), never the first."""
    taken: list[int] = []
    for n in sorted(losses, key=lambda n: losses[n]):
        if len(taken) < count and n and not {n - 1, n + 1} & set(taken):
            taken.append(n)
    return sorted(taken)


def _key(model: PreTrainedModel, chosen: Recipe, name: str, texts: Texts) -> dict[str, Any]:
    """All that decides what is measured."""
    decides = ("kinds", "score", "ridge", "restoration", "dtype")
    return {"curves": name, **cache.model_key(model), **hashes(texts)} | {k: getattr(chosen, k) for k in decides}


def _kept(folder: Path | None, key: dict[str, Any], measure: Callable[[], Curves]) -> Curves:
    """`measure()`, or what it gave before where `folder` has it under the same key."""
    stored = cache.cached(
        folder, key["curves"], key, lambda: [[n, kind, points] for (n, kind), points in measure().items()]
    )
    try:  # keys of JSON objects are text
        return {(int(n), kind): {int(c): float(loss) for c, loss in points.items()} for n, kind, points in stored}
    except (ValueError, TypeError, AttributeError) as error:
        raise BillhookError(f"statistics in {folder} cannot be read ({first_line(error)}): delete them") from error
