"""Weights trained on the levels of a grid, so that packing them afterwards changes no bit (QuantGPT's training).

Every linear weight of the decoder layers whose rows are whole blocks is computed from one in float32 by
`billhook.math.quantgpt`; what is left at the end is the value on the grid.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from billhook.errors import ModelError
from billhook.math import grids, quantgpt
from billhook.math.grids import BLOCK, Grid
from billhook.models.families import layers, mixture
from billhook.models.multimodal import within
from billhook.tensors import Weight

PROJECTION, PROJECTED = "token_projection", 128  # what last states pass before they are contrasted, and its width
SHARES = tuple(2 ** (-n / 8) for n in range(33))  # of a module's extreme that are tried as its clip: 1 to 1/16


class OnLevels(nn.Module):
    """W^ of W: on the levels of a grid, with a scale for each block of 32 inputs or one for the module.

    A weight that lies on the levels already, block by block, starts from its own scales; any other from those of the
    least squared error.  gamma_0 is taken from the student each time, since no checkpoint holds it.
    """

    start: Tensor

    def __init__(self, weight: Weight, grid: Grid, whole: bool):
        super().__init__()
        self.whole, weight = whole, weight.detach().float()
        grid = replace(grid, lowest=-grid.highest) if whole else grid  # the paper's levels: as many on either side
        self.levels = grid.lowest, grid.highest
        mean = self._shared(weight).abs().mean(-1, keepdim=True)
        steps = self._steps(weight, grid).float().reshape(mean.shape)
        self.register_buffer("start", steps / torch.where(mean == 0, 1.0, mean), persistent=False)
        self.growth = nn.Parameter(torch.zeros_like(self.start))

    def _steps(self, weight: Weight, grid: Grid) -> Tensor:
        if self.whole:
            return grids.best_scales(self._shared(weight), grid, shares=SHARES)[0]
        held = grids.exact(weight, grid)
        return grids.best_scales(self._shared(weight).flatten(0, 1), grid)[0] if held is None else held.scales

    def _shared(self, weight: Weight) -> Tensor:
        """The weight with the entries that share a scale in its last dimension."""
        return weight.reshape(1, -1) if self.whole else grids.blocks(weight)

    def forward(self, weight: Weight) -> Weight:
        gamma = self.start * torch.exp(quantgpt.PACE * self.growth)
        return quantgpt.nearest(self._shared(weight.float()), gamma, *self.levels).reshape(weight.shape)


def train_on_levels(model: PreTrainedModel, grid: Grid, whole: bool) -> PreTrainedModel:
    """Compute the linear weights of the decoder layers on a grid's levels, in training and afterwards.

    Args:
        whole: whether a module has one scale.

    Raises:
        BillhookError: `check`; a scale beyond float16.
    """
    check(model)
    for linear in _linears(model):
        if grids.divides(linear.weight.shape[1]):
            form = OnLevels(linear.weight, grid, whole).to(linear.weight)
            parametrize.register_parametrization(linear, "weight", form, unsafe=True)
    return model


def add_projection(model: PreTrainedModel) -> None:
    """Give it the linear map by which `quantgpt.token_contrast` sees states: trained, and dropped by `merged`."""
    head: Any = model.get_output_embeddings()
    model.add_module(PROJECTION, nn.Linear(head.weight.shape[1], PROJECTED, bias=False).to(head.weight))


def check(model: PreTrainedModel) -> None:
    """Refuse a model of which nothing would be packed.

    Raises:
        BillhookError: a mixture of experts, a multimodal model's decoder, linear layers of another class than Linear,
            or no rows in whole blocks.
    """
    if stands := within(model):
        raise ModelError(f"--bits: the text decoder of a {stands.model_type} is not quantised: leave it out")
    if any(mixture(model, n) is not None for n in range(len(layers(model)))):
        raise ModelError("--bits: a mixture of experts is not quantised: leave it out")
    if any(isinstance(module, Conv1D) for layer in layers(model) for module in layer.modules()):
        raise ModelError("--bits: its linear layers are Conv1D, which no container of few bits holds: leave it out")
    if not any(grids.divides(linear.weight.shape[1]) for linear in _linears(model)):
        raise ModelError(f"--bits: no weight has inputs in whole blocks of {BLOCK}: prune with --multiple-of {BLOCK}")


def _linears(model: PreTrainedModel) -> list[nn.Linear]:
    return [module for layer in layers(model) for module in layer.modules() if isinstance(module, nn.Linear)]
