"""Before a recovery trains: what it reads, what the teacher says of it, and the folder that all of it is kept in."""

import gc
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, parse_flag_from_env

from billhook import data
from billhook.checkpoints import load, shards
from billhook.errors import BillhookError
from billhook.evaluation.perplexity import perplexity_of
from billhook.math import sparsity
from billhook.models.modes import noise
from billhook.recovery.settings import HALVED, Recovery
from billhook.reports import records
from billhook.runtime import cache, run_folder
from billhook.runtime.memory import return_freed
from billhook.runtime.precision import autocast_dtype
from billhook.runtime.progress import Clock, Tick
from billhook.training import keep_zeros, teacher, throughput
from billhook.training.early_stopping import Judge
from billhook.training.schedule import Course
from billhook.training.teacher import Lessons
from billhook.training.text_windows import HELD_OUT, Texts, order_of, read
from billhook.training.trainables import KEEPING_ZEROS, TRAINERS, Seam

if TYPE_CHECKING:
    from billhook.training.trainer import Healer

POINTS = (3, 10)  # judgements in a run, at least and at most
JUDGING = 0.15  # of the training's cost, between those bounds
FORWARD = 1 / 3  # of a training step's cost
RATES = {  # what --lr auto tries; adapters start at zero and bear more
    "lora": (3e-4, 1e-3, 3e-3),
    "spp": (1e-3, 3e-3, 1e-2),  # about the 4e-3 of arXiv:2405.16057
}
RATES_OTHERWISE = (3e-5, 1e-4, 3e-4)  # short trials favour the highest: it is one that lasts (docs/LOG.md)
TRIAL = 0.02  # of the steps, for each rate
TRIAL_STEPS = 5  # at least
TEXTS = 3  # judged by default: of the training text, and the demo's two
BY_FORM = {"lora", "spp"}  # sets that are trained in a form which fills no zero; of the others the steps are masked
PACE_SECONDS = 10  # to find out how many tokens --minutes buys


@dataclass(frozen=True)
class Student:
    """What must be known of the pruned checkpoint, with no model in it."""

    name: str
    folder: Path | None
    tokenizer: Any
    dtype: torch.dtype
    vocabulary: int
    sha256: str
    record: dict[str, Any] | None  # its billhook.json
    census: keep_zeros.Census
    noise: dict[str, float]  # dropout and the like that its config asks for

    @property
    def cut(self) -> Seam | None:
        """Where layers went, if any did and the record says so."""
        record = self.record or {}
        if not record.get("dropped_layers"):
            return None
        return Seam(record["kept_layers"], len(record["kept_layers"]) + len(record["dropped_layers"]))


@dataclass(frozen=True)
class Run:
    """Everything that training needs but a model."""

    student: Student
    chosen: Recovery
    work: Path
    process: PartialState
    texts: Texts
    course: Course
    lessons: Lessons | None
    teacher_perplexities: dict[str, float] | None
    tick: Tick
    clock: Clock

    def start(self) -> Any:
        """The student as it was pruned, ready to train."""
        return _ready(self.student.name, self.chosen, self.student.cut)

    def healer(self, course: Course, judge: Judge, work: Path, tick: Tick) -> "Healer":
        from billhook.training.trainer import Healer  # brings 120 MB, for whoever trains alone

        model = self.start()
        healer = Healer(model, course, self.lessons, judge, work, tick)
        if self.chosen.keep_zeros and self.chosen.trainable not in BY_FORM:
            healer.add_callback(keep_zeros.Keeper(model))
        return healer


def on_cpu(device: str) -> bool:
    """Whether training runs on the CPU; of several accelerators CUDA_VISIBLE_DEVICES names the one.

    Raises:
        BillhookError: there is no such device, or it has a number.
    """
    where = load.resolve_device(device)
    if where.index:
        raise BillhookError(f"device {device!r}: training takes the first it sees; choose with CUDA_VISIBLE_DEVICES")
    return where.type == "cpu"


def prepare(
    name: str,
    chosen: Recovery,
    work: Path,
    lessons: Path,
    process: PartialState,
    tick: Tick,
    *,
    fresh: bool = False,
) -> Run:
    """Look at the student, then let the teacher answer; neither stays in memory."""
    clock = Clock()
    autocast = autocast_dtype(chosen.precision, where(process))
    student, texts, pace_of = _look(name, chosen, autocast, process, tick)
    key = {"student": student.sha256, "version of billhook": cache.code_sha256(), "precision": str(autocast)}
    key |= {"settings": chosen.model_dump(mode="json"), "teacher's files": _files_of(chosen.teacher, tick)}
    if process.is_main_process:
        read_by = hashlib.sha256(texts.train.numpy().tobytes()).hexdigest()
        run_folder.claim(work, {**key, "training text": read_by}, fresh, keep=("lessons",))
    process.wait_for_everyone()
    tokens = chosen.tokens or shared(process, lambda: cache.cached(work, "tokens", {}, pace_of))
    rows = chosen.rows(tokens, process.num_processes)
    steps = max(1, round(tokens / (rows * chosen.seq_len)))
    left = len(student.cut.kept) / student.cut.total if student.cut else 1.0
    course = Course(
        windows=texts.train,
        order=order_of(len(texts.train), steps * rows, chosen.seed),
        rows=rows,
        lr=chosen.lr or 0.0,
        micro_batch=min(chosen.micro_batch, rows),
        warmup=chosen.warmup,
        states=chosen.states == "on" or (chosen.states == "auto" and chosen.objective == "distill" and left <= HALVED),
        dropout=chosen.dropout,
        autocast=autocast,
        cpu=where(process).type == "cpu",
        seed=chosen.seed,
        points=_points(steps * rows, steps, sum(len(text.tokens) for text in texts.judged)),
    )
    answers, perplexities = None, None
    if chosen.teacher:
        with clock("teacher"):
            answers, perplexities = _ask(student, chosen, course, texts, work, lessons, process, tick)
    return Run(student, chosen, work, process, texts, course, answers, perplexities, tick, clock)


def _files_of(name: str, tick: Tick) -> str | None:
    """What changes when the files of a model do; None where there is no model."""
    if not name:
        return None
    path = load.locate(name, tick)
    return shards.digest(path) if path.is_dir() else f"{path.stat().st_size} {path.stat().st_mtime_ns}"


def _look(
    name: str, chosen: Recovery, autocast: torch.dtype | None, process: PartialState, tick: Tick
) -> tuple[Student, Texts, Callable[[], int]]:
    """The student, what it will read, and a function that measures how many tokens the minutes buy."""
    opened = load.open_model(name, device="cpu", dtype="float32", tick=tick)
    load.check_positions(opened, chosen.seq_len)
    student = Student(
        name,
        opened.folder,
        opened.tokenizer,
        opened.dtype,
        opened.model.config.vocab_size,
        cache.model_sha256(opened.model),
        records.stored_cut(opened.folder),
        keep_zeros.census(opened.model),
        noise(opened.model.config),
    )
    _check_zeros(student, chosen)
    if chosen.states == "on" and (student.record or {}).get("residual"):
        raise BillhookError(
            f"--states on compares hidden states channel by channel, and {name} has other channels than what it was cut from: "
            "leave it out"
        )
    if chosen.trainable in ("seam", "lora"):
        _makers(chosen)[chosen.trainable](opened.model, student.cut, chosen.rank)  # refuse now what cannot be trained
    texts = read(chosen.text, chosen.held_out, student.tokenizer, chosen.seq_len, chosen.seed, tick, student.record)
    for text in texts.judged:
        data.check_vocabulary(text, opened.model, name)
    size = sum(param.numel() for param in opened.model.parameters())
    return student, texts, lambda: _affordable(name, chosen, student.cut, size, autocast, process)


def _check_zeros(student: Student, chosen: Recovery) -> None:
    """Refuse to fill the zeros of a sparse model unasked, and to keep those of a dense one."""
    found = student.census
    if chosen.keep_zeros and not found.total:
        raise BillhookError(
            f"--keep-zeros: {student.name} has no exact zero in the linear weights of its decoder layers, nothing to keep: "
            "leave it out"
        )
    if chosen.keeps_zeros and parse_flag_from_env("ACCELERATE_USE_FSDP"):
        raise BillhookError("zeros are kept in whole weights, which FSDP cuts up: launch without --use_fsdp")
    if chosen.keep_zeros is None and not chosen.keeps_zeros and found.share >= sparsity.SPARSE_SHARE:
        raise BillhookError(
            f"{found.share:.0%} of the decoder's linear weights of {student.name} are exactly zero, and training would fill "
            "them: give --keep-zeros to keep every one, or --no-keep-zeros to let them go"
        )


def _affordable(
    name: str, chosen: Recovery, cut: Seam | None, size: int, autocast: torch.dtype | None, process: PartialState
) -> int:
    """Tokens that `minutes` buy: the teacher's answers, the rates tried, training and judging."""
    assert chosen.minutes is not None
    model = _ready(name, chosen, cut).to(where(process))
    trained = throughput.training_pace(model, chosen.seq_len, chosen.micro_batch, autocast, PACE_SECONDS)
    answered = throughput.answering_pace(model, chosen.seq_len, chosen.micro_batch, autocast)
    if chosen.teacher:
        skeleton = load.open_skeleton(chosen.teacher)
        answered *= size / sum(param.numel() for param in skeleton.parameters())
    trials = 0 if chosen.lr else len(rates_of(chosen))
    tokens = bought(
        60 * chosen.minutes - PACE_SECONDS, trained, answered if chosen.teacher else None, trials, chosen.seq_len
    )
    if tokens < chosen.seq_len:
        raise BillhookError(f"--minutes {chosen.minutes:g} is too short here for one window of {chosen.seq_len} tokens")
    return tokens * process.num_processes


def bought(seconds: float | int, trained: float, answered: float | None, trials: int, seq_len: int) -> int:
    """Tokens that `seconds` buy at `trained` tokens a second: training, judging, rates tried, and a teacher's answers.

    Trials and judgements have a least cost, of `TRIAL_STEPS` windows each and of `POINTS`, whatever the budget.
    """
    answers = 1 / answered if answered else 0.0
    least = trials * TRIAL_STEPS * seq_len + (POINTS[0] + 2) * TEXTS * HELD_OUT * seq_len * FORWARD
    long = seconds / ((1 + JUDGING + trials * TRIAL) / trained + answers)
    short = (seconds - least / trained) / (1 / trained + answers)
    return max(0, int(min(long, short)))


def _points(windows: int, steps: int, judged: int) -> tuple[int, ...]:
    """After which steps to judge: evenly, as often as the budget bears, and at the end."""
    fewest, most = POINTS
    count = max(fewest, min(most, int(JUDGING * windows / (FORWARD * max(judged, 1)))))
    return tuple(sorted({max(1, round(steps * n / count)) for n in range(1, count + 1)}))


def _ask(
    student: Student,
    chosen: Recovery,
    course: Course,
    texts: Texts,
    work: Path,
    lessons: Path,
    process: PartialState,
    tick: Tick,
) -> tuple[Lessons | None, dict[str, float]]:
    """The teacher's answers on disk, and its own perplexities; the teacher is gone afterwards."""
    name = chosen.teacher
    if data.fingerprint(load.open_tokenizer(name, tick)) != data.fingerprint(student.tokenizer):
        raise BillhookError(
            f"teacher {name} has another tokenizer than {student.name}: name the model that was pruned, or use --objective ce"
        )
    opened = load.open_model(name, device=str(where(process)), tick=tick)
    if (size := opened.model.config.vocab_size) != student.vocabulary:
        raise BillhookError(
            f"teacher {name} predicts {size:,} tokens, {student.name} {student.vocabulary:,}: name the model that was pruned, "
            "or use --objective ce"
        )
    answers = None
    if chosen.objective == "distill":
        answers = teacher.lessons(
            opened.model,
            texts.train[: len(set(course.order))],
            lessons,
            k=chosen.top_k,
            states=course.states,
            autocast=course.autocast,
            share=(process.process_index, process.num_processes),
            tick=tick,
        )
    judge = Judge(texts.judged, (), course.autocast)
    found = shared(process, partial(cache.cached, work, "teacher", {}, partial(judge, opened.model)))
    process.wait_for_everyone()
    del opened
    gc.collect()
    return_freed()
    return answers, {text: perplexity_of(losses) for text, losses in found.items()}


def rates_of(chosen: Recovery) -> tuple[float, ...]:
    return RATES.get(chosen.trainable, RATES_OTHERWISE)


def _ready(name: str, chosen: Recovery, cut: Seam | None) -> Any:
    model = load.open_model(name, device="cpu", dtype="float32").model
    with torch.random.fork_rng():  # adapters are drawn: the same in every process, and when a run goes on
        torch.manual_seed(chosen.seed)
        return _makers(chosen)[chosen.trainable](model, cut, chosen.rank)


def _makers(chosen: Recovery) -> dict[str, Any]:
    return KEEPING_ZEROS if chosen.keep_zeros else TRAINERS


def where(process: PartialState) -> torch.device:
    assert process.device is not None
    return process.device


def shared(process: PartialState, make: Callable[[], Any]) -> Any:
    """What the first process makes, in all of them."""
    said = [make() if process.is_main_process else None]
    return broadcast_object_list(said)[0] if process.num_processes > 1 else said[0]
