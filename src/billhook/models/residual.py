"""The residual dimension: every slot of it in a model, and cutting them all to the same channels.

One channel of the residual stream is a column of the embedding table, a weight of every norm, a row (and a bias) of every
writer, o and down, and a column of every reader: q, k, v, gate, up and the head.  It runs through the whole model, so it is no
Axis, which lives in one layer; its slots are the same Slots.

    y = g x / sqrt(S/d + e),  S = sum of x_j^2 over the d channels (RMSNorm)

Where the channels that go are zero, S is the sum over those d' that stay, and the same y comes out of a norm over them with

    e' = e d/d',  g' = g sqrt(d/d'),  for  S/d' + e' = (S/d + e) d/d'

A config has one e for all norms.  One over query or key heads, which keep their size, sees the same where what it norms grows
by sqrt(d/d') too: S/n d/d' + e' = (S/n + e) d/d'.  And where embeddings are scaled by sqrt(d), as d says, their weights grow
by sqrt(d/d'); a head tied to them then needs a final norm whose g does not.
"""

import math
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from billhook.errors import BillhookError
from billhook.models.axes import Slot, blocks
from billhook.models.families import layers, linear, linears, row_of, shape
from billhook.runtime.offload import by_module
from billhook.tensors import Kept, Units, precise

ROWS = 8192  # of a weight in float64 at a time
EPS = "rms_norm_eps"  # config key: of all norms of a model
EPS_NAMES = ("variance_epsilon", "eps")  # what norm modules call it
SIZE_NAMES = ("hidden_size", "embed_dim")  # what other modules call the residual dimension
ELSE = "use a method that cuts inside the layers, or whole ones: fasp, layerchop"


@dataclass(frozen=True)
class Residual:
    """Paths of the modules that have the residual dimension."""

    channels: int
    embedding: str
    head: str
    writers: tuple[str, ...]  # o and down of every layer
    readers: tuple[tuple[str, ...], ...]  # those that share an input together, in the order in which they compute
    norms: tuple[str, ...]
    inner: tuple[str, ...]  # norms over heads, which have not
    tied: bool


def residual(model: PreTrainedModel) -> Residual:
    """Where the residual dimension of a model is.

    Raises:
        BillhookError: it cannot be cut: a norm subtracts the mean, or a parameter is of no known place.
    """
    kind = model.config.model_type
    if row_of(model).experts:
        raise BillhookError(
            f"{kind} cannot give up 'residual' yet: its routers and experts have a part in it; use --method experts, or fasp"
        )
    if any(isinstance(module, nn.LayerNorm) for module in model.modules()):
        raise BillhookError(
            f"{kind} cannot give up 'residual': its norms subtract the mean of all channels (LayerNorm), and no stock class of "
            f"the family has the RMSNorms that SliceGPT puts in their place; {ELSE}"
        )
    path = {id(module): name for name, module in model.named_modules()}
    embedding, head = embedding_and_head(model)
    channels, row = embedding.weight.shape[1], row_of(model)
    inside = tuple(f"{row.layers}.{n}.{row.attention}." for n in range(len(layers(model))))
    norms = [name for name, module in model.named_modules() if _is_norm(module)]
    groups = [linears(model, n) for n in range(len(layers(model)))]
    found = Residual(
        channels,
        path[id(embedding)],
        path[id(head)],
        tuple(name for attention in groups for group in attention[1::2] for name in group.values()),
        (*(tuple(group.values()) for attention in groups for group in attention[::2]), (path[id(head)],)),
        tuple(name for name in norms if not name.startswith(inside)),
        tuple(name for name in norms if name.startswith(inside)),
        head.weight is embedding.weight,
    )
    _check(model, found)
    return found


def embedding_and_head(model: PreTrainedModel) -> tuple[Any, Any]:
    """The embedding table and the head."""
    return model.get_input_embeddings(), model.get_output_embeddings()


def _is_norm(module: nn.Module) -> bool:
    known = isinstance(module, nn.Linear | nn.Embedding | Conv1D)
    return not known and [(name, p.ndim) for name, p in module.named_parameters(recurse=False)] == [("weight", 1)]


def _check(model: PreTrainedModel, found: Residual) -> None:
    """Refuse what would be cut in part."""
    readers = [name for group in found.readers for name in group]
    known = {found.embedding, *readers, *found.writers, *found.norms, *found.inner}
    for name, _ in model.named_parameters():
        if name.rpartition(".")[0] not in known:
            raise BillhookError(
                f"{model.config.model_type} cannot give up 'residual': {name} may have a part in it, and billhook does not know "
                f"which; {ELSE}"
            )
    sizes = {name: shape(linear(model, name))[1] for name in readers}
    sizes |= {name: shape(linear(model, name))[0] for name in found.writers}
    sizes |= {name: model.get_parameter(f"{name}.weight").numel() for name in found.norms}
    for name, size in sizes.items():
        if size != found.channels:
            raise BillhookError(f"{name} has {size} channels, the residual stream {found.channels}; {ELSE}")
    norms = [model.get_submodule(name) for name in (*found.norms, *found.inner)]
    if not hasattr(model.config, EPS) or not all(any(hasattr(norm, name) for name in EPS_NAMES) for norm in norms):
        raise BillhookError(f"the norms of {model.config.model_type} have no {EPS} to rescale; {ELSE}")


def writes(model: PreTrainedModel, found: Residual) -> tuple[Slot, ...]:
    """The slots that write the residual stream: the embedding table, o and down."""
    index = blocks(found.channels)
    slots = [Slot(f"{found.embedding}.weight", 1, index)]
    for name in found.writers:
        module = linear(model, name)
        slots.append(Slot(f"{name}.weight", 0 if isinstance(module, nn.Linear) else 1, index))
        slots += [Slot(f"{name}.bias", 0, index)] if module.bias is not None else []
    return tuple(slots)


def reads(model: PreTrainedModel, found: Residual) -> tuple[Slot, ...]:
    """The slots that read it: norms, q, k, v, gate, up, and the head where it is not the embedding table."""
    index = blocks(found.channels)
    slots = [Slot(f"{name}.weight", 0, index) for name in found.norms]
    for name in (name for group in found.readers for name in group):
        if name != found.head or not found.tied:
            slots.append(Slot(f"{name}.weight", 1 if isinstance(linear(model, name), nn.Linear) else 0, index))
    return tuple(slots)


def price(model: PreTrainedModel) -> tuple[int, int]:
    """Parameters that one channel owns: in the decoder layers, and in the whole model."""
    found = residual(model)
    slots = (*writes(model, found), *reads(model, found))
    each = {slot.param: model.get_parameter(slot.param).numel() // found.channels for slot in slots}
    inner = f"{row_of(model).layers}."
    return sum(count for name, count in each.items() if name.startswith(inner)), sum(each.values())


def parameters_saved(model: PreTrainedModel, channels: int, rotate: bool) -> int:
    """Parameters of the whole model that go with so many channels; a rotation gives a tied model a head of its own."""
    return price(model)[1] * channels - (parameters_added(model, channels) if rotate else 0)


def parameters_added(model: PreTrainedModel, channels: int) -> int:
    """Parameters of the head that a rotation unties, once so many channels are gone."""
    found = residual(model)
    return embedding_and_head(model)[0].num_embeddings * (found.channels - channels) if found.tied else 0


@torch.no_grad()
def zero(model: PreTrainedModel, drop: Units) -> None:
    """Zero the channels `drop` in all that writes them: the reference that `cut` must match."""
    slots = {slot.param: slot for slot in writes(model, residual(model))}
    for slot in (slots[param] for params in by_module(model, slots) for param in params):
        param = model.get_parameter(slot.param)
        param.data.index_fill_(slot.dim, slot.index[drop.cpu()].flatten().to(param.device), 0)


@torch.no_grad()
def cut(model: PreTrainedModel, kept: Kept) -> None:
    """Keep the channels `kept` alone, in place; norms, and what they norm, follow.  The config's eps does, its size does not:
    `layout.update_config` writes that.

    Raises:
        BillhookError: the model's residual dimension cannot be cut.
    """
    found = residual(model)
    before, after = found.channels, len(kept)
    grown = math.sqrt(before / after)
    feeding = set(flow(model, found).before.values())
    scaled = _scale_by_size(model, before)
    same = last_norm(model, found) if scaled and found.tied else ""  # whose head grows instead
    slots = {slot.param: slot for slot in (*writes(model, found), *reads(model, found))}
    for params in by_module(model, slots):
        for param in params:
            old, name = model.get_parameter(param), param.rpartition(".")[0]
            _put(model, param, old.detach().index_select(slots[param].dim, kept.to(old.device)), old.requires_grad)
            module: Any = model.get_submodule(name)
            if name in found.norms and name != same:
                set_gain(module, gain(module) * grown)
            elif (name in feeding and param.endswith(".weight")) or (name == found.embedding and scaled):
                _grow(module, grown)
    embedding, head = embedding_and_head(model)
    embedding.embedding_dim = after
    if scaled:
        _rescale_embedding(embedding, after)
    if found.tied:
        head.weight, head.in_features = embedding.weight, after
    eps = float(getattr(model.config, EPS)) * before / after
    for name in (*found.norms, *found.inner):
        norm = model.get_submodule(name)
        setattr(norm, _eps_name(norm), eps)
    setattr(model.config, EPS, eps)
    _update_sizes(model, before, after)


def _put(model: PreTrainedModel, name: str, value: Tensor, trains: bool) -> None:
    path, _, leaf = name.rpartition(".")
    owner: Any = model.get_submodule(path)
    setattr(owner, leaf, nn.Parameter(value, trains))
    if isinstance(owner, nn.Linear):
        owner.out_features, owner.in_features = owner.weight.shape
    elif isinstance(owner, Conv1D):
        owner.nx, owner.nf = owner.weight.shape


def _grow(module: nn.Module, factor: float) -> None:
    """Multiply all parameters of a module, in place."""
    for param in module.parameters():
        for rows in param.data.split(ROWS):
            rows.copy_(precise(rows) * factor)


def _update_sizes(model: PreTrainedModel, before: int, after: int) -> None:
    module: Any
    for module in model.modules():
        for name in SIZE_NAMES:
            if vars(module).get(name) == before:
                setattr(module, name, after)


def _eps_name(norm: nn.Module) -> str:
    return next(name for name in EPS_NAMES if hasattr(norm, name))


def offset(norm: Any) -> int:
    """1 where a norm multiplies by 1 + weight, 0 where by its weight: seen on equal inputs, which it brings to 1."""
    equal = torch.full_like(norm.weight, 1000)  # beside which eps is nothing
    return round(float((precise(norm(equal)) - precise(norm.weight)).mean()))


def gain(norm: Any) -> Tensor:
    """What a norm multiplies by, float64."""
    return precise(norm.weight.detach()) + offset(norm)


def set_gain(norm: Any, gain: Tensor) -> None:
    """Have a norm multiply by `gain`."""
    norm.weight.data = (gain - offset(norm)).to(norm.weight.dtype).to(norm.weight.device)


def _scale_by_size(model: PreTrainedModel, channels: int) -> bool:
    """Whether embeddings are multiplied by the root of their size, which the stock class computes anew when it loads."""
    scale = getattr(embedding_and_head(model)[0], "embed_scale", None)
    return scale is not None and math.isclose(float(scale), math.sqrt(channels), rel_tol=1e-2)


def _rescale_embedding(embedding: Any, channels: int) -> None:
    """As the stock class would have made it."""
    embedding.embed_scale = torch.full_like(embedding.embed_scale, math.sqrt(channels))
    if hasattr(embedding, "scalar_embed_scale"):
        embedding.scalar_embed_scale = math.sqrt(channels)


def last_norm(model: PreTrainedModel, found: Residual) -> str:
    """Path of the norm before the head."""
    return next(name for name in found.norms if not name.startswith(f"{row_of(model).layers}."))


@dataclass(frozen=True)
class Flow:
    """What enters what, as a forward pass shows it."""

    into: dict[str, str]  # reader -> the norm whose output it reads; none where it reads the stream itself
    before: dict[str, str]  # norm over heads -> the linear module whose output it norms


@torch.no_grad()
def flow(model: PreTrainedModel, found: Residual) -> Flow:
    """Which norm feeds each reader, and which linear module each norm over heads: by what is handed on, in one forward pass.

    Raises:
        BillhookError: what a norm over heads norms is no linear module's output, so that nothing could follow its eps.
    """
    came: dict[tuple[int, int], str] = {}
    into: dict[str, str] = {}
    held: list[Tensor] = []  # so that no storage is used twice

    def key(x: Tensor) -> tuple[int, int]:
        held.append(x)
        return x.data_ptr(), x.numel()

    def out(name: str) -> Any:
        return lambda _, __, output: came.update({key(output): name})

    def enters(name: str) -> Any:
        return lambda _, args: into.update({name: came[key(args[0])]} if key(args[0]) in came else {})

    readers = [name for group in found.readers for name in group]
    with ExitStack() as hooks:
        for name in (*found.norms, *(readers if found.inner else ())):
            hooks.callback(model.get_submodule(name).register_forward_hook(out(name)).remove)
        for name in (*readers, *found.inner):
            hooks.callback(model.get_submodule(name).register_forward_pre_hook(enters(name)).remove)
        model(torch.zeros(1, 2, dtype=torch.long, device=model.device), use_cache=False)
    before = {name: into.pop(name, "") for name in found.inner}
    if lost := [name for name, source in before.items() if source not in readers]:
        raise BillhookError(f"{lost[0]} norms what is no linear module's output; {ELSE}")
    return Flow({name: norm for name, norm in into.items() if norm in found.norms}, before)
