"""Training on transformers' Trainer and accelerate, with billhook's loss, early stopping and whole checkpoints.

Nothing here knows of processes: `accelerate launch` starts several, and each sees its share of every step's windows.
"""

import json
import math
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import Dataset
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerState, TrainingArguments

from billhook.errors import BillhookError
from billhook.math.losses import beside, divergence, misalignment, next_token
from billhook.math.quantgpt import token_contrast
from billhook.runtime.progress import Tick, quiet, unheard
from billhook.runtime.quiet import quiet_transformers
from billhook.tensors import Logits, Rows
from billhook.training.early_stopping import EarlyStopping
from billhook.training.on_levels import PROJECTION
from billhook.training.schedule import (
    Diverged,
    Schedule,
    checkpoints,
    is_whole,
    last_whole,
    mark_whole,
    saving,
    step_of,
)
from billhook.training.teacher import EMBEDDED, HIDDEN, LAST, TeacherCache
from billhook.training.window_masks import WindowMasks

STATE = "trainer_state.json"
SAVE_SECONDS = 300  # the longest time between two checkpoints
KEPT = 2  # last checkpoints that are kept: one more, should the last be damaged; besides them the best one stays
LONG = 30 * 24 * 3600  # seconds that processes wait for each other while one of them saves, or runs the teacher


class RecoveryTrainer(Trainer):
    """A Trainer that learns from a teacher's cached predictions, or from the text alone where there are none."""

    def __init__(
        self,
        model: Any,
        schedule: Schedule,
        teacher: TeacherCache | None,
        early_stopping: EarlyStopping,
        work: Path,
        tick: Tick = quiet,
    ):
        self.schedule, self.teacher, self.early_stopping, self.work = schedule, teacher, early_stopping, work
        self.order, self.announce = schedule.order, unheard
        self.window_masks: WindowMasks | None = None
        self.watch = Watch(self, tick)
        with quiet_transformers():
            arguments = _arguments(schedule, work)
            super().__init__(
                model=model,
                args=arguments,
                train_dataset=_Steps(self),
                data_collator=_stacked,
                callbacks=[self.watch],
            )
        self.remove_callback(PrinterCallback)
        self.model_accepts_loss_kwargs = (
            False  # this loss is a mean over a micro-batch, and the Trainer divides by their number
        )

    model: Any

    @property
    def evaluations(self) -> list[dict[str, Any]]:
        """Every evaluation so far: {"step", "losses": {text: [the loss of each window]}, "seconds"}."""
        return [entry for entry in self.state.log_history if "losses" in entry]

    @property
    def flips(self) -> list[dict[str, Any]]:
        """Every move of masks so far: {"step", "flips": entries of masks that changed}."""
        return [entry for entry in self.state.log_history if "flips" in entry]

    @property
    def seconds(self) -> float:
        """The time of training up to the last evaluation, evaluations left out: what a kill has lost does not count."""
        return self.evaluations[-1]["seconds"] if self.evaluations else 0.0

    @property
    def losses(self) -> list[float]:
        """The training loss of every step so far."""
        return [entry["loss"] for entry in self.state.log_history if "loss" in entry]

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        tokens = inputs["tokens"]
        model.train(self.schedule.dropout)  # dropout is all that these models do in training alone
        contrast, states = self.schedule.contrast, self.schedule.states
        out = model(input_ids=tokens, use_cache=False, output_hidden_states=states or contrast > 0)
        if self.window_masks:
            loss = self.window_masks.weighed(inputs["window"], self._by_window(out.logits, inputs))
        elif self.teacher is None:
            loss = next_token(out.logits, tokens)
        else:
            divergences = divergence(out.logits[:, :-1], inputs["ids"], inputs["chances"], inputs["tail"])
            loss = beside(divergences, self._misalignment(out, inputs)) if states else divergences.mean()
            if contrast:
                loss = loss + contrast * self._contrast(model, out, inputs)
            if share := self.schedule.text_share:
                loss = share * next_token(out.logits, tokens) + (1 - share) * loss
        return (loss, out) if return_outputs else loss

    def _by_window(self, logits: Logits, inputs: dict[str, Any]) -> Rows:
        """The loss of each window, without what is aligned besides."""
        share = 1.0 if self.teacher is None else self.schedule.text_share
        loss = torch.zeros(len(logits), device=logits.device)
        if share:
            windows = zip(logits.split(1), inputs["tokens"].split(1), strict=True)
            loss = share * torch.stack([next_token(*window) for window in windows])
        if share < 1:
            told = divergence(logits[:, :-1], inputs["ids"], inputs["chances"], inputs["tail"])
            loss = loss + (1 - share) * told
        return loss

    @staticmethod
    def _misalignment(out: Any, inputs: dict[str, Any]) -> Tensor:
        embedded = misalignment(out.hidden_states[EMBEDDED], inputs["embedded"])
        return embedded + misalignment(out.hidden_states[HIDDEN], inputs["hidden"])

    def _contrast(self, model: Any, out: Any, inputs: dict[str, Any]) -> Tensor:
        projected = self.accelerator.unwrap_model(model).get_submodule(PROJECTION)
        return token_contrast(projected(out.hidden_states[LAST]), projected(inputs["last"].to(out.logits.dtype)))

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> LambdaLR:
        """The schedule's own rates: transformers' schedules have a rate of zero in the first step of a warm-up.

        The rate falls to zero: 0.4 % better here than to a tenth, as in LayerChop (docs/LOG.md; arXiv:2502.15938).
        """
        lr_factor, prepared = self.schedule.lr_factor, optimizer or self.optimizer
        assert isinstance(prepared, Optimizer)
        self.lr_scheduler = LambdaLR(prepared, lambda step: lr_factor(step))  # checkpoints do not store functions
        return self.lr_scheduler

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Called after every step, before a checkpoint is written: the place to stop a run that has gone wrong."""
        if any(not math.isfinite(logs.get(name, 0.0)) for name in ("loss", "grad_norm")):
            step, kept = self.state.global_step, last_whole(self.work)
            raise Diverged(f"the loss is no longer finite at step {step} of {self.schedule.steps}: {kept}; lower --lr")
        super().log(logs, start_time)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        with saving(self.work / f"checkpoint-{self.state.global_step}"):
            super()._save_checkpoint(model, trial)

    def learn(self, masks: WindowMasks) -> None:
        """Weigh windows by masks that are learned with the model; no states are aligned then."""
        self.window_masks = masks
        self.add_callback(masks)

    def train_or_resume(self, announce: Callable[[str], object]) -> None:
        """Train to the end, from the last whole checkpoint if there is one; early stopping may end it before."""
        self.announce = announce
        last = self._resume_point(announce)
        if last and self._is_over(last):
            self.state = TrainerState.load_from_json(str(last / STATE))
            self.draw_windows()
            self.restore(step_of(last))
            return
        with quiet_transformers():
            self.train(resume_from_checkpoint=str(last) if last else None)

    def draw_windows(self) -> None:
        """Set the order of the windows as far as it is known, where evaluations decide it."""
        if self.schedule.mixture:
            shares = [entry["shares"] for entry in self.evaluations if "shares" in entry]
            self.order = self.schedule.mixture.order(shares, self.schedule.ends)

    def gathered(self, start: Callable[[], Any]) -> Any:
        """The trained model, whole in every process.

        Args:
            start: makes an untrained model, to be filled where the trained one is spread over processes.
        """
        if not self.is_fsdp_enabled:
            # its forward pass then is without autocast
            return self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
        whole, model = self.accelerator.get_state_dict(self.model), start()
        model.load_state_dict(whole)
        return model

    def _is_over(self, last: Path) -> bool:
        """Whether a run that was killed had only its result left to write."""
        evaluations = [entry for entry in _history(last) if "losses" in entry]
        return step_of(last) == self.schedule.steps or bool(self.early_stopping.stopped_by(evaluations))

    def _resume_point(self, announce: Callable[[str], object]) -> Path | None:
        """The last whole checkpoint; those after it, half-written or damaged, are removed."""
        whole, broken = checkpoints(self.work), []
        while whole and not is_whole(whole[-1]):
            broken.append(whole.pop())
        last = whole[-1] if whole else None
        if self.is_world_process_zero():
            for checkpoint in broken:
                announce(f"{checkpoint} is not whole: going on from {f'step {step_of(last)}' if last else 'the start'}")
                shutil.rmtree(checkpoint)
            if last and not broken:
                announce(f"going on from step {step_of(last)} of {self.schedule.steps}")
        return last

    def restore(self, step: int) -> None:
        """Give the model the weights that it had after `step`."""
        with quiet_transformers():
            self._load_from_checkpoint(str(self.work / f"checkpoint-{step}"))


class Watch(TrainerCallback):
    """Shows progress, evaluates the model when the schedule says so, has checkpoints written, removes old ones."""

    def __init__(self, trainer: RecoveryTrainer, tick: Tick):
        self.trainer, self.tick = trainer, tick
        self.saved = time.monotonic()
        self.begun = 0.0  # when training would have begun without interruptions and evaluations

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        trainer = self.trainer
        self.tick("training", state.global_step, state.max_steps)
        trainer.draw_windows()
        if not trainer.evaluations and trainer.early_stopping.texts:
            self._evaluate(state)
        self.begun = time.perf_counter() - trainer.early_stopping.seconds - trainer.seconds

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        trainer = self.trainer
        self.tick("training", state.global_step, state.max_steps)
        if state.global_step in trainer.schedule.evaluate_after:
            if trainer.early_stopping.texts:
                self._evaluate(state)
            control.should_training_stop |= bool(trainer.early_stopping.stopped_by(trainer.evaluations))
            control.should_save = True
        elif _agreed(time.monotonic() - self.saved > SAVE_SECONDS, args):
            control.should_save = True

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        trainer = self.trainer
        self.saved = time.monotonic()
        trainer.accelerator.wait_for_everyone()  # each process writes files of its own
        if not state.is_world_process_zero:
            return
        checkpoint = trainer.work / f"checkpoint-{state.global_step}"
        (checkpoint / "training_args.bin").unlink(missing_ok=True)  # a pickle of code, which nothing here reads
        with saving(checkpoint):
            mark_whole(checkpoint)
        evaluations = trainer.evaluations
        best = trainer.early_stopping.best(evaluations)["step"] if evaluations else None
        for old in checkpoints(trainer.work)[:-KEPT]:
            if step_of(old) != best:
                shutil.rmtree(old)

    def _evaluate(self, state: Any) -> None:
        trainer = self.trainer
        model = trainer.accelerator.unwrap_model(trainer.model)
        seconds = time.perf_counter() - trainer.early_stopping.seconds - self.begun if state.global_step else 0.0
        losses = trainer.early_stopping.losses(model)
        shares = self._shares(state, losses)
        state.log_history.append({"step": state.global_step, "losses": losses, "seconds": seconds, **shares})
        trainer.draw_windows()

    def _shares(self, state: Any, losses: dict[str, list[float]]) -> dict[str, list[float]]:
        """The shares of the windows that follow: the first process's, in all of them."""
        trainer, mixture = self.trainer, self.trainer.schedule.mixture
        if mixture is None or state.global_step == state.max_steps:
            return {}
        base = trainer.evaluations[-1]["base_shares"] if trainer.evaluations else ()
        (found,) = broadcast_object_list([mixture.judged(losses, base, state.global_step / state.max_steps)])
        if state.is_world_process_zero:
            each = zip(mixture.texts, found["shares"], strict=True)
            said = ", ".join(f"{text} {share:.0%}" for text, share in each)
            trainer.announce(f"step {state.global_step} of {state.max_steps}: windows of {said} from here on")
        return found


def _history(checkpoint: Path) -> list[dict[str, Any]]:
    """The log of a run up to a checkpoint."""
    return json.loads((checkpoint / STATE).read_text(encoding="utf-8"))["log_history"]


class _Steps(Dataset):
    """The windows of all steps, in order, each with the teacher's predictions."""

    def __init__(self, trainer: RecoveryTrainer):
        self.trainer = trainer

    def __len__(self) -> int:
        return len(self.trainer.schedule.order)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        window, teacher = self.trainer.order[index], self.trainer.teacher
        predictions = teacher.of(window) if teacher else {}
        return {"window": torch.tensor(window), "tokens": self.trainer.schedule.windows[window], **predictions}


def _stacked(items: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([item[name] for item in items]) for name in items[0]}


def _arguments(schedule: Schedule, work: Path) -> TrainingArguments:
    arguments = TrainingArguments(
        output_dir=str(work),
        max_steps=schedule.steps,
        per_device_train_batch_size=schedule.micro_batch,
        learning_rate=schedule.lr,
        train_sampling_strategy="sequential",
        bf16=schedule.autocast is torch.bfloat16,
        use_cpu=schedule.cpu,
        seed=schedule.seed,
        save_strategy="no",  # Watch decides when
        eval_strategy="no",
        logging_steps=1,
        logging_nan_inf_filter=False,
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=not schedule.cpu,
        ddp_find_unused_parameters=False,
        ddp_timeout=LONG,
    )
    arguments._n_gpu = min(1, arguments.n_gpu)  # one GPU a process: the Trainer would run replicas in threads
    micro_batches, rest = divmod(schedule.rows, schedule.micro_batch * arguments.world_size)
    if rest or not micro_batches:
        raise BillhookError(
            f"{schedule.rows} windows a step cannot be shared by {arguments.world_size} processes, "
            f"{schedule.micro_batch} at a time: change --batch-tokens or --micro-batch"
        )
    arguments.gradient_accumulation_steps = micro_batches
    return arguments


def _agreed(mine: bool, args: Any) -> bool:
    """The first process's answer, in all processes: clocks differ, and all must write a checkpoint or none."""
    if args.world_size == 1:
        return mine
    answer = torch.tensor([float(mine)], device=args.device)
    torch.distributed.broadcast(answer, 0)
    return bool(answer.item())
