"""The evidence of a pool of windows: one backward pass gives every metric of any mixture of them."""

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from billhook.calibration.gradients import each_window, gradient_sums, pooled
from billhook.math.taylor import gate_fisher
from billhook.models.axes import Axis, Slot, axes, reader_weight
from billhook.models.plan import AxisKey
from billhook.runtime import cache, tensor_files
from billhook.runtime.progress import Tick, quiet, ticked
from billhook.search.metrics import PoolEvidence, UnitEvidence, mixtures
from billhook.tensors import Scores, Tokens

CHUNK = 1 << 16  # entries of a weight that are mixed at a time, so that they stay in the processor's cache


def evidence(
    model: PreTrainedModel,
    tokens: Tokens,
    clusters: Tensor,
    kinds: tuple[str, ...],
    *,
    folder: Path | None = None,
    tick: Tick = quiet,
) -> PoolEvidence:
    """What `tokens` (windows, length) say of every unit of the axes of `kinds`; kept in `folder` if there is one.

    Args:
        clusters: (windows,), the number of each window's cluster, from 0.

    Raises:
        BillhookError: as `gradients.gradient_sums`; what was kept cannot be read.
    """
    key = {
        **cache.model_key(model),
        "windows": cache.digest({"tokens": tokens.tolist(), "clusters": clusters.tolist()}),
        "kinds": list(kinds),
    }

    def measure() -> dict[str, Tensor]:
        units = _measured(model, tokens, clusters, kinds, tick)
        return {
            f"{n}.{kind}.{name}": value for (n, kind), fields in units.items() for name, value in vars(fields).items()
        }

    fields: dict[AxisKey, dict[str, Tensor]] = {}
    for name, value in cache.cached_tensors(folder, "pool", key, measure).items():
        n, kind, field = name.split(".")
        fields.setdefault((int(n), kind), {})[field] = value
    return PoolEvidence({place: UnitEvidence(**values) for place, values in sorted(fields.items())}, clusters)


def gate_fishers(
    model: PreTrainedModel, tokens: Tokens, kinds: tuple[str, ...], *, folder: Path | None = None, tick: Tick = quiet
) -> dict[AxisKey, Scores]:
    """The mean over windows of the squared gradient of a gate on each unit; kept in `folder` if there is one.

    Raises:
        BillhookError: as `evidence`.
    """
    key = {
        **cache.model_key(model),
        "windows": cache.digest({"tokens": tokens.tolist()}),
        "kinds": list(kinds),
    }

    def measure() -> dict[str, Tensor]:
        sums = gradient_sums(model, tokens, kinds, tick=tick)
        return {f"{n}.{kind}": gate_fisher(gradients).cpu() / len(tokens) for (n, kind), gradients in sums.items()}

    fishers = cache.cached_tensors(folder, "gates", key, measure)
    return {(int(n), kind): value for name, value in fishers.items() for n, kind in [name.split(".")]}


def _measured(
    model: PreTrainedModel, tokens: Tokens, clusters: Tensor, kinds: tuple[str, ...], tick: Tick
) -> dict[AxisKey, UnitEvidence]:
    every = axes(model, kinds)
    slots = [slot for axis in every for slot in axis.slots]
    sums = [torch.zeros(3, len(axis.slots), len(tokens), axis.units) for axis in every]  # A, B and D
    uses: dict[nn.Parameter, list[tuple[Slot, Tensor]]] = {}  # by identity: a tied parameter has one gradient
    for axis, axis_sums in zip(every, sums, strict=True):
        for s, slot in enumerate(axis.slots):
            uses.setdefault(model.get_parameter(slot.param), []).append((slot, axis_sums[:, s]))
    done = 0
    with tempfile.TemporaryDirectory() as scratch:
        gradients = _Gradients(Path(scratch), list(uses))
        energies = _Energies(model, every, len(tokens))
        for cluster in range(int(clusters.max()) + 1):
            members = (clusters == cluster).nonzero().flatten()

            def take(
                n: int, param: nn.Parameter, grad: Tensor, entries: Mapping[int, Tensor], members: Tensor = members
            ) -> None:
                gradients.add(param, grad)
                for slot, slot_sums in uses[param]:
                    slot_sums[:, members[n]] = pooled(entries[slot.dim], slot).float().cpu()

            def tick_all(stage: str, n: int, total: int, before: int = done) -> None:
                tick(stage, before + n, len(tokens))

            with energies.watched(members) as begin:
                each_window(model, tokens[members], slots, take, held=gradients.bytes, begin=begin, tick=tick_all)
            gradients.close(cluster)
            done += len(members)
        mixtures_of = _mixed(model, slots, gradients, clusters, tick)
    units = {}
    for axis, (signed, absolute, squared), energy in zip(every, sums, energies.sums, strict=True):
        first, mixed = torch.stack([mixtures_of[slot] for slot in axis.slots], 2)
        magnitude = torch.stack([_magnitude(model, slot) for slot in axis.slots])
        units[axis.layer, axis.kind] = UnitEvidence(
            signed.clone(), absolute.clone(), squared.clone(), first.clone(), mixed.clone(), energy, magnitude
        )
    return units


class _Gradients:
    """Sums of g and g^2 over the windows of each cluster: the current cluster's in memory, those before it on disk."""

    def __init__(self, folder: Path, params: Sequence[nn.Parameter]) -> None:
        self.folder, self.names = folder, {param: str(n) for n, param in enumerate(params)}
        self.open: dict[nn.Parameter, Tensor] = {}
        self.bytes = sum(2 * 4 * param.numel() for param in params)

    def add(self, param: nn.Parameter, grad: Tensor) -> None:
        if param not in self.open:
            self.open[param] = torch.zeros(2, *param.shape, device=param.device)
        self.open[param][0].add_(grad)
        self.open[param][1].addcmul_(grad, grad)

    def close(self, cluster: int) -> None:
        """Write the sums of a cluster, in bfloat16: three digits are enough for entries that are summed over a unit."""
        file = self.folder / str(cluster)
        tensor_files.write({self.names[param]: both.bfloat16() for param, both in self.open.items()}, file)
        self.open.clear()

    def of(self, param: nn.Parameter, clusters: int) -> Tensor:
        """The sums of a parameter, (clusters, 2, *shape)."""
        sums = []
        for cluster in range(clusters):
            with safe_open(self.folder / str(cluster), "pt") as file:
                sums.append(file.get_tensor(self.names[param]))
        return torch.stack(sums)


@torch.no_grad()
def _mixed(
    model: PreTrainedModel, slots: Sequence[Slot], gradients: _Gradients, clusters: Tensor, tick: Tick
) -> dict[Slot, Tensor]:
    """param_first and param_mix of each unit, for every slot and mixture of clusters: (2, mixtures, units)."""
    sizes = clusters.bincount().float()
    levels = torch.tensor(mixtures(len(sizes)), dtype=torch.float32)
    levels = levels / (levels @ sizes).unsqueeze(1)  # pi of one window of each cluster
    mixed = {}
    for slot in ticked(slots, "mixing gradients", tick):
        param = model.get_parameter(slot.param)
        size = param.shape[slot.dim]
        w = param.detach().cpu().float().movedim(slot.dim, 0).reshape(size, -1)
        sums = gradients.of(param, len(sizes)).movedim(slot.dim + 2, 2).reshape(len(sizes), 2, size, -1)
        rows, parts = max(1, CHUNK // w.shape[1]), []
        for start in range(0, len(w), rows):
            weight, chunk = w[start : start + rows], sums[:, :, start : start + rows].float()
            shape = len(levels), *weight.shape
            linear, square = ((levels @ chunk[:, order].flatten(1)).view(shape) for order in (0, 1))
            linear *= weight
            first = linear.abs().sum(2)
            parts.append(torch.stack([first, linear.sub_(square.mul_(weight).mul_(weight), alpha=0.5).abs_().sum(2)]))
        mixed[slot] = torch.cat(parts, 2)[:, :, slot.index].sum(3)
    return mixed


class _Energies:
    """The energy of what enters each reader, by window and unit."""

    def __init__(self, model: PreTrainedModel, axes: Sequence[Axis], windows: int) -> None:
        self.model, self.axes, self.window = model, axes, 0
        self.sums = [torch.zeros(windows, axis.units) for axis in axes]

    @contextmanager
    def watched(self, windows: Tensor) -> Iterator[Callable[[int], None]]:
        """Watch forward passes while open; yields a function that must be told which of `windows` comes next."""

        def begin(n: int) -> None:
            self.window = int(windows[n])

        with ExitStack() as undo:
            for axis, energy in zip(self.axes, self.sums, strict=True):
                module = self.model.get_submodule(axis.reader_module)
                undo.callback(module.register_forward_pre_hook(self._watcher(axis, energy)).remove)
            yield begin

    def _watcher(self, axis: Axis, energy: Tensor) -> Callable[..., None]:
        norms = reader_weight(self.model, axis).detach().float().square().sum(0)

        @torch.no_grad()
        def watch(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            energy[self.window] = axis.pool(inputs[0].float().flatten(0, -2).square().sum(0) * norms).cpu()

        return watch


def _magnitude(model: PreTrainedModel, slot: Slot) -> Scores:
    param = model.get_parameter(slot.param).detach().float()
    return param.square().movedim(slot.dim, 0).reshape(param.shape[slot.dim], -1).sum(1).cpu()[slot.index].sum(1)
