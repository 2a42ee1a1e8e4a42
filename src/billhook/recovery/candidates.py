"""Which layers go, judged after a short heal: the ranks of candidates before and after training are not the same.

Every candidate is cut, trained on the same windows by the same rule, and judged by texts that it was not trained on.  Minitron
(arXiv:2407.14679) calls for it: "perform lightweight retraining to stabilize the rankings of searched pruned candidates".
"""

import copy
import gc
import math
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from billhook.evaluation.perplexity import perplexity_of
from billhook.recovery.settings import rows_for
from billhook.runtime import cache
from billhook.runtime.memory import return_freed
from billhook.runtime.precision import autocast_dtype
from billhook.runtime.progress import Tick, quiet
from billhook.training import teacher
from billhook.training.early_stopping import Judge
from billhook.training.schedule import Course
from billhook.training.text_windows import Texts, judged_by, order_of
from billhook.training.trainables import train_decoder

RATE = 3e-4  # for all alike; it left 1.66 times the perplexity where 5e-4 left 1.73 (docs/LOG.md)
TOP_K = 256


def after_a_heal(
    model: Any,
    candidates: Mapping[str, Sequence[int]],
    cut: Callable[[Any, Sequence[int]], object],
    texts: Texts,
    tokens: int,
    *,
    key: Mapping[str, Any],
    folder: Path | None = None,
    seed: int = 0,
    tick: Tick = quiet,
) -> dict[str, Any]:
    """What each candidate is worth right after the cut and after `tokens` of distillation from `model`, and which is best.

    Args:
        candidates: the layers that would go, by name; those that name the same layers are trained once.
        cut: drops layers of a model, in place.
        key: what else decides the results: how `cut` cuts.
        folder: keeps the teacher's answers and each candidate's result, so that a killed search goes on.

    Returns:
        {"chosen", "by", "heal_tokens", "lr", "judged_by", "seconds", "candidates": [{"name", "dropped", "before", "after", "rank_before", "rank_after"}]},
        perplexities by text; the ranks are of their geometric mean over the held-out texts.
    """
    started, autocast = time.perf_counter(), autocast_dtype("auto", model.device)
    rows = rows_for(tokens, texts.train.shape[1])
    steps = max(1, round(tokens / (rows * texts.train.shape[1])))
    course = Course(
        windows=texts.train,
        order=order_of(len(texts.train), steps * rows, seed),
        rows=rows,
        lr=RATE,
        autocast=autocast,
        cpu=model.device.type == "cpu",
        seed=seed,
    )
    key = {
        **key,
        **cache.model_key(model),
        "windows": cache.digest({"train": texts.train[list(set(course.order))].tolist()}),
        "judged": [text.text_sha256 for text in texts.judged],
        "course": [rows, steps, RATE, str(autocast), seed],
    }
    judge, found = Judge(texts.judged, (), autocast), []
    with tempfile.TemporaryDirectory() as scratch:
        kept = folder or Path(scratch)
        lessons = teacher.lessons(
            model,
            texts.train[: len(set(course.order))],
            kept / "lessons",
            k=TOP_K,
            states=False,
            autocast=autocast,
            tick=tick,
        )

        def tried(gone: Sequence[int], nth: int) -> dict[str, Any]:
            def of_all(stage: str, done: int, total: int) -> None:
                tick("healing candidates", nth * steps + done, len(candidates) * steps)

            from billhook.training.trainer import Healer  # brings 120 MB, for whoever trains alone

            student = copy.deepcopy(model).float()
            cut(student, gone)
            before = judge(student)
            healer = Healer(
                train_decoder(student, None, 0), course, lessons, Judge(()), Path(scratch) / f"heal-{nth}", of_all
            )
            healer.heal(lambda line: None)
            after = judge(healer.gathered(lambda: student))
            return {"before": _perplexities(before), "after": _perplexities(after)}

        for nth, (name, gone) in enumerate(candidates.items()):
            one = cache.cached(kept, "candidate", {**key, "dropped": list(gone)}, lambda g=gone, n=nth: tried(g, n))
            found.append({"name": name, "dropped": list(gone), **one})
            gc.collect()
            return_freed()
    deciding = texts.guards or tuple(text.source for text in texts.judged)
    for moment in ("before", "after"):
        worth = sorted(found, key=lambda one: _mean_log(one[moment], deciding))
        for one in found:
            one[f"rank_{moment}"] = 1 + worth.index(one)
    return {
        "chosen": min(found, key=lambda one: one["rank_after"])["name"],
        "by": " and ".join(deciding),
        "heal_tokens": steps * course.step_tokens,
        "lr": RATE,
        "seconds": round(time.perf_counter() - started, 1),
        "judged_by": judged_by(texts),
        "candidates": found,
    }


def _perplexities(losses: Mapping[str, Sequence[float]]) -> dict[str, float]:
    return {text: perplexity_of(found) for text, found in losses.items()}


def _mean_log(perplexities: Mapping[str, float], texts: Sequence[str]) -> float:
    found = [perplexities[text] for text in texts]
    return sum(math.log(one) if math.isfinite(one) else math.inf for one in found) / len(found)
