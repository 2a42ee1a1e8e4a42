"""Weights that are in memory only while something needs them: a model larger than memory, one decoder layer at a time.

An offloaded model is a skeleton on the meta device.  Its offloaded modules are the decoder layers, each as a whole, and
every other module with parameters: the embedding table, the last norm, the head.  The weights of an offloaded module
are loaded from their safetensors file when it is called, and unloaded when the call ends.  While it is `loaded` they
stay and may be edited; edited ones are swapped out to a file of their own.

    with loaded(layer):
        begin_to_load(next_layer)  # which an accelerator is given while it computes
        ...  # weights are in memory, and may be changed or replaced
    for names in by_module(model, paths):
        ...  # the paths inside one offloaded module, which is loaded
"""

import copy
import shutil
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from billhook.errors import BillhookError, first_line
from billhook.runtime import tensor_files
from billhook.runtime.ahead import Ahead
from billhook.runtime.swap_files import SwapFiles

ATTRIBUTE = "billhook_offloaded"  # attribute that marks an offloaded module
APART = ("cuda",)  # devices that compute while weights are read: on a CPU a second layer would only take memory


def check_finite(tensor: Tensor, name: str, file: Path | str) -> None:
    """Raise BillhookError if a weight, in the type it is computed with, holds NaN or infinite values."""
    if not finite(tensor):
        raise BillhookError(f"{file}: tensor {name} holds NaN or infinite values")


def finite(tensor: Tensor) -> bool:
    """Whether no entry is NaN or infinite;
    looks at minimum and maximum, for bfloat16 ten times as fast as `isfinite`."""
    return not tensor.numel() or all(bool(end.isfinite()) for end in tensor.aminmax())


@dataclass(eq=False)
class WeightStore:
    """Where every parameter of an offloaded model is stored."""

    files: dict[str, Path]  # file by the parameter's name in the model
    keys: dict[str, str]  # name in that file by the parameter's name in the model
    device: torch.device
    swap: SwapFiles = field(default_factory=SwapFiles)
    modules: list["OffloadedModule"] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.swap.stores.add(self)

    def read(self, names: list[str]) -> Iterator[tuple[str, Tensor]]:
        """Yield parameters with their names, as they are stored.

        Each is a view of a mapped file, and has to be copied before the next one is asked for.

        Raises:
            BillhookError: a parameter holds NaN or infinite values.
        """
        by_file: dict[Path, list[str]] = defaultdict(list)
        for name in names:
            by_file[self.files[name]].append(name)
        for file, group in by_file.items():
            for name in group:  # a mapping is closed after each: what was read from it counts as memory until then
                with safe_open(file, framework="pt") as shard:
                    tensor = shard.get_tensor(self.keys[name])
                    check_finite(tensor, name, file)
                    yield name, tensor
                    del tensor

    def read_from(self, file: Path, names: list[str]) -> None:
        """From now on read these parameters from another file, which has them under the names in the model."""
        self.files |= dict.fromkeys(names, file)
        self.keys |= {name: name for name in names}

    def swap_out(self, module: str, tensors: Mapping[str, Tensor]) -> None:
        """Write edited parameters of a module to a new swap file, and read them from there from now on.

        Raises:
            BillhookError: the file cannot be written.
        """
        file = self.swap.file(module)
        try:
            tensor_files.write(tensors, file)
        except OSError as error:
            file.unlink(missing_ok=True)
            raise BillhookError(
                f"cannot write weights to {file}: {first_line(error)}: free some room, or choose another output"
            ) from error
        self.swap.written.add(file)
        self.read_from(file, list(tensors))

    def places(self) -> dict[int, list[tuple[str, nn.Module, str]]]:
        """By the parameter's id, each of its places (a tied one has several): full name, module, name in the module."""
        places: dict[int, list[tuple[str, nn.Module, str]]] = defaultdict(list)
        for offloaded in self.modules:
            for name, (owner, leaf) in offloaded.owners().items():
                places[id(owner._parameters[leaf])].append((name, owner, leaf))
        return places


@dataclass
class OffloadedModule:
    """One module whose weights are loaded and unloaded together."""

    store: WeightStore
    module: nn.Module
    prefix: str
    whole: bool  # whether parameters of inner modules belong to it
    name: str  # start of its swap files' names: its first prefix
    users: int = 0  # how many calls and `loaded` contexts need its weights
    called: bool = False
    placeholders: dict[str, nn.Parameter] = field(
        default_factory=dict
    )  # meta parameters by name; reused, so that tied ones stay tied
    ahead: Ahead | None = None  # weights on their way

    def __deepcopy__(self, memo: dict[int, Any]) -> "OffloadedModule":
        return self  # `copied` makes the new ones itself

    def load(self) -> None:
        """Read the weights, unless another user has loaded them."""
        self.users += 1
        if self.users == 1:
            owners, ahead, self.ahead = self.owners(), self.ahead, None
            there = ahead is not None and ahead.files == self.files(owners)
            for name, value in ahead.arrived() if ahead and there else self.values(owners):
                owner, leaf = owners[name]
                meta = self.placeholders[name] = getattr(owner, leaf)
                owner._parameters[leaf] = nn.Parameter(value, meta.requires_grad)
                del value

    def values(self, owners: Mapping[str, tuple[nn.Module, str]]) -> Iterator[tuple[str, Tensor]]:
        """Yield the weights on the device, in the type that computes, by name."""
        for name, tensor in self.store.read(list(owners)):
            owner, leaf = owners[name]
            dtype = getattr(owner, leaf).dtype
            value = tensor.to(self.store.device, dtype, copy=True)
            if tensor.dtype != dtype:  # a narrower type may overflow
                check_finite(value, name, self.store.files[name])
            del tensor
            yield name, value

    def files(self, names: Iterable[str]) -> dict[str, Path]:
        """Where weights are now; edited ones move."""
        return {name: self.store.files[name] for name in names}

    def begin_to_load(self) -> None:
        """Bring the weights to a device that computes meanwhile, unless they are there or on their way."""
        if self.store.device.type in APART and not self.users and self.ahead is None:
            owners = self.owners()
            self.ahead = Ahead(self.store.device, self.files(owners), lambda: dict(self.values(owners)))

    def unload(self, edited: bool = False) -> None:
        """Free the weights after their last user; if they may be `edited`, changed ones are swapped out."""
        self.users -= 1
        if self.users:
            return
        now, placeholders = self.parameters(), self.placeholders
        for name, (owner, leaf) in self.owners().items():
            owner._parameters[leaf] = placeholders[name]
        self.placeholders = {}
        swap = edited and self._differs(now)
        if swap:
            self.store.swap_out(self.name, now)
        if swap or any(now[name].shape != placeholders[name].shape for name in now):
            self._share(now, placeholders)
            self.store.swap.sweep()

    def _share(self, now: Mapping[str, nn.Parameter], placeholders: Mapping[str, nn.Parameter]) -> None:
        """Give placeholders the new sizes of edited parameters, and tied parameters the new file."""
        places, store = self.store.places(), self.store
        for name, new in now.items():
            meta = placeholders[name]
            if new.shape != meta.shape:
                meta = nn.Parameter(torch.empty_like(new, device="meta"), new.requires_grad)
            for tied, owner, leaf in places[id(placeholders[name])]:
                owner._parameters[leaf] = meta
                store.files[tied], store.keys[tied] = store.files[name], store.keys[name]

    def parameters(self) -> dict[str, nn.Parameter]:
        """Its parameters as they are now, by name in the model."""
        return {name: getattr(owner, leaf) for name, (owner, leaf) in self.owners().items()}

    def owners(self) -> dict[str, tuple[nn.Module, str]]:
        """By a parameter's name in the model: the module that holds it, and its name in that."""
        owners = {}
        for path, module in self.module.named_modules() if self.whole else [("", self.module)]:
            for leaf in module._parameters:
                if module._parameters[leaf] is not None:
                    owners[".".join(part for part in (self.prefix, path, leaf) if part)] = (module, leaf)
        return owners

    def _differs(self, now: Mapping[str, Tensor]) -> bool:
        return any(
            now[name].shape != stored.shape or not torch.equal(now[name].cpu(), stored.to(now[name].dtype))
            for name, stored in self.store.read(list(now))
        )


def offload_weights(
    model: Any, files: dict[str, Path], keys: dict[str, str], device: torch.device, whole: list[str]
) -> WeightStore:
    """Offload a skeleton on the meta device, in place.

    Args:
        files: the file of every parameter, by its name in the model.
        keys: its name in that file.
        whole: paths of modules that are loaded with everything inside them.
    """
    store = WeightStore(files, keys, device)
    inside = tuple(f"{path}." for path in whole)
    for path, module in model.named_modules():
        if path in whole or (not path.startswith(inside) and any(p is not None for p in module._parameters.values())):
            _hook(OffloadedModule(store, module, path, path in whole, path))
    vars(model)["billhook_weights"] = store
    kind = type(model)  # its own `device` is the first parameter's: the meta device
    model.__class__ = type(
        kind.__name__, (kind,), {"device": property(lambda self: device), "__module__": kind.__module__}
    )
    return store


def _hook(offloaded: OffloadedModule) -> None:
    vars(offloaded.module)[ATTRIBUTE] = offloaded
    offloaded.store.modules.append(offloaded)
    offloaded.module.register_forward_pre_hook(_before)
    offloaded.module.register_forward_hook(_after, always_call=True)


def _before(module: nn.Module, _: Any) -> None:
    offloaded: OffloadedModule = vars(module)[ATTRIBUTE]
    offloaded.called = "forward" not in vars(module)  # a replaced forward needs no weights
    if offloaded.called:
        offloaded.load()


def _after(module: nn.Module, *_: Any) -> None:
    offloaded: OffloadedModule = vars(module)[ATTRIBUTE]
    if offloaded.called:
        offloaded.unload()


def copied(model: Any) -> Any:
    """A copy of a model, with weights independent of the original's.

    Of an offloaded model no weight is copied; none of its modules may be loaded.
    """
    if not is_offloaded(model):
        return copy.deepcopy(model)
    first = store_of(model)
    store = WeightStore(dict(first.files), dict(first.keys), first.device, first.swap)
    store.modules = [replace(offloaded, store=store, placeholders={}, ahead=None) for offloaded in first.modules]
    old, new = (first, *first.modules), (store, *store.modules)
    duplicate = copy.deepcopy(
        model, {id(original): replacement for original, replacement in zip(old, new, strict=True)}
    )
    modules = dict(duplicate.named_modules())
    for offloaded in store.modules:
        offloaded.module = modules[offloaded.prefix]
    return duplicate


def is_offloaded(model: Any) -> bool:
    """Whether a model's weights stay in files."""
    return "billhook_weights" in vars(model)


def store_of(model: Any) -> WeightStore:
    """Where the parameters of an offloaded model are stored."""
    return vars(model)["billhook_weights"]


def offloaded_modules(model: Any) -> list[OffloadedModule]:
    """The offloaded modules of a model, in the order of its modules."""
    return store_of(model).modules


def set_swap_folder(model: Any, folder: Path) -> None:
    """Set the folder for edited weights; it is emptied now, and removed with the model.
    No effect on a model in memory."""
    if is_offloaded(model):
        shutil.rmtree(folder, ignore_errors=True)
        swap = store_of(model).swap
        swap.folder, swap.made = folder, False


def parameters(model: Any) -> Iterator[tuple[str, Tensor]]:
    """Every parameter with its name, a tied one once, in the order of the modules.

    Those of an offloaded model are views of mapped files, unless they are loaded or stored in another dtype: reading
    them takes hardly any new memory (docs/log/scale.md).

    Raises:
        BillhookError: a parameter holds NaN or infinite values.
    """
    for name, param in model.named_parameters():
        if is_offloaded(model) and param.is_meta:
            ((_, stored),) = store_of(model).read([name])
            yield name, stored.to(store_of(model).device, param.dtype)
        else:
            yield name, param


def read_from(model: Any, file: Path, names: list[str]) -> None:
    """From now on read parameters from a file, which has them under their own names.
    No effect on a model in memory."""
    if is_offloaded(model):
        store_of(model).read_from(file, names)


def renumber(model: Any) -> None:
    """Give offloaded modules their new paths after layers were removed.  No effect on a model in memory."""
    if not is_offloaded(model):
        return
    store = store_of(model)
    now = {id(module): path for path, module in model.named_modules()}
    store.modules = [offloaded for offloaded in store.modules if id(offloaded.module) in now]
    files, keys = {}, {}
    for offloaded in store.modules:
        before, offloaded.prefix = list(offloaded.parameters()), now[id(offloaded.module)]
        for old, new in zip(before, offloaded.parameters(), strict=True):
            files[new], keys[new] = store.files[old], store.keys[old]
    store.files, store.keys = files, keys
    store.swap.sweep()


@contextmanager
def loaded(module: nn.Module, *, edits: bool = True) -> Iterator[None]:
    """A decoder layer's weights are in memory while open; edited ones are kept.  No effect on a model in memory.

    Args:
        edits: whether weights may be edited; if so they are compared with their file at the end.
    """
    offloaded: OffloadedModule | None = vars(module).get(ATTRIBUTE)
    if offloaded is None:
        yield
        return
    offloaded.load()
    try:
        yield
    except BaseException:
        offloaded.unload()
        raise
    offloaded.unload(edited=edits)


def begin_to_load(module: nn.Module) -> None:
    """Have an accelerator be given a decoder layer's weights while it computes with others; nothing on a CPU, and for a
    model in memory."""
    offloaded: OffloadedModule | None = vars(module).get(ATTRIBUTE)
    if offloaded is not None:
        offloaded.begin_to_load()


def by_module(model: Any, names: Iterable[str], *, edits: bool = True) -> Iterator[list[str]]:
    """Yield paths of parameters or modules in groups, one for each offloaded module, which is loaded meanwhile.

    A model in memory has one group.

    Args:
        edits: see `loaded`.
    """
    if not is_offloaded(model):
        yield list(names)
        return
    modules = {offloaded.prefix: offloaded.module for offloaded in offloaded_modules(model)}
    groups: dict[str, list[str]] = defaultdict(list)
    for name in names:
        parts = name.split(".")
        above = (".".join(parts[:count]) for count in range(len(parts), 0, -1))
        groups[next(path for path in above if path in modules)].append(name)
    for path, group in groups.items():
        with loaded(modules[path], edits=edits):
            yield group
