"""LoRAPrune: gates that close one after another by an importance from adapters' gradients (billhook.math.loraprune).

The weights are frozen, low-rank adapters train on the text, and every few steps the units of an axis that matter least
get gate 0, more of them as training goes on, until as many are gone as the plan says.  A unit that is gone puts out
nothing, gets no gradient, and does not come back.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from billhook.math import loraprune, selection
from billhook.models.axes import Axis
from billhook.models.plan import AxisKey
from billhook.tensors import Chances, Scores
from billhook.training.adapting import Adapter
from billhook.training.gating import Learner, Units

EVERY = 10  # steps between two changes of the gates


class Closing(Learner):
    """Gates 1, and 0 for what is gone; adapters are what is trained."""

    mask: Tensor
    worth: Tensor

    def __init__(
        self,
        units: Units,
        adapters: Mapping[str, Adapter],
        drops: Mapping[AxisKey, int],
        steps: int,
        rate: float,
        shuffled: int | None = None,
    ):
        """
        Args:
            adapters: by the path of their module.
            drops: how many units of each axis are gone in the end.
            shuffled: seed of a control, in which units of an axis are told one another's importance.
        """
        super().__init__()
        self.units, self.drops, self.steps, self.rate, self.shuffled = units, drops, steps, rate, shuffled
        self.weights = {path: adapter.weight for path, adapter in adapters.items()}
        self.adapters = nn.ModuleList(adapter.module for adapter in adapters.values())
        self.register_buffer("mask", torch.ones_like(units.prices))
        self.register_buffer("worth", torch.zeros_like(units.prices))

    def gates(self, step: int) -> Chances:
        if step and (step % EVERY == 0 or step + 1 == self.steps):
            self.mask = self._closed(loraprune.share_gone(step, self.steps))
        return self.mask

    def follow(self, step: int) -> None:
        draw = torch.Generator().manual_seed((self.shuffled or 0) + step)
        found = [self._importance(axis) for axis in self.units.axes]
        if self.shuffled is not None:
            found = [each[torch.randperm(len(each), generator=draw)] for each in found]
        self.worth = loraprune.averaged(self.worth, torch.cat(found), first=step == 0)

    def groups(self) -> list[dict[str, Any]]:
        return [{"params": list(self.adapters.parameters()), "lr": self.rate}]

    def _closed(self, share: float) -> Chances:
        parts = []
        for axis in self.units.axes:
            place = axis.layer, axis.kind
            worth, open_now = self.units.split(self.worth)[place], self.units.split(self.mask)[place]
            count = round(share * self.drops.get(place, 0) / axis.blocks) * axis.blocks
            _, keep = selection.lowest(worth * open_now, count, axis.blocks)
            parts.append(torch.zeros_like(worth).index_fill(0, keep, 1.0))
        return torch.cat(parts)

    @torch.no_grad()
    def _importance(self, axis: Axis) -> Scores:
        found, by_path = (
            torch.zeros(axis.units, dtype=torch.float64),
            dict(zip(self.weights, self.adapters, strict=True)),
        )
        for slot in axis.slots:
            adapter: Any = by_path.get(slot.param.removesuffix(".weight"))
            if adapter is None:
                continue  # a bias
            G = loraprune.estimated(adapter.a, adapter.b, adapter.a.grad, adapter.b.grad)
            W = adapter(self.weights[slot.param.removesuffix(".weight")])
            found += loraprune.importance(G, W, slot.dim, slot.index).cpu()
        return found
