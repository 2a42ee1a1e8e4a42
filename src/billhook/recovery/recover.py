"""Train a pruned model after the cut: on the unpruned model's predictions, or on text alone.

The teacher's predictions are cached on disk once, so that training holds one model in memory.  All that a killed run
needs to go on lies in one folder.
"""

import math
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import PartialState

from billhook.checkpoints.adapter import Adapted
from billhook.checkpoints.result import Result
from billhook.choices import BITS, TRAINABLE
from billhook.errors import BillhookError
from billhook.evaluation.perplexity import perplexity_of
from billhook.math.pattern import parse
from billhook.models.multimodal import type_of
from billhook.models.surgery import cast
from billhook.recovery.budget import TRIAL, TRIAL_STEPS, rates_of
from billhook.recovery.selection import on_what_it_keeps
from billhook.recovery.settings import recovery
from billhook.recovery.setup import Environment, Prepared, device_of, on_cpu, prepare
from billhook.recovery.student import UNMASKED
from billhook.reports import records
from billhook.runtime import cache, run_folder
from billhook.runtime.memory import peak_growth
from billhook.runtime.progress import Tick, quiet, unheard
from billhook.training import kept_windows, moving_masks, trainables
from billhook.training.early_stopping import EarlyStopping
from billhook.training.schedule import Diverged, Schedule, checkpoints
from billhook.training.text_windows import conditions

if TYPE_CHECKING:
    from billhook.training.trainer import RecoveryTrainer


def recover(
    model: str | os.PathLike[str],
    *,
    work: str | os.PathLike[str] | None = None,
    lessons: str | os.PathLike[str] | None = None,
    fresh: bool = False,
    tick: Tick = quiet,
    announce: Callable[[str], object] = unheard,
    **settings: Any,
) -> Result:
    """Train a checkpoint, on as many processes as `accelerate launch` has started.

    Args:
        model: a folder, a hub id, a .gguf file, or `demo`.
        work: a folder for all that the same call needs to go on after a kill; delete it afterwards.  Not given: nothing
            stays.
        lessons: a folder for the teacher's predictions, which other runs may share; in `work` if not given.
        fresh: start over where `work` holds an unfinished run; the teacher's predictions stay.
        tick: called with (stage, done, total) as the work proceeds.
        announce: called with one line that says what will be trained, before it is.
        settings: the fields of `Recovery`: teacher="demo", tokens="500k", text=("wiki.txt",), …

    Returns:
        the trained model in its checkpoint's dtype on the CPU, in every process, with its report; where adapters are
        not merged, the base with them, float32.

    Raises:
        BillhookError: anything that cannot work, in one line; `work` holds another run; the loss is no longer finite.
    """
    chosen = recovery(**settings)
    if work is None:
        with tempfile.TemporaryDirectory() as scratch:
            return recover(model, work=scratch, lessons=lessons, tick=tick, announce=announce, **chosen.model_dump())
    work = Path(work)
    cache.check_folder(Path(lessons) if lessons else None, "--lessons")
    process = PartialState(cpu=on_cpu(chosen.device))
    locked = run_folder.locked(work) if process.is_main_process else nullcontext()
    with locked, peak_growth(device_of(process)) as growth, _removed_if_refused(work):
        predictions, own_tick = (
            Path(lessons) if lessons else work / "lessons",
            tick if process.is_main_process else quiet,
        )
        env = Environment(work, predictions, process, own_tick)
        prepared = prepare(os.fspath(model), chosen, env, fresh=fresh)
        tried = [] if chosen.lr else _try_rates(prepared)
        rate = chosen.lr or _best_rate(tried)
        if chosen.keep_share is not None:
            prepared = on_what_it_keeps(prepared, rate, announce)
        if process.is_main_process:
            for line in _announcements(prepared, rate):
                announce(line)
        guards = prepared.texts.guards if chosen.guard else ()
        early_stopping = EarlyStopping(prepared.texts.held_out, guards, prepared.schedule.autocast)
        trainer = prepared.trainer(replace(prepared.schedule, lr=rate), early_stopping, work, env.tick)
        trainer.train_or_resume(announce)
        prepared.clock.seconds |= {"training": trainer.seconds, "judging": early_stopping.seconds}
        stopped_by = early_stopping.stopped_by(trainer.evaluations)
        last = trainer.state.global_step
        kept = early_stopping.best(trainer.evaluations)["step"] if stopped_by else last
        if kept and kept != last:
            trainer.restore(kept)
        trained_parameters = trainables.trained(trainer.model)
        trained: Any = trainer.gathered(prepared.start) if kept else prepared.start()
        trained = (trainables.merged(trained) if chosen.merge else trained).cpu()
    student = prepared.student
    if chosen.merge:
        cast(trained, student.dtype)
        _check_zeros(prepared, trained)
    outcome = _outcome(prepared, trainer, tried, stopped_by, kept)
    outcome |= {"trained_parameters": trained_parameters, "parameters": sum(p.numel() for p in trained.parameters())}
    if few := (student.record or {}).get("quantized"):  # what it was given before, which is not what it has now
        outcome["quantized"] = {key: value for key, value in few.items() if key not in ("operators", "choice")}
    outcome |= {"peak_growth_bytes": growth(), "versions": records.versions()}
    empty = {
        "parent": student.name,
        "model_type": type_of(trained if chosen.merge else trained.get_base_model()),
        "versions": records.versions(),
    }
    record = {key: value for key, value in (student.record or empty).items() if key != "quantized"}
    record = {**record, "recovery": [*record.get("recovery", []), outcome]}
    made = Result if chosen.merge else Adapted
    return made(trained.eval(), student.tokenizer, record, student.folder, beside=_beside(prepared))


@contextmanager
def _removed_if_refused(work: Path) -> Iterator[None]:
    """Remove the folder of a new run that is refused, unless it has checkpoints or predictions of the teacher."""
    is_old = (work / run_folder.NAME).exists()
    try:
        yield
    except BillhookError:
        if not is_old and not checkpoints(work) and not any(work.glob("lessons/*")):
            run_folder.remove(work)
        raise


def _try_rates(prepared: Prepared) -> list[dict[str, float]]:
    """A few steps at each of several rates; the loss afterwards on windows held out of the training text."""
    if not prepared.texts.held_out:
        raise BillhookError(
            "--lr auto judges rates by held-out text, and there is none: name a --held-out, or give a rate"
        )
    schedule, env = prepared.schedule, prepared.env
    steps = max(TRIAL_STEPS, round(TRIAL * schedule.steps))
    short = replace(schedule, order=schedule.order[: steps * schedule.rows], evaluate_after=(), mixture=None)
    rates, tried = rates_of(prepared.chosen), []
    with prepared.clock("rates"):
        for n, rate in enumerate(rates):

            def tick(stage: str, done: int, total: int, n: int = n) -> None:
                env.tick("trying rates", n * steps + done, len(rates) * steps)

            tried.append(_try_rate(prepared, replace(short, lr=rate), tick))
    return tried


def _try_rate(prepared: Prepared, schedule: Schedule, tick: Tick) -> dict[str, float]:
    """The rate of a short schedule and the loss after it, which is kept: all processes train, the first one writes."""
    env, key = prepared.env, {"lr": schedule.lr}
    is_known = env.in_first(lambda: cache.has(env.work, "rate", key))
    loss = None if is_known else _loss_after(prepared, schedule, tick)
    return env.in_first(lambda: cache.cached(env.work, "rate", key, lambda: {**key, "loss": loss}))


def _loss_after(prepared: Prepared, schedule: Schedule, tick: Tick) -> float | None:
    """The loss after a short schedule; None if it diverged."""
    texts = prepared.texts.of_training or prepared.texts.held_out[:1]
    until_the_end = EarlyStopping((), (), schedule.autocast)
    trainer = prepared.trainer(schedule, until_the_end, prepared.env.work / f"trial-{schedule.lr:g}", tick)
    try:
        trainer.train_or_resume(unheard)
    except Diverged:
        return None
    by_text = EarlyStopping(texts, (), schedule.autocast).losses(trainer.gathered(prepared.start))
    losses = [loss for losses in by_text.values() for loss in losses]
    return sum(losses) / len(losses)


def _best_rate(tried: Sequence[dict[str, float]]) -> float:
    lasting = [trial for trial in tried if trial["loss"] is not None and math.isfinite(trial["loss"])]
    if not lasting:
        rates = ", ".join(f"{trial['lr']:g}" for trial in tried)
        raise BillhookError(
            f"the loss is no longer finite after a few steps at any of the rates {rates}: give a lower --lr"
        )
    return min(lasting, key=lambda trial: trial["loss"])["lr"]


def _announcements(prepared: Prepared, rate: float) -> Iterator[str]:
    """What will be trained, and what the user should know of it, a line each."""
    yield _summary(prepared, rate)
    if prepared.texts.doubt:
        yield prepared.texts.doubt
    noise = prepared.student.noise
    if noise and not prepared.chosen.dropout:
        rates = ", ".join(f"{key} {value:g}" for key, value in noise.items())
        yield f"trained without the dropout of its config ({rates}), which stays there: --dropout trains with it"


def _summary(prepared: Prepared, rate: float) -> str:
    """What will be trained, in one line."""
    schedule, chosen, processes = prepared.schedule, prepared.chosen, prepared.env.process.num_processes
    told = f"distillation from {chosen.teacher}" if chosen.distils else ""
    objective = " and ".join(filter(None, (told, "" if chosen.objective == "distill" else "continued pretraining")))
    passes = len(schedule.order) / prepared.available
    shares = ", in shares that follow what is missing" if schedule.mixture else ""
    zeros = prepared.student.census
    levels = f" on the levels of {BITS[chosen.bits]}, a scale for each {chosen.scales}" if chosen.bits else ""
    moving = f" under masks of {chosen.pattern} that move every {moving_masks.EVERY} steps" if chosen.masks else ""
    return (
        f"{objective}, training {TRAINABLE[chosen.trainable]}{levels}{moving}: "
        f"{len(schedule.order) * chosen.seq_len:,} tokens of "
        f"{' and '.join(prepared.texts.names)} ({passes:.2g} passes){shares} in {schedule.steps:,} steps at {rate:g}"
        + (f", on {processes} processes" if processes > 1 else "")
        + (f", keeping all {zeros.total:,} zeros ({zeros.share:.0%})" if chosen.keeps_zeros and zeros.total else "")
    )


def _check_zeros(prepared: Prepared, trained: Any) -> None:
    """A last check that zeros stayed, or that a pattern holds; it can only fail by a fault of billhook's."""
    if prepared.chosen.keeps_zeros and (filled := prepared.student.census.filled(trained)):
        raise BillhookError(f"{filled:,} zeros of {prepared.student.name} were filled in training: nothing is written")
    pattern = prepared.chosen.pattern
    if pattern and (name := moving_masks.broken(trained, parse(pattern))):
        raise BillhookError(f"{name} of {prepared.student.name} is not {pattern} after training: nothing is written")


def _outcome(
    prepared: Prepared, trainer: "RecoveryTrainer", tried: Sequence[dict[str, float]], stopped_by: str, kept: int
) -> dict[str, Any]:
    """The record of a recovery as plain data, which the report shows.

    Args:
        tried: rates that were tried, with their losses.
        stopped_by: the text that got worse, if that ended the training.
        kept: the step after which the model is kept.
    """
    schedule, chosen, student, texts = trainer.schedule, prepared.chosen, prepared.student, prepared.texts
    steps_done, step_tokens = len(trainer.losses), schedule.step_tokens
    tokens_done, tokens_kept, seconds = steps_done * step_tokens, kept * step_tokens, prepared.clock.seconds
    stopped = None
    if stopped_by:
        stopped = f"{stopped_by} got worse after {tokens_done:,} tokens: the model of {tokens_kept:,} tokens is kept"
    return {
        "student": student.name,
        "teacher": chosen.teacher or None,
        "objective": chosen.objective,
        "states": schedule.states,
        "trainable": chosen.trainable,
        "rank": chosen.rank if chosen.trainable in UNMASKED else None,
        "keep_zeros": chosen.keep_zeros,
        "pattern": chosen.pattern or None,
        "masks": chosen.masks or None,
        "mask_score": chosen.mask_score if chosen.masks else None,
        "mask_decay": chosen.decay if chosen.masks else None,
        "flips": trainer.flips or None,
        "bits": chosen.bits or None,
        "scales": chosen.scales if chosen.bits else None,
        "contrast": chosen.contrast or None,
        "merge": None if chosen.merge else False,
        "loftq": chosen.loftq or None,
        "family_row": chosen.family_row or None,
        "dropout": chosen.dropout,
        "zeros": student.census.total if chosen.keeps_zeros else None,
        "texts": list(chosen.text),
        "text_sha256": list(texts.sha256),
        "mixture": chosen.mixture if chosen.mixture != "proportional" else None,
        "windows": len(set(trainer.order)),
        "windows_available": prepared.available,
        "passes": steps_done * schedule.rows / prepared.available,
        "keep_data": chosen.keep_data or None,
        "choosing": None if prepared.kept is None else _choosing(prepared),
        "tokens": len(schedule.order) * chosen.seq_len,
        "seq_len": chosen.seq_len,
        "begins_with": list(texts.begins_with),
        "batch_tokens": step_tokens,
        "steps": schedule.steps,
        "lr": schedule.lr,
        "warmup": schedule.warmup,
        "rates": list(tried),
        "precision": str(schedule.autocast or torch.float32).removeprefix("torch."),
        "top_k": chosen.top_k,
        "processes": prepared.env.process.num_processes,
        "seed": chosen.seed,
        "held_out": list(chosen.held_out),
        "held_out_doubt": texts.doubt or None,
        "losses": trainer.losses,
        "evaluations": [
            {
                "step": evaluation["step"],
                "tokens": evaluation["step"] * step_tokens,
                "perplexities": {text: perplexity_of(losses) for text, losses in evaluation["losses"].items()},
                **_shares(texts.names, evaluation),
            }
            for evaluation in trainer.evaluations
        ],
        "teacher_perplexities": prepared.teacher_perplexities,
        "judged_by": conditions(texts),
        "stopped": stopped,
        "kept_tokens": tokens_kept,
        "tokens_per_second": tokens_done / seconds["training"] if seconds["training"] else None,
        "seconds": {stage: round(spent, 3) for stage, spent in seconds.items()},
    }


def _beside(prepared: Prepared) -> dict[str, str]:
    """The file of the windows that were kept, where some were not."""
    if not prepared.chosen.keep_data:
        return {}
    numbers = range(len(prepared.texts.train)) if prepared.kept is None else prepared.kept
    return {kept_windows.NAME: kept_windows.lines(prepared.texts, numbers, prepared.student.tokenizer)}


def _choosing(prepared: Prepared) -> dict[str, int]:
    """Of how many windows it chose, and after how many tokens of training."""
    return {"windows": len(prepared.texts.train), "tokens": len(prepared.schedule.order) * prepared.chosen.seq_len}


def _shares(texts: Sequence[str], evaluation: dict[str, Any]) -> dict[str, dict[str, float]]:
    """The shares of the training texts after an evaluation, where it set any."""
    return {"shares": dict(zip(texts, evaluation["shares"], strict=True))} if "shares" in evaluation else {}
