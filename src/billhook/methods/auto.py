"""The best cut that the minutes buy: rivals are tried on held-out windows, and the winner is refined."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from billhook.choices import JUDGES
from billhook.errors import BillhookError, SettingsError
from billhook.methods.minutes import EFFORTS, SPAN, SPENT, Effort, Work, price, spent, words
from billhook.methods.rivals import RIVALS, able, ready
from billhook.methods.trials import Bench, Tried, best, losses_of, record_of, tried
from billhook.planning.method import (
    LAYOUT,
    Foreseen,
    Method,
    MethodSettings,
    Opened,
    Planned,
    Price,
    Run,
    Text,
    Texts,
)
from billhook.planning.recipe import Calibration, Recipe
from billhook.runtime.options import option

FLOATS = 5  # numbers that training keeps of every weight: itself, as it was, its gradient, and Adam's two
ONE_WAY = "trials are what processes share, and one way to cut is all that may be tried here: leave it out"
ROOM = 2**33  # bytes that these take at most where weights are streamed


class AutoSettings(MethodSettings):
    """How hard to look, and whether what is left is refined; why these defaults: docs/LOG.md."""

    effort: str = option("normal", f"how much may be tried: {', '.join(EFFORTS)}", names=EFFORTS)
    minutes: float | None = option(None, "in place of --effort: how long it may take", gt=0)
    refine: bool = option(True, "move what is left towards the unpruned model by gradient, a few layers at once")
    judge: str = option(
        "reference", "second text that judges cuts: a text's name, reference, or own (none)", completes=JUDGES
    )

    @property
    def texts(self) -> tuple[str, ...]:
        return () if self.judge in JUDGES else (self.judge,)

    def second(self, read: Calibration) -> str | None:
        """The text that judges beside the calibration's own; None: none, or that has the technical prose already."""
        return None if self.judge == "own" or (self.judge == "reference" and read.has_prose) else self.judge


@dataclass(frozen=True)
class Won:
    """What `carry_out` does: the winner's own cut, and a refinement of it or None."""

    method: Method
    planned: Planned
    refining: Any
    windows: int | None = None  # to fit on, where not all
    minutes: float | int | None = None  # that all of it may take

    @property
    def stream(self) -> str:
        """What a layer sees."""
        return getattr(self.planned.settings, "stream", "")


class Auto(Method):
    name = "auto"
    title = "The best cut that the minutes buy"
    paper = "after arXiv:2305.14864, 2501.09412, 2510.13999, 2510.14444"
    does = (
        "Tries what the family can give up, whole layers with a patch, widths, experts, and in the per_layer layout uneven widths, "
        "and takes what is nearest to the unpruned model on windows that no fit has seen; the one of less depth, where these do not "
        "tell two apart. Then what stands beside the cut is moved by gradient until it puts out what the unpruned model does there."
    )
    needs = "calibration text; gradients of ten layers at a time"
    costs = (
        "a trial of each cut on a part of the windows, the winner on all, and a few passes over them, forth and back"
    )
    loads = LAYOUT
    example = "billhook prune demo --ratio 0.2 -o smaller"
    Settings = AutoSettings
    kinds = tuple(dict.fromkeys(kind for rival in RIVALS for kind in rival.kinds))

    def fits(self, recipe: Recipe) -> None:
        if recipe.shape.spread.name != "equal":
            raise SettingsError("auto decides which layers give how much: leave out --allocation, or name a --method")
        if recipe.settings.refine and recipe.samples < 2:
            raise SettingsError("one window cannot be refined on and judged by: raise --samples, or give --no-refine")
        if recipe.settings.minutes and recipe.settings.effort != AutoSettings().effort:
            raise SettingsError("--minutes says what may be tried, and so does --effort: give one")

    def samples(self, recipe: Recipe) -> int:
        return SPENT["thorough" if recipe.settings.minutes else recipe.settings.effort].windows

    def draw(self, opened: Opened, recipe: Recipe, text: Text, run: Run) -> Texts:
        from billhook.planning.texts import with_another_kind

        drawn, second = super().draw(opened, recipe, text, run), recipe.settings.second(recipe.calibration)
        return with_another_kind(drawn, opened, recipe, second, run.tick) if second is not None else drawn

    def judges(self, recipe: Recipe) -> bool:
        return True

    def searches(self, recipe: Recipe) -> bool:
        return True

    def why_whole(self, recipe: Recipe) -> str:
        asked = recipe.shape.axes
        uneven = recipe.shape.layout == "per_layer" and asked and "layers" not in asked
        return "uneven widths are measured on the whole model" if uneven else ""

    def why_alone(self, recipe: Recipe) -> str:
        if recipe.settings.minutes:
            return "--minutes is told by what one process takes: leave out either, or give --effort"
        return ONE_WAY if SPENT[recipe.settings.effort].rivals == 1 else ""

    def check(self, opened: Opened, recipe: Recipe) -> None:
        from billhook.models.limits import check_kinds
        from billhook.planning.axis_plan import check, check_uniform
        from billhook.runtime.offload import is_offloaded

        if is_offloaded(opened.model):
            _check_streamed(recipe)
        if recipe.shape.axes:
            check(opened.model, recipe)
        elif recipe.shape.layout == "uniform":
            check_uniform(opened.model)
        else:
            check_kinds(opened.model, ("ffn",), recipe.shape.layout)  # an axis that all have

    def plan(self, opened: Opened, recipe: Recipe, texts: Texts, run: Run) -> Planned:
        from billhook.models.plan import Plan
        from billhook.runtime.offload import is_offloaded
        from billhook.training.refinement import Refining

        if not recipe.sized:
            return Planned(Plan(), None)  # the vocabulary alone
        if not len(texts.calibration):
            return self._untried(opened, recipe)
        read, streamed = recipe.calibration, is_offloaded(opened.model)
        if run.workers.many and (streamed or len(able(opened, recipe)) == 1):
            raise SettingsError(f"{run.workers.flag}: {ONE_WAY}")
        work = self._work(opened, recipe, len(texts.calibration), streamed)
        effort = self._effort(opened, recipe, work, lambda: price(opened.model, read.seq_len))
        if streamed:
            effort = replace(effort, rivals=1)  # a trial would copy the model
        texts = _first(texts, work.fitted(effort))
        run, judged = _claimed(opened, recipe, texts, run), replace(texts, probe=texts.judges)
        with TemporaryDirectory() as scratch:  # what one rival measures others take
            kept = replace(run, statistics=run.statistics or Path(scratch))
            found, refused = ready(opened, recipe, effort, judged, kept)
        done: dict[str, Tried] = {}
        few = texts.calibration[: effort.trial]
        if len(found) > 1:
            refining = Refining(passes=1, length=SPAN) if recipe.settings.refine else None
            done = tried(Bench(opened.model, replace(judged, calibration=few), refining, run.hidden), found, run)
        name = best(losses_of(done)) if done else next(iter(found))
        method, planned = found[name]
        refining = None
        if recipe.settings.refine and (length := _span(opened.model, streamed)):
            refining = Refining(passes=effort.passes, length=length)
        record = {"chosen": name, **record_of(done), "trial_windows": len(few), "refused": refused}
        seen = {"calibration": texts.record(read.seq_len)}  # where minutes are short, not all of it
        won = Won(method, planned, refining, len(texts.calibration), recipe.settings.minutes)
        return Planned(planned.plan, won, planned.scores, {**planned.record, "auto": record, **seen})

    def _untried(self, opened: Opened, recipe: Recipe) -> Planned:
        """What the first rival would do: as much as any, if not of the same layers."""
        import torch

        from billhook.planning.texts import Texts
        from billhook.runtime.run import Run

        nothing = torch.zeros(0, recipe.calibration.seq_len, dtype=torch.long)
        found, _ = ready(opened, recipe, SPENT["quick"], Texts(nothing, nothing), Run())
        ((method, planned),) = found.values()
        return Planned(planned.plan, Won(method, planned, None), planned.scores)

    def _work(self, opened: Opened, recipe: Recipe, windows: int, streamed: bool) -> Work:
        try:
            planned = self._untried(opened, recipe)
        except BillhookError:  # nothing can be told before it is measured
            return Work.of(opened.model, windows, recipe)
        patched = getattr(planned.settings.planned.settings, "patch", "none") != "none"
        work = Work.of(opened.model, windows, recipe, planned.plan, patched)
        if not streamed:
            return work
        return replace(work, refined=min(_span(opened.model, streamed), work.layers - work.gone) if work.gone else 0)

    def _effort(self, opened: Opened, recipe: Recipe, work: Work, price: Price) -> Effort:
        settings = recipe.settings
        if not settings.minutes:
            return replace(SPENT[settings.effort], windows=work.windows)  # all that were drawn
        asked = settings.refine, recipe.compute.look
        return spent(settings.minutes, work, able(opened, recipe), asked, price())

    def foreseen(self, opened: Opened, recipe: Recipe, planned: Planned, price: Price, streamed: bool) -> Foreseen:
        from billhook.models import sizes

        if streamed:
            _check_streamed(recipe)
        won: Won = planned.settings
        work, model = self._work(opened, recipe, recipe.samples, streamed), opened.model
        played = None if work.alone else (won.method, won.planned)
        if played and (why := won.method.why_unforeseen(recipe)):
            raise BillhookError(f"--dry-run: {why}: what that costs cannot be told beforehand")
        effort, refine = self._effort(opened, recipe, work, price), recipe.settings.refine and work.refined > 0
        rivals, windows = able(opened, recipe)[: 1 if streamed else effort.rivals], work.fitted(effort)
        effort = effort.within(work, price)
        stages = work.stages(effort, rivals, refine)
        copied = sizes.total_parameters(model) if len(rivals) > 1 else 0
        states = windows * recipe.calibration.seq_len * model.get_input_embeddings().weight.shape[1]
        span = max(1, _span(model, streamed))
        trained = FLOATS * min(span, work.refined) * sizes.layer_parameters(model, work.layers - 1)
        spans = math.ceil(work.refined / span)
        memory = 4 * (copied + (trained + spans * states if refine else 0))
        return Foreseen(stages, memory, windows, played, words(effort, work, rivals, refine))

    def carry_out(self, model: Any, texts: Texts, planned: Planned, run: Run) -> dict[str, Any]:
        from billhook.runtime.workers import ONE_PROCESS
        from billhook.training.refinement import aims, refine, spans_of

        if planned.plan.empty:
            return {"cuts": []}
        won, run = planned.settings, replace(run, workers=ONE_PROCESS)  # which had its part in the trials
        texts = _first(texts, won.windows)
        wanted = spans_of(model, planned.plan, won.refining.length) if won.refining else []
        if not wanted:
            return won.method.carry_out(model, texts, won.planned, run)
        aimed = aims(model, texts.calibration, wanted, won.refining, run)
        carried = won.method.carry_out(model, texts, won.planned, run)
        refining = won.refining
        if won.minutes:
            refining = replace(refining, seconds=_left(won.minutes, run.clock.seconds))
        refined = refine(model, texts.calibration, aimed, refining, run)
        return {**carried, "refined": [asdict(one) for one in refined]}

    def announcement(self, opened: Opened, recipe: Recipe, planned: Planned, texts: Texts) -> str:
        line = super().announcement(opened, recipe, planned, texts)
        return f"{planned.record['auto']['chosen']}: {line}" if planned.record else line


def _left(minutes: float | int, spent: Mapping[str, float]) -> float:
    """Seconds that a refinement has, of the minutes for all: what was spent so far, by stage, is known, and a look is
    to come that takes as long as the one before."""
    return max(1.0, 60 * minutes - sum(spent.values()) - spent.get("look", 0.0))


def _span(model: Any, streamed: bool) -> int:
    """Layers that are refined together; where weights are streamed as many as there is room to train, perhaps none."""
    if not streamed:
        return SPAN
    from billhook.models import sizes
    from billhook.models.families import layers
    from billhook.runtime.memory import free_bytes

    each = 4 * FLOATS * sizes.layer_parameters(model, len(layers(model)) - 1)
    return min(SPAN, min(ROOM, free_bytes(model.device) // 2) // each)


def _check_streamed(recipe: Recipe) -> None:
    if recipe.settings.minutes:
        raise SettingsError("--minutes: where weights are streamed nothing is timed or tried: leave it out")


def _first(texts: Texts, windows: int | None) -> Texts:
    return replace(texts, calibration=texts.calibration[:windows])


def _claimed(opened: Opened, recipe: Recipe, texts: Texts, run: Run) -> Run:
    """The run, whose folder keeps what is measured on the way to the plan:
    after a kill none of it is measured again."""
    from billhook.runtime import cache, run_folder

    if run.folder is None:
        return run
    key = {"settings": recipe.flat(), **cache.model_key(opened.model), "calibration text": texts.windows.sha256}
    key |= {"second text": texts.elsewhere.sha256}
    run_folder.claim(run.folder, key, run.fresh)
    return replace(run, statistics=run.statistics or run.folder)


METHOD = Auto()
