"""Training on transformers' Trainer and accelerate: what billhook adds is the loss, who watches, and checkpoints that are whole.

Nothing here knows of processes: `accelerate launch` makes many of one, and each sees its share of every step's windows.
"""

import json
import math
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import Dataset
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerState, TrainingArguments

from billhook.errors import BillhookError
from billhook.math.losses import beside, divergence, misalignment, next_token
from billhook.runtime.progress import Tick, quiet
from billhook.runtime.quiet import quiet_transformers
from billhook.training.early_stopping import Judge
from billhook.training.schedule import Course, Diverged, checkpoints, is_whole, last_whole, mark_whole, saving, step_of
from billhook.training.teacher import EMBEDDED, HIDDEN, Lessons

STATE = "trainer_state.json"
SAVE_SECONDS = 300  # between checkpoints at most, where no evaluation asks for one earlier
KEPT = 2  # checkpoints: the last, and the one before it should that be damaged; beyond them only the best judged
LONG = 30 * 24 * 3600  # seconds that processes wait for each other: one of them may be saving, or asking the teacher


class Healer(Trainer):
    """A Trainer that learns from lessons, or from the text alone where there are none."""

    def __init__(
        self, model: Any, course: Course, lessons: Lessons | None, judge: Judge, work: Path, tick: Tick = quiet
    ):
        self.course, self.lessons, self.judge, self.work = course, lessons, judge, work
        self.watch = Watch(self, tick)
        with quiet_transformers():
            arguments = _arguments(course, work)
            super().__init__(
                model=model,
                args=arguments,
                train_dataset=_Steps(course, lessons),
                data_collator=_stacked,
                callbacks=[self.watch],
            )
        self.remove_callback(PrinterCallback)
        self.model_accepts_loss_kwargs = False  # ours is a mean over a micro-batch: the Trainer divides by their number

    model: Any

    @property
    def judged(self) -> list[dict[str, Any]]:
        """Every judgement so far: {"step", "losses": {text: [of each window]}, "seconds"}."""
        return [one for one in self.state.log_history if "losses" in one]

    @property
    def seconds(self) -> float:
        """Of training, judging left out, up to the last judgement: what was lost to a kill does not count."""
        return self.judged[-1]["seconds"] if self.judged else 0.0

    @property
    def losses(self) -> list[float]:
        """The training loss of every step so far."""
        return [one["loss"] for one in self.state.log_history if "loss" in one]

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        tokens = inputs["tokens"]
        model.train(self.course.dropout)  # of what a model does in training alone there is nothing else
        out = model(input_ids=tokens, use_cache=False, output_hidden_states=self.course.states)
        if self.lessons is None:
            loss = next_token(out.logits, tokens)
        else:
            apart = divergence(out.logits[:, :-1], inputs["ids"], inputs["chances"], inputs["tail"])
            loss = beside(apart, self._misaligned(out, inputs)) if self.course.states else apart.mean()
        return (loss, out) if return_outputs else loss

    @staticmethod
    def _misaligned(out: Any, inputs: dict[str, Any]) -> Tensor:
        ends = (EMBEDDED, "embedded"), (HIDDEN, "hidden")
        first, second = (misalignment(out.hidden_states[at], inputs[name]) for at, name in ends)
        return first + second

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> LambdaLR:
        """The course's own: transformers' schedules have a rate of zero in the first step of a warm-up."""
        # to zero: 0.4 % better here than to a tenth, LayerChop's (docs/LOG.md; arXiv:2502.15938)
        by_step, prepared = self.course.share_of_lr, optimizer or self.optimizer
        assert isinstance(prepared, Optimizer)
        self.lr_scheduler = LambdaLR(prepared, lambda step: by_step(step))  # a function: no checkpoint holds it
        return self.lr_scheduler

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Called after every step, before a checkpoint is written: the place to stop a run that has gone wrong."""
        if any(not math.isfinite(logs.get(name, 0.0)) for name in ("loss", "grad_norm")):
            step, kept = self.state.global_step, last_whole(self.work)
            raise Diverged(f"the loss is no longer finite at step {step} of {self.course.steps}: {kept}; lower --lr")
        super().log(logs, start_time)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        with saving(self.work / f"checkpoint-{self.state.global_step}"):
            super()._save_checkpoint(model, trial)

    def heal(self, announce: Callable[[str], object]) -> None:
        """Train to the end, or from the last whole checkpoint to the end; the judge may end it earlier."""
        last = self._resume_point(announce)
        if last and self._is_over(last):
            self.state = TrainerState.load_from_json(str(last / STATE))
            self.restore(step_of(last))
            return
        with quiet_transformers():
            self.train(resume_from_checkpoint=str(last) if last else None)

    def gathered(self, start: Callable[[], Any]) -> Any:
        """The trained model, whole in every process; `start` gives one to fill where its parts lie in several."""
        if not self.is_fsdp_enabled:
            return self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)  # its forward without autocast
        whole, model = self.accelerator.get_state_dict(self.model), start()
        model.load_state_dict(whole)
        return model

    def _is_over(self, last: Path) -> bool:
        """Whether a run that was killed had only its result to write."""
        judged = [one for one in _history(last) if "losses" in one]
        return step_of(last) == self.course.steps or bool(self.judge.verdict(judged))

    def _resume_point(self, announce: Callable[[str], object]) -> Path | None:
        """The last whole checkpoint; those after it, half-written or damaged since, are removed."""
        found, broken = checkpoints(self.work), []
        while found and not is_whole(found[-1]):
            broken.append(found.pop())
        last = found[-1] if found else None
        if self.is_world_process_zero():
            for one in broken:
                announce(f"{one} is not whole: going on from {f'step {step_of(last)}' if last else 'the start'}")
                shutil.rmtree(one)
            if last and not broken:
                announce(f"going on from step {step_of(last)} of {self.course.steps}")
        return last

    def restore(self, step: int) -> None:
        """Give the model the weights that it had after `step`."""
        with quiet_transformers():
            self._load_from_checkpoint(str(self.work / f"checkpoint-{step}"))


class Watch(TrainerCallback):
    """Shows progress, judges at the course's points, and has checkpoints written, marked whole and cleared away."""

    def __init__(self, healer: Healer, tick: Tick):
        self.healer, self.tick = healer, tick
        self.saved = time.monotonic()
        self.begun = 0.0  # when training would have begun had it never been cut off, judging left out

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.tick("training", state.global_step, state.max_steps)
        if not self.healer.judged and self.healer.judge.texts:
            self._judge(state)
        self.begun = time.perf_counter() - self.healer.judge.seconds - self.healer.seconds

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.tick("training", state.global_step, state.max_steps)
        if state.global_step in self.healer.course.points:
            if self.healer.judge.texts:
                self._judge(state)
            control.should_training_stop |= bool(self.healer.judge.verdict(self.healer.judged))
            control.should_save = True
        elif _agreed(time.monotonic() - self.saved > SAVE_SECONDS, args):
            control.should_save = True

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.saved = time.monotonic()
        self.healer.accelerator.wait_for_everyone()  # each process writes files of its own
        if not state.is_world_process_zero:
            return
        here = self.healer.work / f"checkpoint-{state.global_step}"
        (here / "training_args.bin").unlink(missing_ok=True)  # a pickle of code, which nothing here reads
        with saving(here):
            mark_whole(here)
        judged = self.healer.judged
        best = self.healer.judge.best(judged)["step"] if judged else None
        for old in checkpoints(self.healer.work)[:-KEPT]:
            if step_of(old) != best:
                shutil.rmtree(old)

    def _judge(self, state: Any) -> None:
        model = self.healer.accelerator.unwrap_model(self.healer.model)
        seconds = time.perf_counter() - self.healer.judge.seconds - self.begun if state.global_step else 0.0
        state.log_history.append({"step": state.global_step, "losses": self.healer.judge(model), "seconds": seconds})


def _history(checkpoint: Path) -> list[dict[str, Any]]:
    """What a checkpoint's run had logged."""
    return json.loads((checkpoint / STATE).read_text(encoding="utf-8"))["log_history"]


class _Steps(Dataset):
    """The windows of all steps, in order, each with its lesson."""

    def __init__(self, course: Course, lessons: Lessons | None):
        self.course, self.lessons = course, lessons

    def __len__(self) -> int:
        return len(self.course.order)

    def __getitem__(self, place: int) -> dict[str, Tensor]:
        window = self.course.order[place]
        lesson = self.lessons.of(window) if self.lessons else {}
        return {"tokens": self.course.windows[window], **lesson}


def _stacked(items: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([item[name] for item in items]) for name in items[0]}


def _arguments(course: Course, work: Path) -> TrainingArguments:
    arguments = TrainingArguments(
        output_dir=str(work),
        max_steps=course.steps,
        per_device_train_batch_size=course.micro_batch,
        learning_rate=course.lr,
        train_sampling_strategy="sequential",
        bf16=course.autocast is torch.bfloat16,
        use_cpu=course.cpu,
        seed=course.seed,
        save_strategy="no",  # Watch says when
        eval_strategy="no",
        logging_steps=1,
        logging_nan_inf_filter=False,
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=not course.cpu,
        ddp_find_unused_parameters=False,
        ddp_timeout=LONG,
    )
    arguments._n_gpu = min(1, arguments.n_gpu)  # several GPUs are for several processes: no threads over replicas
    share, left = divmod(course.rows, course.micro_batch * arguments.world_size)
    if left or not share:
        raise BillhookError(
            f"{course.rows} windows a step cannot be shared by {arguments.world_size} processes, {course.micro_batch} at a time: "
            "change --batch-tokens or --micro-batch"
        )
    arguments.gradient_accumulation_steps = share
    return arguments


def _agreed(mine: bool, args: Any) -> bool:
    """The first process's answer: clocks differ, and all must write a checkpoint or none."""
    if args.world_size == 1:
        return mine
    said = torch.tensor([float(mine)], device=args.device)
    torch.distributed.broadcast(said, 0)
    return bool(said.item())
