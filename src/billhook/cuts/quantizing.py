"""Quantise a model: the linear weights of its decoder layers get few bits, operator by operator, the shape as it was.

Each weight sees what the quantised ones before it let through (the stream), and is left in the model as the values of
its codes, float32: what a container will give back.  A weight that lies on the levels already stays as it is.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import TypeVar

import torch
from safetensors.torch import load, save
from torch import Tensor
from transformers import PreTrainedModel

from billhook.calibration.linears import Group, operators
from billhook.calibration.passage import Route
from billhook.choices import ROLES
from billhook.cuts.masking import every, target_of
from billhook.cuts.settings import SOLVER_DAMPING
from billhook.errors import BillhookError
from billhook.math import gptq, grids
from billhook.math.grids import GRIDS, Grid, Quantised
from billhook.math.layerwise import Settings, Target, squared_error
from billhook.math.sparsity import SPARSE_SHARE, Support
from billhook.models.families import layers, weight_of
from billhook.runtime.run import Run
from billhook.tensors import Tokens, Weight, precise

Made = TypeVar("Made")


@dataclass(frozen=True)
class Quantizing:
    """Which weights become of how many bits, and how."""

    method: str  # gptq; rtn and kept read no text
    grids: Mapping[str, str]  # name of the grid by path of the linear module; those left out keep what they are
    stream: str = "sequential"
    damping: float = SOLVER_DAMPING


@dataclass(frozen=True)
class Rounded:
    """What became of one weight.  Errors are relative, ||V X*^T - Y|| / ||Y||; None without calibration text."""

    layer: int
    role: str
    path: str
    grid: str
    weights: int
    damping: float | None = None
    error: float | None = None  # on the calibration text
    error_held_out: float | None = None  # on windows that the method did not see
    error_nearest: float | None = None  # of round-to-nearest, on the calibration text


@dataclass
class Found:
    """The codes of every weight by the path of its module, what became of each, and what enters it."""

    codes: dict[str, Quantised] = field(default_factory=dict)
    records: list[Rounded] = field(default_factory=list)
    energies: dict[str, Tensor] = field(default_factory=dict)  # sums of squares of each input, float32
    tokens: int = 0  # that those sums are over


@torch.no_grad()
def quantise(model: PreTrainedModel, tokens: Tokens, how: Quantizing, run: Run) -> Found:
    """Quantise a model, which is float32, in place.

    Args:
        tokens: calibration windows (windows, length); round-to-nearest reads none.

    Raises:
        BillhookError: an activation is not finite; a Gram that cannot be factored, or a scale beyond float16 (names the
            weight).
    """
    found = Found()
    for n in sorted(run.finished.records):
        _recall(found, run.finished.once(f"codes-{n}", torch.empty(0).clone))
    found.records += [Rounded(**one) for one in run.finished.found]
    if how.method != "gptq":
        _nearest(model, how, found, run)
        return found
    route = Route(how.stream)
    found.tokens = (len(tokens) - int(route.held_out * len(tokens))) * tokens.shape[1]
    last, here = {n: path for n, _, path in paths(model)}, Found()
    for group in operators(model, tokens, ROLES, run, route):
        for role, path in group.names.items():
            if path in how.grids:
                _swept(model, group, role, path, how, here)
            here.energies[path] = group.fit.gram.diagonal().float().cpu()
        if last[group.layer] in group.names.values():
            _keep(here, found, group.layer, run)
            here = Found()
    return found


def _held(W: Weight) -> Support | None:
    """The zeros of a weight that is sparse: they stay."""
    zeros = W == 0
    return zeros if zeros.sum() > SPARSE_SHARE * zeros.numel() else None


def off_levels(model: PreTrainedModel, grid: Grid) -> str | None:
    """The path of the first weight that does not lie on the grid's levels, of those whose rows are whole blocks."""
    divided = ((path, weight_of(model, path)) for _, _, path in paths(model))
    found = (
        path for path, weight in divided if grids.divides(weight.shape[1], grid.block) and not grids.exact(weight, grid)
    )
    return next(found, None)


def sparse(model: PreTrainedModel) -> bool:
    """Whether some linear weight of a decoder layer is sparse: types without a level at zero cannot hold it."""
    return any(_held(weight_of(model, path)) is not None for _, _, path in every(model, ROLES))


def paths(model: PreTrainedModel) -> Iterator[tuple[int, str, str]]:
    """Layer, role and path of every linear module of the decoder layers."""
    return every(model, ROLES)


def _nearest(model: PreTrainedModel, how: Quantizing, found: Found, run: Run) -> None:
    total = len(layers(model))
    for n, role, path in paths(model):
        run.tick("rounding", n, total)
        if path in how.grids:
            weight, grid = weight_of(model, path), GRIDS[how.grids[path]]
            held = grids.exact(weight, grid)
            found.codes[path] = held or _named(path, partial(grids.nearest, weight, grid, _held(weight)))
            weight.copy_(found.codes[path].values())
            found.records.append(Rounded(n, role, path, grid.name, weight.numel()))
    run.tick("rounding", total, total)


def _swept(model: PreTrainedModel, group: Group, role: str, path: str, how: Quantizing, found: Found) -> None:
    weight, grid = weight_of(model, path), GRIDS[how.grids[path]]
    W, zeros = precise(weight).contiguous(), _held(weight)
    target, settings = target_of(W, group.fit), Settings(damping=how.damping, zeros=zeros)
    held = grids.exact(weight, grid)
    codes, damping = (held, None) if held else _named(path, partial(gptq.quantise, W, target, grid, settings))
    weight.copy_(codes.values())
    V, nearest = precise(weight), grids.nearest(W, grid, zeros).values()
    off = None if group.held_out is None else _relative(V, W, group.held_out.gram)
    errors = _relative(V, W, group.fit.gram), off, _relative(nearest, W, group.fit.gram)
    found.codes[path] = codes
    found.records.append(Rounded(group.layer, role, path, grid.name, W.numel(), damping, *errors))


def _relative(V: Weight, W: Weight, gram: Tensor) -> float:
    """||(V - W) X^T|| / ||W X^T||."""
    whole = ((W @ gram) * W).sum()
    return math.sqrt(float(squared_error(V, W, Target(gram)).sum() / whole)) if whole > 0 else 0.0


def _named(path: str, make: Callable[[], Made]) -> Made:
    """What `make` gives, with the weight's name in its errors."""
    try:
        return make()
    except BillhookError as error:
        raise BillhookError(f"{path}: {error}") from error


def _keep(here: Found, found: Found, n: int, run: Run) -> None:
    """Keep what became of a layer, in the run's folder and in memory."""
    packed = _bytes(here)
    run.finished.once(f"codes-{n}", packed.clone)
    run.finished.save(n, [asdict(one) for one in here.records], [])
    found.codes |= here.codes
    found.energies |= here.energies
    found.records += here.records


def _bytes(found: Found) -> Tensor:
    """Codes and energies of a layer as safetensors, uint8."""
    tensors = {f"{path}:energies": energies for path, energies in found.energies.items()}
    for path, one in found.codes.items():
        tensors |= {f"{path}:{one.grid.name}:codes": one.codes, f"{path}:{one.grid.name}:scales": one.scales}
        tensors |= {} if one.minima is None else {f"{path}:{one.grid.name}:minima": one.minima}
    written = save({name: tensor.cpu().contiguous() for name, tensor in tensors.items()})
    return torch.frombuffer(bytearray(written), dtype=torch.uint8)


def _recall(found: Found, packed: Tensor) -> None:
    tensors = load(packed.numpy().tobytes())
    for name, tensor in tensors.items():
        path, *kind = name.split(":")
        if kind == ["energies"]:
            found.energies[path] = tensor
        elif kind[1] == "codes":
            minima = tensors.get(f"{path}:{kind[0]}:minima")
            found.codes[path] = Quantised(GRIDS[kind[0]], tensor, tensors[f"{path}:{kind[0]}:scales"], minima)
