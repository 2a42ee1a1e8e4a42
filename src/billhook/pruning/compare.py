"""Many prunes of one model, judged by the same texts: methods at one size, or one method at many."""

import copy
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from billhook import data
from billhook.checkpoints import load
from billhook.checkpoints.load import Opened
from billhook.data import Text, Windows
from billhook.demo import cache_folder
from billhook.errors import BillhookError
from billhook.evaluation.perplexity import paired, perplexity
from billhook.math.knee import knee
from billhook.models import sizes
from billhook.models.axes import axes
from billhook.models.experts import fused
from billhook.models.families import WIDTHS, layers
from billhook.models.surgery import cast
from billhook.planning.method import Planned
from billhook.planning.recipe import Recipe
from billhook.pruning.contenders import Contender, settled
from billhook.pruning.prune import finish, prune_opened
from billhook.pruning.recipe import changed, recipe
from billhook.runtime import cache as cache_module
from billhook.runtime.cache import code_sha256, has, model_sha256
from billhook.runtime.progress import Tick, quiet
from billhook.runtime.run import Run
from billhook.runtime.workers import Workers, worker_pool

SAME_SIZE = 0.005  # share of the parameters: models nearer than this are equal in size
SAFE = 1.5  # times the unpruned model's perplexity: a knee beyond it is no recommendation
UNPRUNED = "unpruned"


@dataclass(frozen=True)
class Judged:
    """The texts that every model is judged by, in windows."""

    windows: tuple[Windows, ...]
    dtype: torch.dtype  # what every model computes in
    kept: Path | None  # where results are kept, statistics too
    model: str  # the unpruned one: its digest and dtype

    def key(self, chosen: Recipe | None) -> dict[str, Any]:
        """All that decides a point."""
        seen = [[one.sha256, len(one.tokens)] for one in self.windows]
        read = [_text_sha256(source) for source in (_sources(chosen) if chosen else ())]
        settings = chosen and chosen.flat()
        return {"code": code_sha256(), "model": self.model, "texts": seen, "read": read, "recipe": settings}


def judged(opened: Opened, texts: Sequence[Text], seq_len: int, most: int | None, folder: Path | None) -> Judged:
    """The windows of the texts, at most `most` of each."""
    load.check_positions(opened, seq_len)
    windows = [data.windows(text, opened.tokenizer, seq_len, spans=True) for text in texts]
    for one in windows:
        data.check_vocabulary(one, opened.model, opened.name)
    first = tuple(replace(one, tokens=one.tokens[:most], bytes=one.bytes[:most]) for one in windows)
    return Judged(first, opened.model.dtype, folder, f"{model_sha256(opened.model)} {opened.dtype}")


def open_judged(
    model: str, common: Mapping[str, Any], text: Sequence[str], most: int | None, tick: Tick = quiet
) -> tuple[Opened, Judged]:
    """A model, and the texts that all its prunes are judged by: at most `most` windows of each, as long and on the
    device that their `common` settings say."""
    said = {name: common[name] for name in ("seq_len", "device", "dtype", "family_row") if name in common}
    texts, chosen = data.evaluation_texts(list(text), tick), recipe(ratio=0.5, **said)
    how = chosen.compute.model_dump(include={"device", "dtype", "family_row"})
    opened = load.open_model(model, **how, tick=tick)
    return opened, judged(opened, texts, chosen.calibration.seq_len, most, cache_folder() / "results")


def unpruned(opened: Opened, by: Judged, tick: Tick = quiet) -> dict[str, Any]:
    """The point of the model as it is."""
    point = cache_module.cached(by.kept, UNPRUNED, by.key(None), lambda: _point(opened.model, by, None, tick))
    return point | {"series": UNPRUNED, "settings": UNPRUNED, "ratio": 0.0}


def compare(
    opened: Opened,
    contenders: Sequence[Contender],
    ratios: Sequence[float],
    by: Judged,
    common: Mapping[str, Any],
    *,
    jobs: int = 1,
    tick: Tick = quiet,
) -> list[dict[str, Any]]:
    """A point for every contender at every ratio, at one size: the contender of the coarsest step sets it.

    Args:
        common: settings that all contenders share: calibration, samples, …
        jobs: processes at work at a time, each with a model of its own.

    Returns:
        the unpruned model's point, then the others by ratio and in the order given; a contender that could not be run
        has its error in place of numbers.

    Raises:
        BillhookError: a setting is impossible; before any work.
    """
    recipes = {c.name: [settled(c, ratio, common) for ratio in ratios] for c in contenders}
    if len(recipes) < len(contenders):
        raise BillhookError("two contenders are the same")
    dense = unpruned(opened, by, tick)
    order = sorted(contenders, key=lambda c: -_step(opened, recipes[c.name][0]))
    found: dict[tuple[str, float], dict[str, Any]] = {}
    done, total = 0, len(contenders) * len(ratios)
    with _workers(opened, by, jobs, common.get("family_row") or "") as run:
        for n, ratio in enumerate(ratios):
            size, waiting = None, list(order)
            while waiting and size is None:  # one after the other until one sets the size
                first = waiting.pop(0)
                tick("contenders", done, total)
                (point,) = run([recipes[first.name][n]], tick)
                found[first.name, ratio], done = point, done + 1
                size = None if point["error"] else point["parameters"]
            chosen = [_at(recipes[c.name][n], size) for c in waiting]
            for c, point in zip(waiting, run(chosen, tick), strict=True):
                found[c.name, ratio], done = point, done + 1
                tick("contenders", done, total)
                if size and not point["error"] and abs(point["parameters"] / size - 1) > SAME_SIZE:
                    point["note"] = f"off the common size by {point['parameters'] / size - 1:+.1%}"
    tick("contenders", total, total)
    points = [
        found[c.name, ratio] | {"series": c.name, "settings": c.name, "ratio": ratio}
        for ratio in ratios
        for c in contenders
    ]
    return [dense, *_with_factors(points, dense)]


def sweep(opened: Opened, name: str, chosen: Sequence[Recipe], by: Judged, tick: Tick = quiet) -> list[dict[str, Any]]:
    """A point for every recipe, which differ in their ratio alone; `name` is what charts call them.

    In the dense stream one pass over the calibration text serves all ratios; in the others each has its own.
    """
    dense = unpruned(opened, by, tick)
    missing = [one for one in chosen if not has(by.kept, "point", by.key(one))]
    fresh = _each(opened, missing, by, tick) if missing else iter(())
    points = []
    for one in chosen:
        point = _kept(one, by, lambda: next(fresh))
        points.append(point | {"series": name, "settings": name, "ratio": one.budget.ratio})
    return [dense, *_with_factors(points, dense)]


def bend(points: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """The knee of a sweep on its first text, in words too; None where the curve shows none."""
    usable = [p for p in points if not p["error"]]
    curve = [(p["achieved_ratio"], p["perplexities"][0]) for p in sorted(usable, key=lambda p: p["achieved_ratio"])]
    logs = [statistics.fmean(one["window_losses"]) for _, one in curve]
    found = knee([ratio for ratio, _ in curve], logs)
    if found is None:
        return None
    factor, place = math.exp(found.below * found.ratio), f"{found.ratio:.0%} ± {(found.high - found.low) / 2:.0%}"
    words = (
        f"safe up to {place}"
        if factor <= SAFE
        else f"steep from {place} on, and no bargain before: ×{factor:.1f} by then"
    )
    return {**asdict(found), "text": curve[0][1]["text"], "factor": factor, "verdict": words}


def _each(opened: Opened, chosen: Sequence[Recipe], by: Judged, tick: Tick) -> Iterator[dict[str, Any]]:
    """A point for every recipe, in order, as soon as it is there."""
    first, method = chosen[0], chosen[0].method
    if first.budget.vocab_from or not method.at_once(first):
        for one in chosen:
            yield _cell(opened, one, by, tick)
        return
    run, decoder = Run(tick, statistics=by.kept), sizes.decoder_parameters(opened.model)
    method.check(opened, first)
    texts = method.draw(opened, first, data.calibration_text(first.calibration.source, tick), run)
    plans = method.plan_each(opened, chosen, texts, run)
    possible = [plan for plan in plans if isinstance(plan, Planned)]
    made = method.carry_out_each(opened.model, texts, possible, run)
    for one, plan in zip(chosen, plans, strict=True):
        if isinstance(plan, BillhookError):
            yield _NOTHING | {"error": str(plan)}
            continue
        model, _ = next(made)
        finish(model, one, opened.dtype)
        yield _point(model, by, decoder, tick)


def _kept(chosen: Recipe, by: Judged, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """`measure()`, or what it gave before; what went wrong is not kept."""
    return cache_module.cached(by.kept, "point", by.key(chosen), measure, lambda point: not point["error"])


def _cell(opened: Opened, chosen: Recipe, by: Judged, tick: Tick) -> dict[str, Any]:
    """One prune of a copy, judged; what a method cannot do is part of the answer."""
    copied = replace(opened, model=copy.deepcopy(opened.model))
    try:
        result = prune_opened(copied, chosen, Run(tick, statistics=by.kept))
    except BillhookError as error:
        return _NOTHING | {"error": str(error)}
    point = _point(result.model, by, sizes.decoder_parameters(opened.model), tick)
    return point | {"seconds": round(sum(result.record["seconds"].values()), 1)}


_NOTHING: dict[str, Any] = {
    "error": None,
    "note": None,
    "parameters": None,
    "decoder_parameters": None,
    "achieved_ratio": None,
    "perplexities": [],
    "seconds": None,
}


def _point(model: Any, by: Judged, decoder: int | None, tick: Tick) -> dict[str, Any]:
    """A model's size and quality; `decoder`: the parameters of the unpruned decoder."""
    size = sizes.parameters(model)
    cast(model, by.dtype)  # what is stored was rounded; all are judged in one dtype
    with fused(model):
        scores = [asdict(perplexity(model, one, tick)) for one in by.windows]
    return _NOTHING | {
        "parameters": size["parameters"],
        "decoder_parameters": size["decoder_parameters"],
        "achieved_ratio": 1 - size["decoder_parameters"] / decoder if decoder else 0.0,
        "perplexities": scores,
    }


def _with_factors(points: list[dict[str, Any]], dense: dict[str, Any]) -> list[dict[str, Any]]:
    for point in points:
        for found, before in zip(point["perplexities"], dense["perplexities"], strict=False):
            found["factor"], found["factor_standard_error"] = paired(before["window_losses"], found["window_losses"])
    return points


def _step(opened: Opened, chosen: Recipe) -> int:
    """Parameters that the finest step of a recipe's axes takes."""
    model, each = opened.model, len(layers(opened.model)) if chosen.shape.layout == "uniform" else 1
    steps = [
        axis.price(model) * (chosen.shape.width_step if axis.kind in WIDTHS else axis.blocks) * each
        for axis in axes(model, chosen.unit_kinds)
        if axis.layer == 0
    ]
    return min(steps, default=sizes.layer_parameters(model, 0))


def _at(chosen: Recipe, size: int | None) -> Recipe:
    """The same, with a size in place of the ratio."""
    return chosen if size is None else changed(chosen, ratio=None, params=size)


@contextmanager
def _workers(
    opened: Opened, by: Judged, jobs: int, family_row: str
) -> Iterator[Callable[[list[Recipe], Tick], list[dict[str, Any]]]]:
    """Yield what runs recipes, each once: here, or in `jobs` processes that share the cores."""

    def here(chosen: list[Recipe], tick: Tick) -> list[dict[str, Any]]:
        return [_kept(one, by, lambda one=one: _cell(opened, one, by, tick)) for one in chosen]

    if jobs == 1:
        yield here
        return
    device = str(opened.model.device)
    how = {"dtype": str(by.dtype).removeprefix("torch."), "family_row": family_row}
    prepare = partial(load.open_model, opened.name, device=device, **how)
    with worker_pool(Workers(jobs), device, prepare) as pool:
        yield lambda chosen, tick: list(pool.map(_in_worker, chosen, by))


def _sources(chosen: Recipe) -> tuple[str, ...]:
    """The texts that a recipe reads."""
    return (chosen.calibration.source, *chosen.budget.vocab_from, *chosen.settings.texts)


@cache
def _text_sha256(source: str) -> str:
    return data.calibration_text(source).sha256


def _in_worker(opened: Opened, by: Judged, chosen: Recipe) -> dict[str, Any]:
    return _kept(chosen, by, lambda: _cell(opened, chosen, by, quiet))
