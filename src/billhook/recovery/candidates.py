"""Which layers go, judged after a short training: the ranks of candidates before and after it differ.

Every candidate is cut, trained on the same windows by the same schedule, and evaluated on texts that it was not trained
on. Minitron (arXiv:2407.14679): "perform lightweight retraining to stabilize the rankings of searched pruned
candidates".
"""

import copy
import gc
import math
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from billhook.evaluation.perplexity import perplexity_of
from billhook.recovery.settings import rows_for
from billhook.runtime import cache
from billhook.runtime.memory import return_freed
from billhook.runtime.precision import autocast_dtype
from billhook.runtime.progress import Tick
from billhook.runtime.run import Run
from billhook.training import teacher
from billhook.training.early_stopping import EarlyStopping
from billhook.training.schedule import Schedule
from billhook.training.teacher import TeacherCache
from billhook.training.text_windows import TrainingTexts, conditions, order_of
from billhook.training.trainables import train_decoder

RATE = 3e-4  # learning rate of all candidates; it left 1.66 times the perplexity where 5e-4 left 1.73 (docs/LOG.md)
TOP_K = 256  # the teacher's predictions that are kept of each token
Cut = Callable[[Any, Sequence[int]], object]  # drops layers of a model, in place


@dataclass(frozen=True)
class TrainedCandidate:
    """A candidate, its perplexities by text, and its ranks, 1 for the best."""

    name: str
    dropped: list[int]  # the layers that go
    before: dict[str, float]  # right after the cut
    after: dict[str, float]  # after the training
    rank_before: int
    rank_after: int


@dataclass(frozen=True)
class Ranking:
    """What candidates are worth before and after a short training; `record` has these fields as plain data."""

    chosen: str  # name of the best candidate after the training
    by: str  # the texts that decide
    heal_tokens: int
    lr: float
    seconds: float
    judged_by: dict[str, dict[str, Any]]  # the windows behind the perplexities, by text
    candidates: list[TrainedCandidate]

    def record(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Training:
    """How every candidate is trained, and on what."""

    model: Any  # the unpruned model, which is the teacher
    cut: Cut
    texts: TrainingTexts
    schedule: Schedule
    teacher: TeacherCache

    def perplexities(self, dropped: Sequence[int], work: Path, tick: Tick) -> dict[str, dict[str, float]]:
        """Perplexities by text without the layers `dropped`: "before" the training and "after" it."""
        from billhook.training.trainer import RecoveryTrainer  # takes 120 MB of memory, only where something is trained

        evaluation = EarlyStopping(self.texts.held_out, (), self.schedule.autocast)
        student = copy.deepcopy(self.model).float()
        self.cut(student, dropped)
        before = evaluation.losses(student)
        trainable, until_the_end = train_decoder(student, None, 0), EarlyStopping(())
        trainer = RecoveryTrainer(trainable, self.schedule, self.teacher, until_the_end, work, tick)
        trainer.train_or_resume(lambda line: None)
        after = evaluation.losses(trainer.gathered(lambda: student))
        return {"before": _by_text(before), "after": _by_text(after)}


class Length(NamedTuple):
    """How long each candidate is trained."""

    tokens: int
    seed: int = 0  # of the order of the windows


def rank_after_training(
    model: Any,
    candidates: Mapping[str, Sequence[int]],
    cut: Cut,
    texts: TrainingTexts,
    length: Length,
    key: Mapping[str, Any],
    run: Run,
) -> Ranking:
    """What each candidate is worth right after the cut and after so much distillation from `model`.

    Candidates are ranked by the geometric mean of their perplexities over the held-out texts.

    Args:
        candidates: the layers that would go, by name; candidates that name the same layers are trained once.
        cut: drops layers of a model, in place.
        key: what else decides the results: how `cut` cuts.
        run: its `statistics` keeps the teacher's predictions and each candidate's result, so that a killed run goes on.
    """
    started = time.perf_counter()
    schedule = _schedule(model, texts, length)
    windows = len(set(schedule.order))
    key = {
        **key,
        **cache.model_key(model),
        "windows": cache.digest({"train": texts.train[list(set(schedule.order))].tolist()}),
        "judged": [text.text_sha256 for text in texts.held_out],
        "course": [schedule.rows, schedule.steps, schedule.lr, str(schedule.autocast), length.seed],
    }
    results: dict[str, dict[str, dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        kept = run.statistics or Path(scratch)
        asked = teacher.Lesson(TOP_K, autocast=schedule.autocast)
        answers = teacher.fill_cache(model, texts.train[:windows], kept / "lessons", asked, tick=run.tick)
        training = Training(model, cut, texts, schedule, answers)
        for n, (name, dropped) in enumerate(candidates.items()):
            ticked = _part(run.tick, n, len(candidates), schedule.steps)
            measure = partial(training.perplexities, dropped, Path(scratch) / f"heal-{n}", ticked)
            results[name] = cache.cached(kept, "candidate", {**key, "dropped": list(dropped)}, measure)
            gc.collect()
            return_freed()
    deciding = texts.guards or tuple(text.source for text in texts.held_out)
    before, after = (_ranks(results, moment, deciding) for moment in ("before", "after"))
    return Ranking(
        chosen=min(after, key=after.__getitem__),
        by=" and ".join(deciding),
        heal_tokens=schedule.steps * schedule.step_tokens,
        lr=RATE,
        seconds=round(time.perf_counter() - started, 1),
        judged_by=conditions(texts),
        candidates=[
            TrainedCandidate(
                name, list(candidates[name]), **results[name], rank_before=before[name], rank_after=after[name]
            )
            for name in results
        ],
    )


def _schedule(model: Any, texts: TrainingTexts, length: Length) -> Schedule:
    seq_len = texts.train.shape[1]
    rows = rows_for(length.tokens, seq_len)
    steps = max(1, round(length.tokens / (rows * seq_len)))
    return Schedule(
        windows=texts.train,
        order=order_of(len(texts.train), steps * rows, length.seed),
        rows=rows,
        lr=RATE,
        autocast=autocast_dtype("auto", model.device),
        cpu=model.device.type == "cpu",
        seed=length.seed,
    )


def _part(tick: Tick, n: int, count: int, steps: int) -> Tick:
    """Report the steps of the n-th of `count` trainings as a part of all steps."""

    def of_all(stage: str, done: int, total: int) -> None:
        tick("healing candidates", n * steps + done, count * steps)

    return of_all


def _ranks(results: Mapping[str, Mapping[str, Any]], moment: str, texts: Sequence[str]) -> dict[str, int]:
    order = sorted(results, key=lambda name: _mean_log(results[name][moment], texts))
    return {name: 1 + order.index(name) for name in results}


def _by_text(losses: Mapping[str, Sequence[float]]) -> dict[str, float]:
    return {text: perplexity_of(window_losses) for text, window_losses in losses.items()}


def _mean_log(perplexities: Mapping[str, float], texts: Sequence[str]) -> float:
    values = [perplexities[text] for text in texts]
    return sum(math.log(value) if math.isfinite(value) else math.inf for value in values) / len(values)
