"""Masks of the decoder layers' linear weights that move while these train (billhook.math.sr_ste).

The weights stay dense; the model computes with what its masks leave.  Masks are part of every checkpoint, so that a run
that was cut off goes on with the same ones.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.optim import Optimizer
from transformers import PreTrainedModel, TrainerCallback
from transformers.pytorch_utils import Conv1D

from billhook.math import sparsity, sr_ste
from billhook.math.pattern import Pattern
from billhook.models.families import layers, linear, linears, weight_of
from billhook.tensors import Tokens, precise

EVERY = 10  # steps between two moves
RISE = 0.25  # share of the steps over which the decay rises
SETTLED = 0.1  # share of the steps, the last ones, in which no mask moves: what stays has trained together


class MovingMask(nn.Module):
    """W o M of a weight as it is stored, with a mask that `move` finds anew."""

    mask: Tensor
    norms: Tensor | None

    def __init__(self, weight: Tensor, pattern: Pattern, turned: bool, norms: Tensor | None = None):
        """
        Args:
            turned: whether the weight is stored as (in, out), as Conv1D does.
            norms: of its inputs, by which its entries are scored.
        """
        super().__init__()
        self.pattern, self.turned = pattern, turned
        self.register_buffer("norms", norms, persistent=False)
        self.register_buffer("mask", self._found(weight))

    def forward(self, weight: Tensor) -> Tensor:
        return sr_ste.masked(weight, self.mask)

    def move(self, weight: Tensor) -> int:
        """Mask the smallest weights of every group as they are now; how many entries of the mask changed."""
        before, self.mask = self.mask, self._found(weight)
        return int((before != self.mask).sum())

    def _found(self, weight: Tensor) -> Tensor:
        mask = sr_ste.largest(weight.T if self.turned else weight, self.pattern, self.norms)
        return mask.T.contiguous() if self.turned else mask


def train_with_moving_masks(
    model: PreTrainedModel, pattern: Pattern, norms: Mapping[str, Tensor] | None = None
) -> PreTrainedModel:
    """Compute every linear weight of the decoder layers from a dense one that trains, by a mask of its own.

    Args:
        norms: of `input_norms`, by which entries are scored; none: by their size alone.
    """
    for name in _names(model):
        module = linear(model, name)
        form = MovingMask(module.weight, pattern, isinstance(module, Conv1D), (norms or {}).get(name))
        parametrize.register_parametrization(module, "weight", form, unsafe=True)
    return model


@torch.no_grad()
def input_norms(model: PreTrainedModel, windows: Tokens) -> dict[str, Tensor]:
    """The norm of each input of every linear weight of the decoder layers over all tokens, by the weight's path."""
    sums: dict[str, Tensor] = {}

    def add(name: str, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        squares = precise(inputs[0].float().square().flatten(0, -2).sum(0)).cpu()
        sums[name] = sums[name] + squares if name in sums else squares

    with ExitStack() as undo:
        for name in _names(model):
            undo.callback(linear(model, name).register_forward_pre_hook(partial(add, name)).remove)
        for window in windows:
            model(window[None].to(model.device), use_cache=False)
    return {name: found.sqrt().float() for name, found in sums.items()}


def check(model: PreTrainedModel, pattern: Pattern) -> None:
    """Refuse a pattern that does not fit.

    Raises:
        BillhookError: M does not divide the inputs of a weight.
    """
    for name in _names(model):
        sparsity.check(pattern, weight_of(model, name).shape, name)


def broken(model: PreTrainedModel, pattern: Pattern) -> str:
    """The name of a weight of a plain model in which a group has too few zeros; '' if there is none."""
    return next((name for name in _names(model) if not sr_ste.holds(weight_of(model, name), pattern)), "")


def too_few(steps: int) -> bool:
    """Whether a run is over before a mask has moved."""
    return not any(_moves(step, steps) for step in range(steps))


def _moves(step: int, steps: int) -> bool:
    """Whether masks move before this step, counted from 0."""
    return step > 0 and step % EVERY == 0 and step <= (1 - SETTLED) * steps


def _names(model: PreTrainedModel) -> Iterator[str]:
    """The paths of all linear modules of the decoder layers that have a role."""
    for n in range(len(layers(model))):
        for group in linears(model, n):
            yield from group.values()


def _forms(model: nn.Module) -> Mapping[Tensor, MovingMask]:
    """The mask of every weight that has one, by the dense weight."""
    lists: list[Any] = [module for module in model.modules() if isinstance(module, parametrize.ParametrizationList)]
    return {forms.original: forms[0] for forms in lists if isinstance(forms[0], MovingMask)}


class Mover(TrainerCallback):
    """Moves the masks of a model before every tenth step, and has the trainer's log count how many entries changed."""

    def __init__(self, model: nn.Module):
        self.forms = _forms(model)

    @torch.no_grad()
    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if _moves(state.global_step, state.max_steps):
            flips = sum(form.move(weight) for weight, form in self.forms.items())
            state.log_history.append({"step": state.global_step, "flips": flips})


class AdamBesideDecay(Optimizer):
    """Adam, in which the decay of masked weights is no part of the first moment; for weights without a mask, Adam."""

    def __init__(self, model: nn.Module, lr: float, decay: Callable[[int], float]):
        """
        Args:
            decay: of a step, counted from 0.
        """
        trained = [param for param in model.parameters() if param.requires_grad]
        super().__init__(trained, {"lr": lr, "betas": sr_ste.BETAS, "eps": sr_ste.EPS})
        self.forms, self.decay = _forms(model), decay

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    self._step(param, group)

    def _step(self, W: Tensor, group: Mapping[str, Any]) -> None:
        state, (first, second) = self.state[W], group["betas"]
        if not state:
            state |= {"step": 0, "exp_avg": torch.zeros_like(W), "exp_avg_sq": torch.zeros_like(W)}
        m, v = state["exp_avg"], state["exp_avg_sq"]
        m.lerp_(W.grad, 1 - first)
        u, squared = m, W.grad
        if W in self.forms:
            u = squared = sr_ste.update(m, W, self.forms[W].mask, self.decay(state["step"]))
        v.mul_(second).addcmul_(squared, squared, value=1 - second)
        state["step"] += 1
        size = v.sqrt().div_(math.sqrt(1 - second ** state["step"])).add_(group["eps"])
        W.addcdiv_(u, size, value=-group["lr"] / (1 - first ** state["step"]))


def optimizer(model: nn.Module, lr: float, decay: float, steps: int) -> AdamBesideDecay:
    """The optimiser of a run of so many steps, whose decay is annealed."""
    rise = max(1, round(RISE * steps))
    return AdamBesideDecay(model, lr, lambda step: sr_ste.annealed(decay, step, rise))
