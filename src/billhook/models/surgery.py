"""Cutting: remove units or layers for good, or silence units in place.  Cached sizes follow the tensors."""

from collections import OrderedDict
from collections.abc import Collection, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from billhook.errors import ModelError
from billhook.models import patterns
from billhook.models.axes import Axis, owners
from billhook.models.families import PER_LAYER_KEYS, as_output, attention_module, layers, linear, mixture, row_of
from billhook.models.modeling_per_layer import LowRank, holder_of, narrow_heads
from billhook.models.multimodal import within
from billhook.runtime.offload import renumber
from billhook.tensors import Bias, Expand, Reduce, Units

PLAIN_LAYERS = "mlp_only_layers"  # config key: numbers of the layers without a mixture of experts
PLAIN_STEP = "decoder_sparse_step"  # config key: every so many layers have a mixture
UNCACHED = ("mlp", "moe")  # types of layer that are an FFN alone, and so have nothing in a cache
SIZES = ("in_features", "out_features", "nx", "nf")  # attributes of linear modules: the sizes of their weight


def remove(model: PreTrainedModel, axis: Axis, drop: Units) -> None:
    """Physically remove the units `drop` of `axis`, in place.  `axis` is stale afterwards;
    the config stays as it is."""
    for slot, owner, leaf in owners(model, axis):
        old = getattr(owner, leaf)
        keep = torch.ones(old.shape[slot.dim], dtype=torch.bool)
        keep[slot.index[drop.cpu()].flatten()] = False
        kept = keep.nonzero().flatten().to(old.device)
        new = old.detach().index_select(slot.dim, kept)
        setattr(owner, leaf, nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new)
        if isinstance(owner, nn.Linear):
            owner.out_features, owner.in_features = owner.weight.shape
        elif isinstance(owner, Conv1D):
            owner.nx, owner.nf = owner.weight.shape
    if axis.modules:
        modules = model.get_submodule(axis.modules)
        assert isinstance(modules, nn.ModuleList)
        for number in reversed(drop.tolist()):
            del modules[number]
    for counter, per_unit in axis.counters:
        owner, leaf = _holder(model, counter)
        setattr(owner, leaf, int(getattr(owner, leaf) - per_unit * len(drop)))
    if axis.kind == "value" and len(drop):
        narrow_heads(attention_module(model, axis.layer), row_of(model))


def _holder(model: PreTrainedModel, counter: str) -> tuple[Any, str]:
    """The object that holds a cached size, and the attribute's name."""
    module, _, leaf = counter.rpartition(".")
    above, _, name = module.rpartition(".")
    return (
        holder_of(model.get_submodule(above), f"{name}.{leaf}")
        if name == "config"
        else (model.get_submodule(module), leaf)
    )


@contextmanager
def without(model: PreTrainedModel, dropped: Iterable[tuple[Axis, Tensor]], gone: Iterable[int] = ()) -> Iterator[None]:
    """While open, these units (by number) are physically removed and the layers `gone` are skipped.  All units of an
    axis together are silenced.

    Afterwards every tensor is the same object as before, and every size is restored.  No weight is written to, and only
    narrowed ones are copied: trying a cut costs less than the cut saves in a forward pass.
    """
    with ExitStack() as undo:
        for n in gone:
            module = layers(model)[n]
            module.forward = lambda hidden_states, *_, **__: as_output(model, hidden_states)
            undo.callback(delattr, module, "forward")
        for axis, units in dropped:
            if len(units) == axis.units and not axis.modules:  # no family's code runs without any
                undo.enter_context(silenced(model, [(axis, units)]))
                continue
            for _, owner, leaf in owners(model, axis):
                for name in (leaf, *(size for size in SIZES if hasattr(owner, size))):
                    undo.callback(setattr, owner, name, getattr(owner, name))
            for counter, _ in axis.counters:
                owner, leaf = _holder(model, counter)
                undo.callback(setattr, owner, leaf, getattr(owner, leaf))
            if axis.modules:
                modules = model.get_submodule(axis.modules)
                undo.callback(setattr, modules, "_modules", dict(modules._modules))
            remove(model, axis, units)
        yield


@contextmanager
def silenced(
    model: PreTrainedModel, dropped: Iterable[tuple[Axis, Tensor]], gone: Iterable[int] = ()
) -> Iterator[None]:
    """While open, these units (by number; all of an axis, too) are zero where they are read, and the layers `gone` are
    skipped: the logits of a model without them."""
    with ExitStack() as undo:
        undo.enter_context(without(model, [], gone))
        for axis, units in dropped:
            weight = model.get_parameter(axis.reader.param).data
            undo.callback(weight.copy_, weight.clone())
            zero(model, axis, units)
        yield


@contextmanager
def with_weight(model: PreTrainedModel, param: str, weight: Tensor) -> Iterator[None]:
    """While open, the model has another weight in place of one parameter."""
    path, _, leaf = param.rpartition(".")
    owner = model.get_submodule(path)
    before = getattr(owner, leaf)
    setattr(owner, leaf, nn.Parameter(weight, before.requires_grad))
    try:
        yield
    finally:
        setattr(owner, leaf, before)


def factor(model: PreTrainedModel, path: str, expand: Expand, reduce: Reduce, bias: Bias) -> None:
    """Put two thin modules in the place of a linear one: x becomes expand (reduce x) + bias."""
    learns, thin = linear(model, path).weight.requires_grad, OrderedDict[str, nn.Module]()
    for name, weight in (("reduce", reduce), ("expand", expand)):
        module = thin[name] = nn.Linear(*weight.shape[::-1], bias=False, device="meta")
        module.weight = nn.Parameter(weight, learns)
    module.bias = nn.Parameter(bias, learns)
    model.set_submodule(path, LowRank(thin))


def drop_layers(model: PreTrainedModel, numbers: Collection[int]) -> None:
    """Remove whole decoder layers, in place; the others are renumbered, and the config's per-layer lists follow.

    Raises:
        BillhookError: no layer would be left, or there is no such layer.
    """
    modules = layers(model)
    total = len(modules)
    if unknown := sorted(set(numbers) - set(range(total))):
        raise ModelError(f"there is no layer {unknown[0]}: the model has {total}, numbered from 0")
    kept = [n for n in range(total) if n not in set(numbers)]
    plain = [new for new, n in enumerate(kept) if mixture(model, n) is None]
    if not kept:
        raise ModelError(f"all {total} layers would go: keep at least one")
    values = _followed(model, kept)
    _check_kinds_stay(model, kept, values)
    _check_needed_stay(model, kept)
    for n in sorted(set(numbers), reverse=True):
        del modules[n]
    for new, layer in enumerate(modules):
        inner: Any
        for inner in layer.modules():  # the KV cache is indexed by it: a stale number is silently wrong
            if hasattr(inner, "layer_idx"):
                inner.layer_idx = new
    _cut_parts(model, kept, total)
    _say_plain(model.config, plain)
    model.config.num_hidden_layers = len(kept)
    for key, value in values.items():
        setattr(model.config, key, value)
    renumber(model)


def _followed(model: PreTrainedModel, kept: list[int]) -> dict[str, Any]:
    """Keys of the config that say what each layer is, with what they say of those that stay."""
    if row_of(model).derived:
        values: dict[str, Any] = patterns.kept(model.config, kept)
    else:
        said = {key: getattr(model.config, key, None) for key in PER_LAYER_KEYS}
        values = {key: [value[n] for n in kept] for key, value in said.items() if value is not None}
    return values | patterns.counted(model.config, kept)


def _cut_parts(model: PreTrainedModel, kept: list[int], total: int) -> None:
    """Of parameters with a part for each layer, take those of the layers that go."""
    for name, dim in row_of(model).by_layer:
        path, _, leaf = name.rpartition(".")
        try:
            owner: Any = model.get_submodule(path)
        except AttributeError:  # a setting of its config leaves it out
            continue
        old = getattr(owner, leaf)
        parts = torch.arange(old.shape[dim]).view(total, -1)[kept].flatten().to(old.device)
        setattr(owner, leaf, nn.Parameter(old.detach().index_select(dim, parts), old.requires_grad))
        if isinstance(owner, nn.Linear):
            owner.out_features, owner.in_features = owner.weight.shape
        elif isinstance(owner, nn.Embedding):
            owner.embedding_dim = owner.weight.shape[1]


def _check_kinds_stay(model: PreTrainedModel, kept: list[int], values: dict[str, Any]) -> None:
    """Refuse to drop all layers of one kind: caches of a hybrid ask a layer of each for its length.

    Refuse, too, what the config says otherwise: gemma4's makes the last layer one of full attention.
    """
    config, types = model.config, getattr(model.config, "layer_types", None)
    if not row_of(model).only_ffns or not types:
        return
    if lost := sorted(set(types) - {types[n] for n in kept} - set(UNCACHED)):
        raise ModelError(f"all layers of type {lost[0]} would go: keep at least one of each type")
    named = {config.attribute_map.get(key, key): value for key, value in values.items()}
    said = type(config).from_dict(config.to_dict() | named | {"num_hidden_layers": len(kept)}).layer_types
    if changed := [n for n, kind in zip(kept, said, strict=True) if kind != types[n]]:
        raise ModelError(
            f"layer {changed[0]} is of type {types[changed[0]]}, which its config does not let it be once the others are "
            "gone: keep another one in its place"
        )


def _check_needed_stay(model: PreTrainedModel, kept: list[int]) -> None:
    """Refuse to drop a layer that image features are added to by its number, or whose keys and values others take."""
    stands = within(model)
    if stands and (lost := sorted(set(range(stands.kept_layers)) - set(kept))):
        raise ModelError(
            f"layer {lost[0]} would go: {stands.model_type} adds image features to the first {stands.kept_layers} layers, "
            "which have to stay"
        )
    if lost := sorted(set(patterns.shared_from(model.config)) - set(kept)):
        raise ModelError(f"layer {lost[0]} would go: later layers take its keys and values, so that it has to stay")


def _say_plain(config: Any, plain: list[int]) -> None:
    """Name the layers without a mixture of experts in the config: its rule by layer number no longer holds."""
    if hasattr(config, PLAIN_LAYERS):
        setattr(config, PLAIN_LAYERS, plain)
        setattr(config, PLAIN_STEP, 1)
    for key in patterns.DENSE_FIRST:
        if hasattr(config, key):
            setattr(config, key, len(plain))


def zero(model: PreTrainedModel, axis: Axis, drop: Units) -> None:
    """Silence the units `drop` by zeroing their columns of the reader: the reference that `remove` must match."""
    slot = axis.reader
    weight = model.get_parameter(slot.param).data
    weight.index_fill_(slot.dim, slot.index[drop.cpu()].flatten().to(weight.device), 0)


def cast(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Cast the parameters alone: rotary frequencies stay float32, as after a stock load."""
    for param in model.parameters():
        param.data = param.data.to(dtype)
    model.config.dtype = dtype
