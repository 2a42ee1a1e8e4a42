"""Weights that are in memory only while something needs them: a model larger than memory, one decoder layer at a time.

A paged model is a skeleton on the meta device.  Its pages are the decoder layers, each whole, and what else holds parameters,
the embedding table, the last norm, the head.  A page comes from its safetensors file when its module is called and goes when the
call ends; while it is `held` it stays, may be edited, and goes to a file of its own if it was.

    with held(layer):
        ...  # weights are there, and may be changed or replaced
    for names in by_page(model, every):
        ...  # those of one page, which is held
"""

import copy
import shutil
import tempfile
import weakref
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from billhook.errors import BillhookError, first_line
from billhook.runtime import tensor_files

ATTRIBUTE = "billhook_page"  # attribute of a module that is one


def check_finite(tensor: Tensor, name: str, file: Path | str) -> None:
    """Raise BillhookError if a weight of a file holds NaN or infinite values, as it is computed with."""
    if not finite(tensor):
        raise BillhookError(f"{file}: tensor {name} holds NaN or infinite values")


def finite(tensor: Tensor) -> bool:
    """Whether no entry is NaN or infinite; by the extremes, which of bfloat16 takes a tenth of what `isfinite` does."""
    return not tensor.numel() or all(bool(end.isfinite()) for end in tensor.aminmax())


class SwapFiles:
    """Files of pages that were edited, of a model and its twins: one that none of them reads any more goes, all when they do."""

    def __init__(self) -> None:
        self.pagers: weakref.WeakSet[WeightStore] = weakref.WeakSet()
        self.folder: Path | None = None  # None: a temporary one
        self.made, self.numbers, self.written = False, count(), set[Path]()

    def file(self, page: str) -> Path:
        """A new one: what a twin reads is not written over."""
        if not self.made:
            self.folder = self.folder or Path(tempfile.mkdtemp(prefix="billhook-pages-"))
            self.folder.mkdir(parents=True, exist_ok=True)
            weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)
            self.made = True
        assert self.folder is not None
        return self.folder / f"{page}-{next(self.numbers)}.safetensors"

    def sweep(self) -> None:
        needed = {file for pager in self.pagers for file in pager.files.values()}
        for file in self.written - needed:
            file.unlink(missing_ok=True)
        self.written &= needed


@dataclass(eq=False)
class WeightStore:
    """Where every parameter of a paged model lies."""

    files: dict[str, Path]  # by the parameter's name in the model
    keys: dict[str, str]  # its name in that file
    device: torch.device
    spilled: SwapFiles = field(default_factory=SwapFiles)
    pages: list["OffloadedModule"] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.spilled.pagers.add(self)

    def read(self, names: list[str]) -> Iterator[tuple[str, Tensor]]:
        """Parameters by name, as they are stored, each to be copied before the next is asked for: they lie in a mapped file.

        Raises:
            BillhookError: one holds NaN or infinite values.
        """
        by_file: dict[Path, list[str]] = defaultdict(list)
        for name in names:
            by_file[self.files[name]].append(name)
        for file, here in by_file.items():
            for name in here:  # opened for each: what was touched of a mapping counts as memory until it is closed
                with safe_open(file, framework="pt") as shard:
                    tensor = shard.get_tensor(self.keys[name])
                    check_finite(tensor, name, file)
                    yield name, tensor
                    del tensor

    def read_from(self, file: Path, names: list[str]) -> None:
        """Have parameters come from another file, where they have their own names."""
        self.files |= dict.fromkeys(names, file)
        self.keys |= {name: name for name in names}

    def spill(self, page: str, tensors: Mapping[str, Tensor]) -> None:
        """Keep edited parameters in a file of their own, from now on theirs.

        Raises:
            BillhookError: it cannot be written.
        """
        file = self.spilled.file(page)
        try:
            tensor_files.write(tensors, file)
        except OSError as error:
            file.unlink(missing_ok=True)
            raise BillhookError(
                f"cannot write weights to {file}: {first_line(error)}: free some room, or choose another output"
            ) from error
        self.spilled.written.add(file)
        self.read_from(file, list(tensors))

    def standing(self) -> dict[int, list[tuple[str, nn.Module, str]]]:
        """By parameter everywhere that it stands, a tied one more than once: its name, the module, its name there."""
        found: dict[int, list[tuple[str, nn.Module, str]]] = defaultdict(list)
        for page in self.pages:
            for name, (owner, leaf) in page.owners().items():
                found[id(owner._parameters[leaf])].append((name, owner, leaf))
        return found


@dataclass
class OffloadedModule:
    """One module whose weights come and go together."""

    pager: WeightStore
    module: nn.Module
    prefix: str
    whole: bool  # with all that is in it, or its own parameters alone
    name: str  # of its own file: what its prefix was at first
    users: int = 0
    called: bool = False
    away: dict[str, nn.Parameter] = field(default_factory=dict)  # what stood for each, so that tied ones stay one

    def __deepcopy__(self, memo: dict[int, Any]) -> "OffloadedModule":
        return self  # a copied module is no page; its hooks keep this one where it is

    def bring(self) -> None:
        self.users += 1
        if self.users == 1:
            owners = self.owners()
            for name, tensor in self.pager.read(list(owners)):
                owner, leaf = owners[name]
                meta = self.away[name] = getattr(owner, leaf)
                own = tensor.to(self.pager.device, meta.dtype, copy=True)
                if tensor.dtype != meta.dtype:  # which may hold less
                    check_finite(own, name, self.pager.files[name])
                owner._parameters[leaf] = nn.Parameter(own, meta.requires_grad)
                del tensor

    def leave(self, edited: bool = False) -> None:
        self.users -= 1
        if self.users:
            return
        now, away = self.parameters(), self.away
        for name, (owner, leaf) in self.owners().items():
            owner._parameters[leaf] = away[name]
        self.away = {}
        spilled = edited and self._differs(now)
        if spilled:
            self.pager.spill(self.name, now)
        if spilled or any(now[name].shape != away[name].shape for name in now):
            self._share(now, away)
            self.pager.spilled.sweep()

    def _share(self, now: Mapping[str, nn.Parameter], away: Mapping[str, nn.Parameter]) -> None:
        """Have what stands for edited parameters follow their sizes, and what is tied to them their files."""
        standing, pager = self.pager.standing(), self.pager
        for name, new in now.items():
            meta = away[name]
            if new.shape != meta.shape:
                meta = nn.Parameter(torch.empty_like(new, device="meta"), new.requires_grad)
            for other, owner, leaf in standing[id(away[name])]:
                owner._parameters[leaf] = meta
                pager.files[other], pager.keys[other] = pager.files[name], pager.keys[name]

    def parameters(self) -> dict[str, nn.Parameter]:
        """By name in the model, as they are now."""
        return {name: getattr(owner, leaf) for name, (owner, leaf) in self.owners().items()}

    def owners(self) -> dict[str, tuple[nn.Module, str]]:
        """By the name of each parameter in the model: the module that holds it, and its name there."""
        found = {}
        for path, module in self.module.named_modules() if self.whole else [("", self.module)]:
            for leaf in module._parameters:
                if module._parameters[leaf] is not None:
                    found[".".join(part for part in (self.prefix, path, leaf) if part)] = (module, leaf)
        return found

    def _differs(self, now: Mapping[str, Tensor]) -> bool:
        return any(
            now[name].shape != stored.shape or not torch.equal(now[name].cpu(), stored.to(now[name].dtype))
            for name, stored in self.pager.read(list(now))
        )


def offload_weights(
    model: Any, files: dict[str, Path], keys: dict[str, str], device: torch.device, whole: list[str]
) -> WeightStore:
    """Page a skeleton on the meta device, in place.

    Args:
        files: where each parameter lies; keys: under which name.
        whole: paths of the modules that are pages with all that is in them.
    """
    pager = WeightStore(files, keys, device)
    inside = tuple(f"{path}." for path in whole)
    for path, module in model.named_modules():
        if path in whole or (not path.startswith(inside) and any(p is not None for p in module._parameters.values())):
            _hook(OffloadedModule(pager, module, path, path in whole, path))
    vars(model)["billhook_pager"] = pager
    kind = type(model)  # whose own `device` looks at the first parameter
    model.__class__ = type(
        kind.__name__, (kind,), {"device": property(lambda self: device), "__module__": kind.__module__}
    )
    return pager


def _hook(page: OffloadedModule) -> None:
    vars(page.module)[ATTRIBUTE] = page
    page.pager.pages.append(page)
    page.module.register_forward_pre_hook(_before)
    page.module.register_forward_hook(_after, always_call=True)


def _before(module: nn.Module, _: Any) -> None:
    page: OffloadedModule = vars(module)[ATTRIBUTE]
    page.called = "forward" not in vars(module)  # one that is passed by needs no weights
    if page.called:
        page.bring()


def _after(module: nn.Module, *_: Any) -> None:
    page: OffloadedModule = vars(module)[ATTRIBUTE]
    if page.called:
        page.leave()


def copied(model: Any) -> Any:
    """A copy of a model, which keeps its weights whatever becomes of the first one's; of a paged one, none of whose pages is
    held, no weight is copied."""
    if not is_offloaded(model):
        return copy.deepcopy(model)
    first = store_of(model)
    pager = WeightStore(dict(first.files), dict(first.keys), first.device, first.spilled)
    pager.pages = [replace(page, pager=pager, away={}) for page in first.pages]
    old, new = (first, *first.pages), (pager, *pager.pages)
    found = copy.deepcopy(model, {id(one): own for one, own in zip(old, new, strict=True)})
    modules = dict(found.named_modules())
    for page in pager.pages:
        page.module = modules[page.prefix]
    return found


def is_offloaded(model: Any) -> bool:
    """Whether a model's weights come and go."""
    return "billhook_pager" in vars(model)


def store_of(model: Any) -> WeightStore:
    """What knows where the parameters of a paged model lie."""
    return vars(model)["billhook_pager"]


def offloaded_modules(model: Any) -> list[OffloadedModule]:
    """The pages of a paged model, in the order of its modules."""
    return store_of(model).pages


def set_swap_folder(model: Any, folder: Path) -> None:
    """Have pages of a paged model that are edited go to a folder of their own, which is emptied and goes with the model."""
    if is_offloaded(model):
        shutil.rmtree(folder, ignore_errors=True)
        spilled = store_of(model).spilled
        spilled.folder, spilled.made = folder, False


def parameters(model: Any) -> Iterator[tuple[str, Tensor]]:
    """Every parameter and its name, a tied one once, in the order of the modules.

    Those of a paged model lie in their mapped files, but for what is held or has another dtype there: to read them takes less than
    new memory (docs/LOG.md, "Larger than memory").

    Raises:
        BillhookError: one holds NaN or infinite values.
    """
    for name, one in model.named_parameters():
        if is_offloaded(model) and one.is_meta:
            ((_, stored),) = store_of(model).read([name])
            yield name, stored.to(store_of(model).device, one.dtype)
        else:
            yield name, one


def place(model: Any, file: Path, names: list[str]) -> None:
    """Have parameters of a paged model come from a file that has them under their own names; nothing to do for one in memory."""
    if is_offloaded(model):
        store_of(model).read_from(file, names)


def renumber(model: Any) -> None:
    """Have the pages of a model follow where their modules are now, once some are gone; nothing to do for one in memory."""
    if not is_offloaded(model):
        return
    pager = store_of(model)
    now = {id(module): path for path, module in model.named_modules()}
    pager.pages = [page for page in pager.pages if id(page.module) in now]
    files, keys = {}, {}
    for page in pager.pages:
        before, page.prefix = list(page.parameters()), now[id(page.module)]
        for old, new in zip(before, page.parameters(), strict=True):
            files[new], keys[new] = pager.files[old], pager.keys[old]
    pager.files, pager.keys = files, keys
    pager.spilled.sweep()


@contextmanager
def loaded(module: nn.Module, *, edits: bool = True) -> Iterator[None]:
    """A decoder layer's weights are in memory while open, and kept if they were edited; nothing to do for a model in memory.

    Args:
        edits: whether they may be, which to find out they are compared with their file.
    """
    page: OffloadedModule | None = vars(module).get(ATTRIBUTE)
    if page is None:
        yield
        return
    page.bring()
    try:
        yield
    except BaseException:
        page.leave()
        raise
    page.leave(edited=edits)


def by_module(model: Any, names: Iterable[str], *, edits: bool = True) -> Iterator[list[str]]:
    """Paths of parameters or modules, those of one page at a time, which is held; of a model in memory all at once.

    Args:
        edits: as of `held`.
    """
    if not is_offloaded(model):
        yield list(names)
        return
    pages = {page.prefix: page.module for page in offloaded_modules(model)}
    found: dict[str, list[str]] = defaultdict(list)
    for name in names:
        parts = name.split(".")
        above = (".".join(parts[:count]) for count in range(len(parts), 0, -1))
        found[next(path for path in above if path in pages)].append(name)
    for path, here in found.items():
        with loaded(pages[path], edits=edits):
            yield here
