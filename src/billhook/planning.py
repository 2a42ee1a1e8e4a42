"""From a recipe to a plan: gather what the allocation needs to know, then solve it for the budget."""

import copy
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from billhook import allocation, budget, chopping, depth, slicing, sparsity, store, support
from billhook.axes import reader_weight
from billhook.budget import Planner
from billhook.errors import BillhookError, first_line
from billhook.families import ROLES, axes, layers
from billhook.gradients import WINDOW, gradient_sums
from billhook.layout import layout_of
from billhook.masking import Masking
from billhook.methods import carry_out
from billhook.methods.experts import Settings as Ways
from billhook.methods.fasp import Settings, axis_scores
from billhook.methods.layerchop import Settings as Patching
from billhook.methods.layerchop import check_patch
from billhook.methods.slicegpt import Settings as Slicing
from billhook.observe import walk
from billhook.plan import Plan
from billhook.progress import Clock, Tick, quiet
from billhook.recipe import BUDGETS, Recipe
from billhook.sensitivity import Curves, Probe, curves
from billhook.sparsity import Pattern
from billhook.taylor import GRADIENT_SCORES, NEED_MEAN_GRADIENT, standardised
from billhook.tensors import Probes, Scores, Tokens
from billhook.timing import layer_times

UnitScores = Mapping[tuple[int, str], Scores]  # by (layer, kind)

GLOBAL_SCORE = "taylor2_element"  # where the recipe's own score does not compare across layers
PATIENCE = 2  # trials of `auto` without a gain before it stops


@dataclass(frozen=True)
class Texts:
    """Windows (windows, length): those to calibrate on, and those to judge by."""

    calibration: Tokens
    probe: Probes


def needs_text(chosen: Recipe) -> bool:
    """Whether anything is measured on text: positions and named layers need none, unless they are patched or trained."""
    reads = chosen.patches or chosen.select == "healed" or bool(chosen.vocab_from)
    return reads or not chosen.chops or _weighs_layers(chosen)


def judges(chosen: Recipe) -> bool:
    """Whether the plan is judged by further windows, which the calibration does not see."""
    return (
        _weighs_layers(chosen) if chosen.chops else allocation.parse(chosen.allocation).name in ("sensitivity", "auto")
    )


def _weighs_layers(chosen: Recipe) -> bool:
    presets = chosen.candidates if chosen.select == "healed" else (chosen.preset,)
    return chosen.chops and not (chosen.drop or chosen.keep or all(name in depth.FREE for name in presets))


def settings_of(chosen: Recipe) -> Settings:
    """What a method that scores units may choose, from the recipe."""
    score = chosen.score if chosen.score not in GRADIENT_SCORES else Settings.score
    return Settings(score, chosen.ridge, chosen.restores, chosen.correction)


def method_settings(chosen: Recipe) -> Settings | Patching | Slicing | Ways:
    """What the recipe's method may choose, whichever it is."""
    if chosen.routes:
        return Ways(chosen.experts, chosen.seed)
    if chosen.slices:
        return Slicing(chosen.restoration, chosen.ridge, chosen.correction)
    return Patching(chosen.patch, chosen.ridge, chosen.correction) if chosen.chops else settings_of(chosen)


def masking_of(chosen: Recipe) -> Masking:
    """What a method that makes zeros is asked for."""
    pattern = sparsity.parse(chosen.pattern) if chosen.pattern else Pattern(chosen.sparsity)
    settings = support.Settings(
        damping=chosen.ridge,
        refit=chosen.refit,
        init=chosen.init or None,
        normalised=chosen.normalised,
        metric=chosen.metric,
    )
    targets = chosen.targets or ROLES
    return Masking(chosen.method, pattern, targets, chosen.stream, settings, chosen.layer_sparsity, chosen.keep_zeros)


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
    budget.check_kinds(model, chosen.kinds, chosen.layout)
    if chosen.slices:
        if all(getattr(chosen, name) is None for name in BUDGETS):
            return Plan()  # the vocabulary alone
        return _solved(model, chosen, slicing.planner(model, chosen.width_step, chosen.rotate), dtype, tick)
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
        return allocation.file_plan(model, kinds, said.keep)
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
    planner = allocation.planner(
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
    planner = allocation.planner(
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
    budget.check_kinds(model, chosen.kinds, chosen.layout)
    return _gradient_scores(model, chosen.score, chosen.unit_kinds, tokens, clock or Clock(), tick)


def _solved(model: PreTrainedModel, chosen: Recipe, planner: Planner, dtype: torch.dtype, tick: Tick) -> Plan:
    total = budget.total_parameters(model)
    if chosen.ratio is not None:
        return planner.make(chosen.ratio * budget.decoder_parameters(model))
    if chosen.params is not None:
        kept, say = (lambda plan: total - budget.saved_by(model, plan)), "{:,.0f} parameters".format
        return budget.reach(planner, kept, chosen.params, say, parameters=not chosen.slices)
    if chosen.memory is not None:

        def held(plan: Plan) -> int:
            cached = budget.kv_cache_entries(model, plan, chosen.context, chosen.batch)
            return dtype.itemsize * (total - budget.saved_by(model, plan) + cached)

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
        return allocation.score_curves(model, found)
    if name == "standardised":
        found = standardised(scores or _forward_scores(model, chosen, texts.calibration, clock, tick))
        # losses are not negative; what is added to all alike moves no threshold
        least = min(each.min() for each in found.values())
        return allocation.score_curves(model, {place: each - least for place, each in found.items()})
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
        return {place: GRADIENT_SCORES[score](found) for place, found in sums.items()}


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
        named = depth.numbered(chosen.drop or chosen.keep, total)
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
    key = store.model_key(model) | {"tokens": _hashes(texts)} if statistics else {}
    return Plan(
        layers=tuple(
            chopping.chosen(
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
    inner = sum(budget.layer_parameters(model, n) for n in range(1, total - 1))

    def make(saving: float | int) -> Plan:
        count = round(saving * (total - 2) / inner)
        if not 0 < count <= total - 2:
            raise BillhookError(
                f"the budget asks for {saving:,.0f} parameters, {count} of {total} layers: at least one goes, and the first and "
                "the last stay"
            )
        return Plan(layers=tuple(depth.middle(total, count)))

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
        whole = allocation.even_planner(model, kinds, chosen.width_step, chosen.layout)
        if chosen.speedup is None:
            _solved(model, chosen, whole, dtype, quiet)
    alone = curves(model, texts.calibration[:1], texts.probe, (), settings, whole_layers=True, clock=clock, tick=tick)
    probe, best, since = Probe(model, texts.probe), (float("inf"), Plan()), 0
    for count in range(0 if kinds else 1, len(layers(model)) // 2):
        gone = _apart({n: loss[1] for (n, _), loss in alone.items()}, count)
        planner = allocation.even_planner(model, kinds, chosen.width_step, chosen.layout, gone=gone)
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
            carry_out(chosen.method)(
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
    return {"curves": name, **store.model_key(model), **_hashes(texts)} | {k: getattr(chosen, k) for k in decides}


def _hashes(texts: Texts) -> dict[str, str]:
    return {
        part: hashlib.sha256(getattr(texts, part).numpy().tobytes()).hexdigest() for part in ("calibration", "probe")
    }


def _kept(folder: Path | None, key: dict[str, Any], measure: Callable[[], Curves]) -> Curves:
    """`measure()`, or what it gave before where `folder` has it under the same key."""
    stored = store.kept(
        folder, key["curves"], key, lambda: [[n, kind, points] for (n, kind), points in measure().items()]
    )
    try:  # keys of JSON objects are text
        return {(int(n), kind): {int(c): float(loss) for c, loss in points.items()} for n, kind, points in stored}
    except (ValueError, TypeError, AttributeError) as error:
        raise BillhookError(f"statistics in {folder} cannot be read ({first_line(error)}): delete them") from error
