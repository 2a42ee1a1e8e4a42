"""The residual dimension: all its slots in a model, and cutting them to the same channels.

One channel of the residual stream is a column of the embedding table, a weight of every norm, a row (and a bias) of
every writer (o and down), and a column of every reader (q, k, v, gate, up and the head).  It runs through the whole
model, so it is not an Axis, which belongs to one layer; its slots are the same Slots.

    y = g x / sqrt(S/d + e),  S = sum of x_j^2 over the d channels (RMSNorm)

If the dropped channels are zero, S is the sum over the d' that stay, and a norm over those gives the same y with

    e' = e d/d',  g' = g sqrt(d/d'),  for  S/d' + e' = (S/d + e) d/d'

A config has one e for all norms.  Norms over query or key heads keep their size n: they give the same output if their
input grows by sqrt(d/d'), too: S/n d/d' + e' = (S/n + e) d/d'.  If a family scales embeddings by sqrt(d), their weights
grow by sqrt(d/d'); for a head tied to them, the final norm's g then does not grow.
"""

import math
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from billhook.errors import ModelError
from billhook.models.axes import Slot, blocks
from billhook.models.families import layers, linear, linears, row_of, shape
from billhook.models.multimodal import within
from billhook.runtime.offload import by_module
from billhook.tensors import Kept, Units, precise

ROWS = 8192  # rows of a weight that are in float64 at a time
EPS = "rms_norm_eps"  # config key of the eps that all norms share
EPS_NAMES = ("variance_epsilon", "eps")  # names of it in norm modules
SIZE_NAMES = ("hidden_size", "embed_dim")  # names of the residual dimension in other modules
ELSE = "use a method that cuts inside the layers, or whole ones: fasp, layerchop"


@dataclass(frozen=True)
class Residual:
    """Paths of the modules that have the residual dimension."""

    channels: int
    embedding: str
    head: str
    writers: tuple[str, ...]  # o and down of every layer
    readers: tuple[tuple[str, ...], ...]  # in groups that share an input, in the order in which they compute
    norms: tuple[str, ...]
    inner: tuple[str, ...]  # norms over heads, which do not have the residual dimension
    tied: bool


def residual(model: PreTrainedModel) -> Residual:
    """The modules of a model that have the residual dimension.

    Raises:
        BillhookError: the dimension cannot be cut: a norm subtracts the mean, or a parameter has an unknown role.
    """
    kind = model.config.model_type
    if stands := within(model):
        raise ModelError(
            f"{stands.model_type} cannot give up 'residual': what reads its images writes into the same channels; {ELSE}"
        )
    if row_of(model).experts:
        raise ModelError(
            f"{kind} cannot give up 'residual' yet: its routers and experts have a part in it; use --method experts, "
            "or fasp"
        )
    if row_of(model).only_ffns:
        raise ModelError(f"{kind} cannot give up 'residual': its row is of FFNs and whole layers alone; {ELSE}")
    if any(isinstance(module, nn.LayerNorm) for module in model.modules()):
        raise ModelError(
            f"{kind} cannot give up 'residual': its norms subtract the mean of all channels (LayerNorm), and no stock "
            f"class of the family has the RMSNorms that SliceGPT puts in their place; {ELSE}"
        )
    path = {id(module): name for name, module in model.named_modules()}
    embedding, head = embedding_and_head(model)
    channels, row = embedding.weight.shape[1], row_of(model)
    inside = tuple(f"{row.layers}.{n}.{row.attention}." for n in range(len(layers(model))))
    norms = [name for name, module in model.named_modules() if _is_norm(module)]
    groups = [linears(model, n) for n in range(len(layers(model)))]
    result = Residual(
        channels,
        path[id(embedding)],
        path[id(head)],
        tuple(name for attention in groups for group in attention[1::2] for name in group.values()),
        (*(tuple(group.values()) for attention in groups for group in attention[::2]), (path[id(head)],)),
        tuple(name for name in norms if not name.startswith(inside)),
        tuple(name for name in norms if name.startswith(inside)),
        head.weight is embedding.weight,
    )
    _check(model, result)
    return result


def embedding_and_head(model: PreTrainedModel) -> tuple[Any, Any]:
    """The embedding table and the head."""
    return model.get_input_embeddings(), model.get_output_embeddings()


def _is_norm(module: nn.Module) -> bool:
    projection = isinstance(module, nn.Linear | nn.Embedding | Conv1D)
    return not projection and [(name, p.ndim) for name, p in module.named_parameters(recurse=False)] == [("weight", 1)]


def _check(model: PreTrainedModel, places: Residual) -> None:
    """Refuse a model of which only a part would be cut."""
    readers = [name for group in places.readers for name in group]
    covered = {places.embedding, *readers, *places.writers, *places.norms, *places.inner}
    for name, _ in model.named_parameters():
        if name.rpartition(".")[0] not in covered:
            raise ModelError(
                f"{model.config.model_type} cannot give up 'residual': {name} may have a part in it, and billhook does "
                f"not know which; {ELSE}"
            )
    sizes = {name: shape(linear(model, name))[1] for name in readers}
    sizes |= {name: shape(linear(model, name))[0] for name in places.writers}
    sizes |= {name: model.get_parameter(f"{name}.weight").numel() for name in places.norms}
    for name, size in sizes.items():
        if size != places.channels:
            raise ModelError(f"{name} has {size} channels, the residual stream {places.channels}; {ELSE}")
    norms = [model.get_submodule(name) for name in (*places.norms, *places.inner)]
    if not hasattr(model.config, EPS) or not all(any(hasattr(norm, name) for name in EPS_NAMES) for norm in norms):
        raise ModelError(f"the norms of {model.config.model_type} have no {EPS} to rescale; {ELSE}")


def writes(model: PreTrainedModel, places: Residual) -> tuple[Slot, ...]:
    """The slots that write the residual stream: the embedding table, o and down."""
    index = blocks(places.channels)
    slots = [Slot(f"{places.embedding}.weight", 1, index)]
    for name in places.writers:
        module = linear(model, name)
        slots.append(Slot(f"{name}.weight", 0 if isinstance(module, nn.Linear) else 1, index))
        slots += [Slot(f"{name}.bias", 0, index)] if module.bias is not None else []
    return tuple(slots)


def reads(model: PreTrainedModel, places: Residual) -> tuple[Slot, ...]:
    """The slots that read the residual stream: norms, q, k, v, gate, up, and the head unless it is tied."""
    index = blocks(places.channels)
    slots = [Slot(f"{name}.weight", 0, index) for name in places.norms]
    for name in (name for group in places.readers for name in group):
        if name != places.head or not places.tied:
            slots.append(Slot(f"{name}.weight", 1 if isinstance(linear(model, name), nn.Linear) else 0, index))
    return tuple(slots)


def price(model: PreTrainedModel) -> tuple[int, int]:
    """Parameters that one channel owns: in the decoder layers, and in the whole model."""
    places = residual(model)
    slots = (*writes(model, places), *reads(model, places))
    sizes = {slot.param: model.get_parameter(slot.param).numel() // places.channels for slot in slots}
    inner = f"{row_of(model).layers}."
    return sum(count for name, count in sizes.items() if name.startswith(inner)), sum(sizes.values())


def parameters_saved(model: PreTrainedModel, channels: int, rotate: bool) -> int:
    """Parameters of the whole model that are saved with so many channels;
    a rotation unties the head, which costs some."""
    return price(model)[1] * channels - (parameters_added(model, channels) if rotate else 0)


def parameters_added(model: PreTrainedModel, channels: int) -> int:
    """Parameters of the head that a rotation unties, after so many channels are dropped; 0 if it is untied already."""
    places = residual(model)
    return embedding_and_head(model)[0].num_embeddings * (places.channels - channels) if places.tied else 0


@torch.no_grad()
def zero(model: PreTrainedModel, drop: Units) -> None:
    """Zero the channels `drop` in all their writers: the reference that `cut` must match."""
    slots = {slot.param: slot for slot in writes(model, residual(model))}
    for slot in (slots[param] for params in by_module(model, slots) for param in params):
        param = model.get_parameter(slot.param)
        param.data.index_fill_(slot.dim, slot.index[drop.cpu()].flatten().to(param.device), 0)


@torch.no_grad()
def cut(model: PreTrainedModel, kept: Kept) -> None:
    """Keep only the channels `kept`, in place, with norms and their inputs rescaled.

    The config's eps is updated, its sizes are not: see `layout.update_config`.

    Raises:
        BillhookError: the model's residual dimension cannot be cut.
    """
    places = residual(model)
    before, after = places.channels, len(kept)
    grown = math.sqrt(before / after)
    feeding = set(flow(model, places).before.values())
    scaled = _scale_by_size(model, before)
    unscaled_norm = last_norm(model, places) if scaled and places.tied else ""  # the tied head grows in its place
    slots = {slot.param: slot for slot in (*writes(model, places), *reads(model, places))}
    for params in by_module(model, slots):
        for param in params:
            old, name = model.get_parameter(param), param.rpartition(".")[0]
            _put(model, param, old.detach().index_select(slots[param].dim, kept.to(old.device)), old.requires_grad)
            module: Any = model.get_submodule(name)
            if name in places.norms and name != unscaled_norm:
                set_gain(module, gain(module) * grown)
            elif (name in feeding and param.endswith(".weight")) or (name == places.embedding and scaled):
                _grow(module, grown)
    embedding, head = embedding_and_head(model)
    embedding.embedding_dim = after
    if scaled:
        _rescale_embedding(embedding, after)
    if places.tied:
        head.weight, head.in_features = embedding.weight, after
    eps = float(getattr(model.config, EPS)) * before / after
    for name in (*places.norms, *places.inner):
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
    """1 if a norm multiplies by 1 + weight, 0 if by its weight; found by equal inputs, which the norm turns into 1."""
    equal = torch.full_like(norm.weight, 1000)  # so large that eps makes no difference
    return round(float((precise(norm(equal)) - precise(norm.weight)).mean()))


def gain(norm: Any) -> Tensor:
    """The factors that a norm multiplies by, float64."""
    return precise(norm.weight.detach()) + offset(norm)


def set_gain(norm: Any, gain: Tensor) -> None:
    """Set the factors that a norm multiplies by."""
    norm.weight.data = (gain - offset(norm)).to(norm.weight.dtype).to(norm.weight.device)


def _scale_by_size(model: PreTrainedModel, channels: int) -> bool:
    """Whether embeddings are multiplied by the root of their size; the stock class computes that anew when it loads."""
    scale = getattr(embedding_and_head(model)[0], "embed_scale", None)
    return scale is not None and math.isclose(float(scale), math.sqrt(channels), rel_tol=1e-2)


def _rescale_embedding(embedding: Any, channels: int) -> None:
    """Set the scale to that which the stock class would compute for the new size."""
    embedding.embed_scale = torch.full_like(embedding.embed_scale, math.sqrt(channels))
    if hasattr(embedding, "scalar_embed_scale"):
        embedding.scalar_embed_scale = math.sqrt(channels)


def last_norm(model: PreTrainedModel, places: Residual) -> str:
    """Path of the norm before the head."""
    return next(name for name in places.norms if not name.startswith(f"{row_of(model).layers}."))


@dataclass(frozen=True)
class Flow:
    """Which modules follow which, as a forward pass shows."""

    into: dict[str, str]  # reader -> the norm before it; a reader of the stream itself is left out
    before: dict[str, str]  # norm over heads -> the linear module before it


@torch.no_grad()
def flow(model: PreTrainedModel, places: Residual) -> Flow:
    """Which norm comes before each reader, and which linear module before each norm over heads.

    One forward pass shows it: a tensor that one module returns and another one receives.

    Raises:
        BillhookError: the input of a norm over heads is no linear module's output, so that no weight can be rescaled
            for its eps.
    """
    source_of: dict[tuple[int, int], str] = {}
    into: dict[str, str] = {}
    alive: list[Tensor] = []  # references, so that no memory is reused

    def key(x: Tensor) -> tuple[int, int]:
        alive.append(x)
        return x.data_ptr(), x.numel()

    def record_output(name: str) -> Any:
        return lambda _, __, output: source_of.update({key(output): name})

    def record_input(name: str) -> Any:
        return lambda _, args: into.update({name: source_of[key(args[0])]} if key(args[0]) in source_of else {})

    readers = [name for group in places.readers for name in group]
    with ExitStack() as hooks:
        for name in (*places.norms, *(readers if places.inner else ())):
            hooks.callback(model.get_submodule(name).register_forward_hook(record_output(name)).remove)
        for name in (*readers, *places.inner):
            hooks.callback(model.get_submodule(name).register_forward_pre_hook(record_input(name)).remove)
        model(torch.zeros(1, 2, dtype=torch.long, device=model.device), use_cache=False)
    before = {name: into.pop(name, "") for name in places.inner}
    if lost := [name for name, source in before.items() if source not in readers]:
        raise ModelError(f"the input of {lost[0]} is no linear module's output; {ELSE}")
    return Flow({name: norm for name, norm in into.items() if norm in places.norms}, before)
