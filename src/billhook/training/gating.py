"""Gates on the units of axes: what a unit gives the reader of its axis is multiplied by a number that is learned.

At gate 1 the model is the unpruned one, to the bit; at gate 0 its unit is as good as cut.  A `Learner` says how gates
come of what is trained; the loop here runs it on the unpruned model's predictions, and keeps all that a killed run
needs to end in the same bits.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from billhook.errors import BillhookError
from billhook.math.gates import Goal
from billhook.math.losses import divergence, next_token
from billhook.models.axes import Axis, axes, reader_weight
from billhook.models.plan import AxisKey
from billhook.runtime import cache
from billhook.runtime.headers import load
from billhook.runtime.peers import Peers
from billhook.runtime.run import Run
from billhook.tensors import Chances, Tokens, precise
from billhook.training.teacher import Lesson, TeacherCache, fill_cache
from billhook.training.text_windows import order_of

BLOCK = 16  # steps between two states that are kept
TOP = 256  # tokens whose probability in the unpruned model is kept; others count as one
DECAYS = (0.9, 0.99)  # of Adam's two averages: a few hundred steps are not many


@dataclass(frozen=True, eq=False)
class Units:
    """The units of some axes in one row, axis after axis."""

    axes: Sequence[Axis]
    prices: Chances  # parameters of each unit, float64

    @classmethod
    def of(cls, model: PreTrainedModel, kinds: tuple[str, ...]) -> "Units":
        """All of a model's units of these kinds."""
        found = axes(model, kinds)
        prices = [torch.full((axis.units,), float(axis.price(model)), dtype=torch.float64) for axis in found]
        return cls(found, torch.cat(prices))

    def split(self, values: Tensor) -> dict[AxisKey, Tensor]:
        """A number for each unit, by axis."""
        parts = values.split([axis.units for axis in self.axes])
        return {(axis.layer, axis.kind): part for axis, part in zip(self.axes, parts, strict=True)}

    def joined(self, values: Mapping[AxisKey, Tensor]) -> Chances:
        """The other way round, in float64 on the CPU."""
        return torch.cat([values[axis.layer, axis.kind].detach().cpu().double() for axis in self.axes])

    def goal(self, drops: Mapping[AxisKey, int], apart: bool) -> Goal:
        """What gates may keep of parameters where these numbers of units go.

        Args:
            apart: whether every axis has a budget of its own, as the uniform layout needs.
        """
        counts = torch.tensor([axis.units for axis in self.axes])
        each = torch.tensor([float(axis.units - drops.get((axis.layer, axis.kind), 0)) for axis in self.axes])
        price = torch.stack([part[0] for part in self.split(self.prices).values()])
        budgets, number = price * each, torch.arange(len(counts))
        group = number.repeat_interleave(counts)
        return Goal(self.prices, group, budgets) if apart else Goal(self.prices, 0 * group, budgets.sum()[None])


@contextmanager
def gated(model: PreTrainedModel, units: Units, gates: Chances) -> Iterator[None]:
    """While open, what each unit gives its reader is multiplied by its gate; gradients of gates pass."""
    with ExitStack() as undo:
        for axis, own in zip(units.axes, units.split(gates).values(), strict=True):
            reader = model.get_submodule(axis.reader_module)
            undo.callback(reader.register_forward_pre_hook(_multiplied(_columns(axis, own))).remove)
        yield


def _multiplied(columns: Tensor) -> Callable[..., Any]:
    def before(module: nn.Module, given: tuple[Tensor, ...]) -> tuple[Any, ...]:
        return given[0] * columns.to(given[0].dtype).to(given[0].device), *given[1:]

    return before


@torch.no_grad()
def fold(model: PreTrainedModel, scales: Mapping[AxisKey, Tensor]) -> None:
    """Multiply the readers' weights, in place, by what gates would multiply their inputs by."""
    for axis in axes(model, tuple(dict.fromkeys(kind for _, kind in scales))):
        weight = reader_weight(model, axis)
        whole = precise(weight)
        weight.copy_(whole * _columns(axis, scales[axis.layer, axis.kind]).to(whole.device))


def _columns(axis: Axis, of_units: Tensor) -> Tensor:
    """A number for each column of an axis's reader, from one for each of its units."""
    index = axis.reader.index
    owner = torch.empty(index.numel(), dtype=torch.long)
    owner[index.flatten()] = torch.arange(axis.units).repeat_interleave(index.shape[1])
    return of_units[owner]


class Learner(nn.Module):
    """How gates come of what is trained.  All that changes from step to step is a parameter or a buffer."""

    def gates(self, step: int) -> Chances:
        """The gates of a step, with their gradient."""
        raise NotImplementedError

    def penalty(self, step: int) -> Tensor | float:
        """What is added to the loss of a step."""
        return 0.0

    def follow(self, step: int) -> None:
        """Called after the backward pass of a step, before anything is moved."""

    def groups(self) -> list[dict[str, Any]]:
        """Parameters with their highest rates, as an optimiser takes them."""
        raise NotImplementedError


@dataclass(frozen=True)
class Course:
    """What gates are learned on."""

    steps: int
    rows: int  # windows of a step
    seed: int  # of the order of windows
    objective: str = "kl"  # kl: divergence from the unpruned model; nll: the loss on the text

    def windows(self, step: int, count: int) -> list[int]:
        """Numbers of a step's windows, of `count`: all come once before any comes twice."""
        order = order_of(count, self.steps * self.rows, self.seed)
        return order[step * self.rows : (step + 1) * self.rows]

    def rate(self, step: int) -> float:
        """The share of the highest rate: a cosine to 0."""
        return (1 + math.cos(math.pi * step / self.steps)) / 2


def lessons(model: PreTrainedModel, tokens: Tokens, folder: Path, run: Run) -> TeacherCache:
    """The unpruned model's predictions for all windows, kept in `folder`, which all processes of a run see."""
    with run.clock("unpruned predictions"):
        share = run.peers.number, run.peers.count
        found = fill_cache(model, tokens, folder, Lesson(TOP), share=share, tick=run.tick)
        run.peers.wait()
        return found


def learn(
    model: PreTrainedModel,
    units: Units,
    learner: Learner,
    read: tuple[Tokens, TeacherCache | None],
    course: Course,
    run: Run,
    key: Mapping[str, Any],
) -> list[float]:
    """Train a learner in place, and return the loss of each step.  The model is left as it was.

    Several processes learn as one: each reads its share of a step's windows, and gradients are summed.

    Args:
        read: windows (windows, length), and the unpruned model's predictions for them where `course` asks for these.
        key: all that decides what is learned besides; a run's folder keeps states under it.

    Raises:
        BillhookError: a loss is not finite; a kept state cannot be read.
    """
    optimizer = torch.optim.Adam(learner.groups(), betas=DECAYS)
    highest = [group["lr"] for group in optimizer.param_groups]
    losses = torch.zeros(course.steps, dtype=torch.float64)
    states = _States(run.folder, key, learner, optimizer, losses)
    peers, begun = run.peers, states.resumed(course.steps)
    peers.agree(learner.state_dict().values())
    with run.clock("gates"), _frozen(model, learner):
        for step in range(begun, course.steps):
            run.tick("learning gates", step, course.steps)
            for group, rate in zip(optimizer.param_groups, highest, strict=True):
                group["lr"] = rate * course.rate(step)
            optimizer.zero_grad()
            with torch.enable_grad():
                windows = peers.share(course.windows(step, len(read[0])))
                loss = _loss(model, units, learner.gates(step), read, course, windows) / peers.count
                (loss + learner.penalty(step) / peers.count).backward()
            losses[step] = _summed(loss, learner, peers)
            if not losses[step].isfinite():
                raise BillhookError(f"the loss of step {step} is not finite: try --dtype float32, or a lower --rate")
            learner.follow(step)
            optimizer.step()
            if peers.first and ((step + 1) % BLOCK == 0 or step + 1 == course.steps):
                states.keep(step + 1)
        run.tick("learning gates", course.steps, course.steps)
    return losses.tolist()


def _loss(
    model: PreTrainedModel,
    units: Units,
    gates: Chances,
    read: tuple[Tokens, TeacherCache | None],
    course: Course,
    numbers: Sequence[int],
) -> Tensor:
    """Mean over the windows of these numbers, in nats a token."""
    windows, teacher = read
    tokens = windows[numbers].to(model.device)
    with gated(model, units, gates):
        logits = model(tokens, use_cache=False).logits
    if teacher is None or course.objective == "nll":
        return next_token(logits, tokens)
    each = [teacher.of(number) for number in numbers]
    ids, chances, tail = (torch.stack([one[part] for one in each]).to(logits.device) for part in _PARTS)
    return divergence(logits[:, :-1], ids, chances, tail).mean()


_PARTS = ("ids", "chances", "tail")


def _summed(loss: Tensor, learner: Learner, peers: Peers) -> float:
    """The sum of all processes' losses; what the learner trains has the sum of their gradients from now on."""
    if peers.count == 1:
        return loss.item()
    total, trained = loss.detach().clone(), list(learner.parameters())
    for parameter in trained:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    peers.add([total, *(parameter.grad for parameter in trained if parameter.grad is not None)])
    return total.item()


@contextmanager
def _frozen(model: PreTrainedModel, learner: Learner) -> Iterator[None]:
    """While open, no weight of the model asks for a gradient but what the learner trains."""
    own = {id(parameter) for parameter in learner.parameters()}
    before = [(weight, weight.requires_grad) for weight in model.parameters()]
    for weight, _ in before:
        weight.requires_grad_(id(weight) in own)
    try:
        yield
    finally:
        for weight, asked in before:
            weight.requires_grad_(asked)


class _States:
    """States of a learner in a folder: the last one, and the one before while it is written."""

    def __init__(
        self,
        folder: Path | None,
        key: Mapping[str, Any],
        learner: Learner,
        optimizer: torch.optim.Optimizer,
        losses: Tensor,
    ) -> None:
        self.folder, self.key = folder, dict(key)
        self.learner, self.optimizer, self.losses = learner, optimizer, losses

    def keep(self, step: int) -> None:
        """Keep the state after `step` steps in place of the last one."""
        if self.folder is None:
            return
        found = {f"learner.{name}": value for name, value in self.learner.state_dict().items()}
        found |= {f"optimizer.{n}.{name}": value for n, name, value in self._averages()}
        cache.write_tensors(self._file(step), {**found, "losses": self.losses})
        self._file(step - (step % BLOCK or BLOCK)).unlink(missing_ok=True)

    def resumed(self, steps: int) -> int:
        """After how many steps learning goes on, from the state that was kept then."""
        ends = [steps, *range(steps - (steps % BLOCK or BLOCK), 0, -BLOCK)]
        done = next((end for end in ends if self.folder is not None and self._file(end).exists()), 0)
        if done:
            found = load(self._file(done), cache.AGAIN)
            self.losses.copy_(found.pop("losses"))
            self.learner.load_state_dict(_under("learner.", found))
            whole = self.optimizer.state_dict()
            for name, value in _under("optimizer.", found).items():
                number, _, average = name.partition(".")
                whole["state"].setdefault(int(number), {})[average] = value
            self.optimizer.load_state_dict(whole)
        return done

    def _averages(self) -> Iterator[tuple[int, str, Tensor]]:
        for number, averages in self.optimizer.state_dict()["state"].items():
            for name, value in averages.items():
                yield number, name, value

    def _file(self, step: int) -> Path:
        assert self.folder is not None
        return cache.path(self.folder, "gates", {**self.key, "step": step}, "safetensors")


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
