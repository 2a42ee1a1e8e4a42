"""Train a pruned model back: from the unpruned model's predictions, or on text alone.

The teacher answers once, to disk; then one model is in memory.  All that a killed run needs to go on lies in one folder.
"""

import math
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import PartialState

from billhook.checkpoints.publish import check_out, publish
from billhook.choices import TRAINABLE
from billhook.errors import BillhookError
from billhook.evaluation.perplexity import perplexity_of
from billhook.models.surgery import cast
from billhook.recovery.settings import recovery
from billhook.recovery.setup import BY_FORM, TRIAL, TRIAL_STEPS, Run, on_cpu, prepare, rates_of, shared, where
from billhook.reports import commands, records
from billhook.runtime import atomic, cache, run_folder
from billhook.runtime.memory import peak_growth
from billhook.runtime.progress import Tick, quiet, unheard
from billhook.training import trainables
from billhook.training.early_stopping import Judge
from billhook.training.schedule import Course, Diverged, checkpoints
from billhook.training.text_windows import judged_by

if TYPE_CHECKING:
    from billhook.training.trainer import Healer


@dataclass
class Recovered:
    """A trained model, its tokenizer, and its record: what billhook.json will hold."""

    model: Any
    tokenizer: Any
    report: dict[str, Any]
    source: Path | None

    @property
    def healing(self) -> dict[str, Any]:
        """What this recovery was and did."""
        return self.report["recovery"][-1]

    def page(self) -> dict[str, Any]:
        """The content of report.json."""
        found = self.healing
        title = f"{found['student']}, trained on {found['kept_tokens']:,} tokens"
        where = records.conditions(self.model, commands.recover_command(found), sum(found["seconds"].values()))
        cut = self.report if "cuts" in self.report else None
        return records.assemble("recover", title, where, cut=cut, healing=found)

    def save(self, path: str | os.PathLike[str], overwrite: bool = False) -> Path:
        """Write a plain checkpoint with report and model card, reload it with stock transformers and compare.

        Raises:
            BillhookError: `path` is taken, cannot be written, or what was written does not come back equal.
        """
        out = Path(path)
        check_out(out, self.source, overwrite)
        with atomic.folder(out, overwrite) as work:
            self.write(work)
        return out

    def write(self, work: Path, tick: Tick = quiet) -> None:
        """Fill the existing folder `work` with a plain checkpoint and verify it."""
        publish(self.model, self.tokenizer, self.source, self.report, self.page, work, tick)


def recover(
    model: str | os.PathLike[str],
    *,
    work: str | os.PathLike[str] | None = None,
    lessons: str | os.PathLike[str] | None = None,
    fresh: bool = False,
    tick: Tick = quiet,
    announce: Callable[[str], object] = unheard,
    **settings: Any,
) -> Recovered:
    """Train a checkpoint, on as many processes as `accelerate launch` has started.

    Args:
        model: a folder, a hub id, a .gguf file, or `demo`.
        work: a folder for all that the same call needs to go on after a kill; delete it afterwards.  Not given: nothing stays.
        lessons: a folder for the teacher's answers, which other runs may share; in `work` if not given.
        fresh: start over where `work` holds an unfinished run; what the teacher answered stays.
        tick: called with (stage, done, total) as the work proceeds.
        announce: called with one line, what will be trained, before it is.
        settings: the fields of `Recovery`: teacher="demo", tokens="500k", text=("wiki.txt",), …

    Returns:
        the trained model in its checkpoint's dtype on the CPU, in every process, with its report.

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
    own = run_folder.locked(work) if process.is_main_process else nullcontext()
    with own, peak_growth(where(process)) as growth, _kept_if_begun(work):
        answers = Path(lessons) if lessons else work / "lessons"
        heard = tick if process.is_main_process else quiet
        run = prepare(os.fspath(model), chosen, work, answers, process, heard, fresh=fresh)
        tried = [] if chosen.lr else _try_rates(run)
        rate = chosen.lr or _best_rate(tried)
        if process.is_main_process:
            announce(_line(run, rate))
            if run.texts.doubt:
                announce(run.texts.doubt)
            if run.student.noise and not chosen.dropout:
                rates = ", ".join(f"{key} {rate:g}" for key, rate in run.student.noise.items())
                announce(
                    f"trained without the dropout of its config ({rates}), which stays there: --dropout trains with it"
                )
        guards = run.texts.guards if chosen.guard else ()
        judge = Judge(run.texts.judged, guards, run.course.autocast)
        healer = run.healer(replace(run.course, lr=rate), judge, work, run.tick)
        healer.heal(announce)
        run.clock.seconds |= {"training": healer.seconds, "judging": judge.seconds}
        stopped = judge.verdict(healer.judged)
        kept = judge.best(healer.judged)["step"] if stopped else healer.state.global_step
        if kept and kept != healer.state.global_step:
            healer.restore(kept)
        trained = trainables.trained(healer.model)
        healed = trainables.merged(healer.gathered(run.start) if kept else run.start())
    cast(healed.cpu(), run.student.dtype)
    _check_zeros(run, healed)
    found = _outcome(run, healer, tried, stopped, kept)
    found |= {"trained_parameters": trained, "parameters": sum(p.numel() for p in healed.parameters())}
    found |= {"peak_growth_bytes": growth(), "versions": records.versions()}
    blank = {"parent": run.student.name, "model_type": healed.config.model_type, "versions": records.versions()}
    record = run.student.record or blank
    record = {**record, "recovery": [*record.get("recovery", []), found]}
    return Recovered(healed.eval(), run.student.tokenizer, record, run.student.folder)


@contextmanager
def _kept_if_begun(work: Path) -> Iterator[None]:
    """Of a run that is refused nothing stays, unless it has checkpoints or has asked the teacher."""
    known = (work / run_folder.NAME).exists()
    try:
        yield
    except BillhookError:
        if not known and not checkpoints(work) and not any(work.glob("lessons/*")):
            run_folder.remove(work)
        raise


def _try_rates(run: Run) -> list[dict[str, float]]:
    """A few steps at each of three rates; the loss afterwards on windows of the training text that are never trained on."""
    if not run.texts.judged:
        raise BillhookError(
            "--lr auto judges rates by held-out text, and there is none: name a --held-out, or give a rate"
        )
    steps = max(TRIAL_STEPS, round(TRIAL * run.course.steps))
    trial = replace(run.course, order=run.course.order[: steps * run.course.rows], points=())
    rates, found = rates_of(run.chosen), []
    with run.clock("rates"):
        for n, rate in enumerate(rates):

            def tick(stage: str, done: int, total: int, n: int = n) -> None:
                run.tick("trying rates", n * steps + done, len(rates) * steps)

            known = shared(run.process, lambda rate=rate: cache.has(run.work, "rate", {"lr": rate}))
            loss = None if known else _loss_after(run, replace(trial, lr=rate), tick)
            found.append(
                shared(
                    run.process,
                    lambda r=rate, x=loss: cache.cached(run.work, "rate", {"lr": r}, lambda: {"lr": r, "loss": x}),
                )
            )
    return found


def _loss_after(run: Run, course: Course, tick: Tick) -> float | None:
    """Of one trial; None if it diverged."""
    judge, text = Judge((), (), course.autocast), run.texts.judged[0]
    healer = run.healer(course, judge, run.work / f"trial-{course.lr:g}", tick)
    try:
        healer.heal(unheard)
    except Diverged:
        return None
    judge.texts = (text,)
    losses = judge(healer.gathered(run.start))[text.source]
    return sum(losses) / len(losses)


def _best_rate(tried: Sequence[dict[str, float]]) -> float:
    lasting = [one for one in tried if one["loss"] is not None and math.isfinite(one["loss"])]
    if not lasting:
        rates = ", ".join(f"{one['lr']:g}" for one in tried)
        raise BillhookError(
            f"the loss is no longer finite after a few steps at any of the rates {rates}: give a lower --lr"
        )
    return min(lasting, key=lambda one: one["loss"])["lr"]


def _line(run: Run, rate: float) -> str:
    """What will be trained, in one line."""
    course, chosen = run.course, run.chosen
    how = f"distillation from {chosen.teacher}" if chosen.objective == "distill" else "continued pretraining"
    passes = len(course.order) / len(course.windows)
    zeros = run.student.census
    return (
        f"{how}, training {TRAINABLE[chosen.trainable]}: {len(course.order) * chosen.seq_len:,} tokens of "
        f"{' and '.join(run.texts.names)} ({passes:.2g} passes) in {course.steps:,} steps at {rate:g}"
        + (f", on {run.process.num_processes} processes" if run.process.num_processes > 1 else "")
        + (f", keeping all {zeros.total:,} zeros ({zeros.share:.0%})" if run.chosen.keeps_zeros and zeros.total else "")
    )


def _check_zeros(run: Run, healed: Any) -> None:
    """Nothing should be able to fail here: what it says would be an error of ours, and better said than written."""
    if run.chosen.keeps_zeros and (filled := run.student.census.filled(healed)):
        raise BillhookError(f"{filled:,} zeros of {run.student.name} were filled in training: nothing is written")


def _outcome(run: Run, healer: "Healer", tried: Sequence[dict[str, float]], stopped: str, kept: int) -> dict[str, Any]:
    """The record of a recovery: plain data, which the report shows."""
    course, chosen, judged = healer.course, run.chosen, healer.judged
    done, step = len(healer.losses), course.step_tokens
    why = (
        f"{stopped} got worse after {done * step:,} tokens: the model of {kept * step:,} tokens is kept"
        if stopped
        else None
    )
    seconds = run.clock.seconds
    return {
        "student": run.student.name,
        "teacher": chosen.teacher or None,
        "objective": chosen.objective,
        "states": course.states,
        "trainable": chosen.trainable,
        "rank": chosen.rank if chosen.trainable in BY_FORM else None,
        "keep_zeros": chosen.keep_zeros,
        "dropout": chosen.dropout,
        "zeros": run.student.census.total if run.chosen.keeps_zeros else None,
        "texts": list(chosen.text),
        "text_sha256": list(run.texts.sha256),
        "windows": len(set(course.order)),
        "windows_available": len(course.windows),
        "passes": done * course.rows / len(course.windows),
        "tokens": len(course.order) * chosen.seq_len,
        "seq_len": chosen.seq_len,
        "begins_with": list(run.texts.begins_with),
        "batch_tokens": step,
        "steps": course.steps,
        "lr": course.lr,
        "warmup": course.warmup,
        "rates": list(tried),
        "precision": str(course.autocast or torch.float32).removeprefix("torch."),
        "top_k": chosen.top_k,
        "processes": run.process.num_processes,
        "seed": chosen.seed,
        "held_out": list(chosen.held_out),
        "held_out_doubt": run.texts.doubt or None,
        "losses": healer.losses,
        "evaluations": [
            {
                "step": one["step"],
                "tokens": one["step"] * step,
                "perplexities": {text: perplexity_of(losses) for text, losses in one["losses"].items()},
            }
            for one in judged
        ],
        "teacher_perplexities": run.teacher_perplexities,
        "judged_by": judged_by(run.texts),
        "stopped": why,
        "kept_tokens": kept * step,
        "tokens_per_second": done * step / seconds["training"] if seconds["training"] else None,
        "seconds": {stage: round(s, 3) for stage, s in seconds.items()},
    }
