"""Before a recovery trains: its texts, the teacher's predictions, and the folder that keeps all of it."""

import gc
import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from billhook import data
from billhook.checkpoints import load, shards
from billhook.errors import BillhookError
from billhook.evaluation.perplexity import perplexity_of
from billhook.recovery.budget import affordable_tokens, evaluation_steps, rates_of
from billhook.recovery.settings import HALVED, Recovery
from billhook.recovery.student import UNMASKED, Student, input_norms, known, trainable
from billhook.runtime import cache, run_folder
from billhook.runtime.memory import return_freed
from billhook.runtime.precision import autocast_dtype
from billhook.runtime.progress import Clock, Tick
from billhook.training import keep_zeros, kept_windows, moving_masks, teacher, throughput
from billhook.training.early_stopping import EarlyStopping
from billhook.training.mixture import Mixture, answered_for_each, readable
from billhook.training.schedule import Schedule
from billhook.training.teacher import TeacherCache
from billhook.training.text_windows import Draw, TrainingTexts, order_of, read

if TYPE_CHECKING:
    from billhook.training.trainer import RecoveryTrainer

TEXT_SHARE = 0.33  # of --objective both: the text's share of the loss (AST, arXiv:2407.20584)
PASSES = 2  # over the training windows, in which it is learned which of them to keep
SCORED = 32  # windows whose inputs --mask-score wanda sees
PACE_SECONDS = 10  # how long training is measured to find how many tokens --minutes buys


@dataclass(frozen=True)
class Environment:
    """Where a recovery runs: its folders, its processes, its progress."""

    work: Path  # keeps all that a killed run needs to go on
    teacher_folder: Path  # keeps the teacher's predictions
    process: PartialState
    tick: Tick

    @property
    def device(self) -> torch.device:
        return device_of(self.process)

    def in_first(self, make: Callable[[], Any]) -> Any:
        """What the first process makes, in all of them."""
        made = [make() if self.process.is_main_process else None]
        return broadcast_object_list(made)[0] if self.process.num_processes > 1 else made[0]


@dataclass(frozen=True)
class Prepared:
    """Everything that training needs besides a model."""

    student: Student
    chosen: Recovery
    env: Environment
    texts: TrainingTexts
    schedule: Schedule
    teacher: TeacherCache | None
    teacher_perplexities: dict[str, float] | None
    clock: Clock
    norms: dict[str, torch.Tensor] | None = None  # of the inputs of weights whose masks are scored by them
    kept: tuple[int, ...] | None = None  # the windows that it chose among those of `texts`, if it did

    @property
    def available(self) -> int:
        """How many windows it trains on, given tokens enough."""
        return len(self.texts.train if self.kept is None else self.kept)

    def start(self) -> Any:
        """The student as it was pruned, ready to train."""
        return trainable(self.student, self.chosen, self.norms)

    def trainer(self, schedule: Schedule, early_stopping: EarlyStopping, work: Path, tick: Tick) -> "RecoveryTrainer":
        """A trainer of the student, with checkpoints in `work`."""
        from billhook.training.trainer import RecoveryTrainer  # takes 120 MB of memory, only where something is trained

        model = self.start()
        trainer = RecoveryTrainer(model, schedule, self.teacher, early_stopping, work, tick)
        if self.chosen.keep_zeros and self.chosen.trainable not in UNMASKED:
            trainer.add_callback(keep_zeros.ZeroKeeper(model))
        if self.chosen.masks:
            trainer.optimizer = moving_masks.optimizer(model, schedule.lr, self.chosen.decay, schedule.steps)
            trainer.add_callback(moving_masks.Mover(model))
        return trainer


def on_cpu(device: str) -> bool:
    """Whether training runs on the CPU; of several accelerators CUDA_VISIBLE_DEVICES names the one.

    Raises:
        BillhookError: there is no such device, or it has a number.
    """
    resolved = load.resolve_device(device)
    if resolved.index:
        raise BillhookError(f"device {device!r}: training takes the first it sees; choose with CUDA_VISIBLE_DEVICES")
    return resolved.type == "cpu"


def device_of(process: PartialState) -> torch.device:
    assert process.device is not None
    return process.device


def prepare(name: str, chosen: Recovery, env: Environment, *, fresh: bool = False) -> Prepared:
    """Look at the student, then have the teacher predict; neither stays in memory.

    Raises:
        BillhookError: something cannot work; `env.work` holds another run, and not `fresh`.
    """
    clock, process = Clock(), env.process
    autocast = autocast_dtype(chosen.precision, env.device)
    student, texts, measure_tokens = _inspect(name, chosen, env)
    key = {"student": student.sha256, "version of billhook": cache.code_sha256(), "precision": str(autocast)}
    key |= {"settings": chosen.model_dump(mode="json"), "teacher's files": files_of(chosen.teacher, env.tick)}
    key |= {"files before few bits": files_of(chosen.loftq, env.tick)} if chosen.loftq else {}
    if process.is_main_process:
        windows_sha256 = hashlib.sha256(texts.train.numpy().tobytes()).hexdigest()
        run_folder.claim(env.work, {**key, "training text": windows_sha256}, fresh, keep=("lessons",))
    process.wait_for_everyone()
    tokens = chosen.tokens or env.in_first(lambda: cache.cached(env.work, "tokens", {}, measure_tokens))
    share = chosen.keep_share  # of windows to keep, which is learned in the first half of the tokens
    schedule = _schedule(chosen, tokens if share is None else tokens // 2, student, texts, env)
    if share is not None:
        _check_passes(share, tokens // 2, texts)
    asked = len(set(schedule.order))  # windows that the teacher answers: the first ones of all
    if chosen.mixture == "dro":
        numbers = readable(texts, len(schedule.order))
        texts, asked = texts.begun_with(numbers), len(numbers)
        schedule = replace(schedule, windows=texts.train)
    predictions, perplexities = None, None
    if chosen.teacher:
        with clock("teacher"):
            predictions, losses = _ask_teacher(student, chosen, schedule, texts.first(asked), env)
        perplexities = {text: perplexity_of(window_losses) for text, window_losses in losses.items()}
        if chosen.mixture == "dro":
            schedule = replace(schedule, mixture=Mixture.of(texts, asked, losses, chosen.seed))
    norms = None
    if chosen.mask_score == "wanda":
        measure = partial(input_norms, student, chosen, texts.train[:SCORED], env.device)
        norms = env.in_first(lambda: cache.cached_tensors(env.work, "norms", {}, measure))
    return Prepared(student, chosen, env, texts, schedule, predictions, perplexities, clock, norms)


def _schedule(chosen: Recovery, tokens: int, student: Student, texts: TrainingTexts, env: Environment) -> Schedule:
    """A run over so many tokens, each text in proportion to its windows."""
    rows = chosen.rows(tokens, env.process.num_processes)
    steps = max(1, round(tokens / (rows * chosen.seq_len)))
    share_left = len(student.seam.kept) / student.seam.total if student.seam else 1.0
    halved = chosen.distils and share_left <= HALVED
    if chosen.masks and moving_masks.too_few(steps):
        raise BillhookError(
            f"--masks {chosen.masks}: masks move every {moving_masks.EVERY} steps, and there are {steps}: give more "
            "--tokens, or fewer --batch-tokens"
        )
    return Schedule(
        windows=texts.train,
        order=order_of(len(texts.train), steps * rows, chosen.seed),
        rows=rows,
        lr=chosen.lr or 0.0,
        micro_batch=min(chosen.micro_batch, rows),
        warmup=chosen.warmup,
        states=chosen.states == "on" or (chosen.states == "auto" and halved),
        text_share=TEXT_SHARE if chosen.objective == "both" else 0.0,
        contrast=chosen.contrast,
        dropout=chosen.dropout,
        autocast=autocast_dtype(chosen.precision, env.device),
        cpu=env.device.type == "cpu",
        seed=chosen.seed,
        evaluate_after=evaluation_steps(steps * rows, steps, sum(len(text.tokens) for text in texts.held_out)),
    )


def _check_passes(share: float, tokens: int, texts: TrainingTexts) -> None:
    """Refuse to choose windows of which some are read once: masks move when all have a loss."""
    windows, seq_len = texts.train.shape
    if not 1 <= round(share * windows) < windows:
        raise BillhookError(f"--keep-data {share:g} of {windows:,} windows is none or all: use more text")
    if tokens < PASSES * windows * seq_len:
        raise BillhookError(
            f"--keep-data learns from {PASSES} passes or more over the text, in half of the tokens, which are "
            f"{tokens / (windows * seq_len):.2g} over {windows:,} windows: give --tokens {2 * PASSES * windows * seq_len}, or less text"
        )


def files_of(name: str, tick: Tick) -> str | None:
    """What changes when the files of a model do; None where there is no model."""
    if not name:
        return None
    path = load.locate(name, tick)
    return shards.digest(path) if path.is_dir() else f"{path.stat().st_size} {path.stat().st_mtime_ns}"


def _inspect(name: str, chosen: Recovery, env: Environment) -> tuple[Student, TrainingTexts, Callable[[], int]]:
    """The student, what it will read, and a function that measures how many tokens the minutes buy."""
    load.use_row(chosen.family_row, [name], env.tick)
    opened = load.open_model(name, device="cpu", dtype="float32", tick=env.tick, packed=chosen.opens_packed)
    load.check_positions(opened, chosen.seq_len)
    student = known(opened, chosen)
    draw = Draw(chosen.seq_len, chosen.seed, apart=chosen.mixture == "dro")
    texts = read(chosen.text, chosen.held_out, student.tokenizer, draw, env.tick, student.record)
    if chosen.keep_data and chosen.keep_share is None:
        path = Path(chosen.keep_data)
        texts = texts.only(kept_windows.found(texts, kept_windows.listed(path), path))
    for text in texts.held_out:
        data.check_vocabulary(text, opened.model, name)
    size = sum(param.numel() for param in opened.model.parameters())
    return student, texts, lambda: _affordable_tokens(student, chosen, size, texts, env)


def _affordable_tokens(student: Student, chosen: Recovery, size: int, texts: TrainingTexts, env: Environment) -> int:
    """Tokens that `minutes` buy, as measured on this machine.

    Args:
        size: parameters of the student.
    """
    assert chosen.minutes is not None
    model, autocast = trainable(student, chosen).to(env.device), autocast_dtype(chosen.precision, env.device)
    pace = throughput.training_pace(model, chosen.seq_len, chosen.micro_batch, autocast, PACE_SECONDS)
    teacher_pace = throughput.answering_pace(model, chosen.seq_len, chosen.micro_batch, autocast)
    if chosen.teacher:
        skeleton = load.open_skeleton(chosen.teacher)
        teacher_pace *= size / sum(param.numel() for param in skeleton.parameters())
        teacher_pace /= answered_for_each(texts) if chosen.mixture == "dro" else 1.0
    trials = 0 if chosen.lr else len(rates_of(chosen))
    seconds = 60 * chosen.minutes - PACE_SECONDS
    tokens = affordable_tokens(seconds, pace, teacher_pace if chosen.teacher else None, trials, chosen.seq_len)
    if tokens < chosen.seq_len:
        raise BillhookError(f"--minutes {chosen.minutes:g} is too short here for one window of {chosen.seq_len} tokens")
    return tokens * env.process.num_processes


def _ask_teacher(
    student: Student, chosen: Recovery, schedule: Schedule, texts: TrainingTexts, env: Environment
) -> tuple[TeacherCache | None, dict[str, list[float]]]:
    """The teacher's predictions for `texts.train` on disk, and its own losses on held-out windows, by text.

    The teacher is gone from memory afterwards.
    """
    name, process = chosen.teacher, env.process
    if data.fingerprint(load.open_tokenizer(name, env.tick)) != data.fingerprint(student.tokenizer):
        raise BillhookError(
            f"teacher {name} has another tokenizer than {student.name}: name the model that was pruned, or use "
            "--objective ce"
        )
    opened = load.open_model(name, device=str(env.device), tick=env.tick)
    if (size := opened.model.config.vocab_size) != student.vocabulary:
        raise BillhookError(
            f"teacher {name} predicts {size:,} tokens, {student.name} {student.vocabulary:,}: name the model that was "
            "pruned, "
            "or use --objective ce"
        )
    predictions = None
    if chosen.distils:
        predictions = teacher.fill_cache(
            opened.model,
            texts.train,
            env.teacher_folder,
            teacher.Lesson(chosen.top_k, schedule.states, chosen.contrast > 0, schedule.autocast),
            share=(process.process_index, process.num_processes),
            tick=env.tick,
        )
    evaluation = EarlyStopping(texts.held_out, (), schedule.autocast)
    losses = env.in_first(partial(cache.cached, env.work, "teacher", {}, partial(evaluation.losses, opened.model)))
    process.wait_for_everyone()
    del opened
    gc.collect()
    return_freed()
    return predictions, losses
