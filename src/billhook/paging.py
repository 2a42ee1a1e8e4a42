"""Weights that are in memory only while something needs them: a model larger than memory, one decoder layer at a time.

A paged model is a skeleton on the meta device.  Its pages are the decoder layers, each whole, and what else holds parameters,
the embedding table, the last norm, the head.  A page comes from its safetensors file when its module is called and goes when the
call ends; while it is `held` it stays, may be edited, and goes to a file of its own if it was.

    with held(layer):
        ...  # weights are there, and may be changed or replaced
"""

import shutil
import tempfile
import weakref
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from billhook import tensorfile
from billhook.errors import BillhookError

PAGE = "billhook_page"  # attribute of a module that is one


def finite(tensor: Tensor) -> bool:
    """Whether no entry is NaN or infinite; by the extremes, which of bfloat16 takes a tenth of what `isfinite` does."""
    return not tensor.numel() or all(bool(end.isfinite()) for end in tensor.aminmax())


@dataclass
class Pager:
    """Where every parameter of a paged model lies."""

    files: dict[str, Path]  # by the parameter's name in the model
    keys: dict[str, str]  # its name in that file
    device: torch.device
    folder: Path | None = None  # for pages that were edited; None: a temporary one
    pages: list["Page"] = field(default_factory=list)

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
                    if not finite(tensor):
                        raise BillhookError(f"{file}: tensor {name} holds NaN or infinite values")
                    yield name, tensor
                    del tensor

    def place(self, file: Path, names: list[str]) -> None:
        """Have parameters come from another file, where they have their own names."""
        self.files |= dict.fromkeys(names, file)
        self.keys |= {name: name for name in names}

    def spill(self, page: str, tensors: Mapping[str, Tensor]) -> None:
        """Keep edited parameters in a file of their own, from now on theirs."""
        if self.folder is None:
            self.folder = Path(tempfile.mkdtemp(prefix="billhook-pages-"))
            weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)
        file = self.folder / f"{page}.safetensors"
        work = file.with_suffix(".partial")
        tensorfile.write(tensors, work)
        work.replace(file)
        self.place(file, list(tensors))


@dataclass
class Page:
    """One module whose weights come and go together."""

    pager: Pager
    module: nn.Module
    prefix: str
    whole: bool  # with all that is in it, or its own parameters alone
    name: str  # of its own file: what its prefix was at first
    users: int = 0
    called: bool = False
    away: dict[str, nn.Parameter] = field(default_factory=dict)  # what stood for each, so that tied ones stay one

    def __deepcopy__(self, memo: dict[int, Any]) -> "Page":
        return self  # a copied module is no page; its hooks keep this one where it is

    def bring(self) -> None:
        self.users += 1
        if self.users == 1:
            owners = self._owners()
            for name, tensor in self.pager.read(list(owners)):
                owner, leaf = owners[name]
                meta = self.away[name] = getattr(owner, leaf)
                own = tensor.to(self.pager.device, meta.dtype, copy=True)
                owner._parameters[leaf] = nn.Parameter(own, meta.requires_grad)
                del tensor

    def leave(self, edited: bool = False) -> None:
        self.users -= 1
        if self.users:
            return
        owners = self._owners()
        now = self.parameters()
        if edited and self._differs(now):
            self.pager.spill(self.name, now)
        for name, (owner, leaf) in owners.items():
            old, meta = now[name], self.away[name]
            if old.shape != meta.shape:
                meta = nn.Parameter(torch.empty_like(old, device="meta"), old.requires_grad)
            owner._parameters[leaf] = meta
        self.away.clear()

    def parameters(self) -> dict[str, nn.Parameter]:
        """By name in the model, as they are now."""
        return {name: getattr(owner, leaf) for name, (owner, leaf) in self._owners().items()}

    def _owners(self) -> dict[str, tuple[nn.Module, str]]:
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


def paged(model: Any, files: dict[str, Path], keys: dict[str, str], device: torch.device, whole: list[str]) -> Pager:
    """Page a skeleton on the meta device, in place.

    Args:
        files: where each parameter lies; keys: under which name.
        whole: paths of the modules that are pages with all that is in them.
    """
    pager = Pager(files, keys, device)
    inside = tuple(f"{path}." for path in whole)
    for path, module in model.named_modules():
        if path in whole or (not path.startswith(inside) and any(p is not None for p in module._parameters.values())):
            _hook(Page(pager, module, path, path in whole, path))
    vars(model)["billhook_pager"] = pager
    kind = type(model)  # whose own `device` looks at the first parameter
    model.__class__ = type(
        kind.__name__, (kind,), {"device": property(lambda self: device), "__module__": kind.__module__}
    )
    return pager


def _hook(page: Page) -> None:
    def before(module: nn.Module, _: Any) -> None:
        page.called = "forward" not in vars(module)  # one that is passed by needs no weights
        if page.called:
            page.bring()

    def after(module: nn.Module, *_: Any) -> None:
        if page.called:
            page.leave()

    vars(page.module)[PAGE] = page
    page.pager.pages.append(page)
    page.module.register_forward_pre_hook(before)
    page.module.register_forward_hook(after, always_call=True)


def is_paged(model: Any) -> bool:
    """Whether a model's weights come and go."""
    return "billhook_pager" in vars(model)


def pages_of(model: Any) -> list[Page]:
    """The pages of a paged model, in the order of its modules."""
    return vars(model)["billhook_pager"].pages


def parameters(model: Any) -> Iterator[tuple[str, Tensor]]:
    """Every parameter and its name, a tied one once, in the order of the modules; a paged model's are brought a page at a time."""
    if not is_paged(model):
        yield from model.named_parameters()
        return
    seen: set[int] = set()
    for page in pages_of(model):
        own = {name for name, one in page.parameters().items() if id(one) not in seen}
        seen |= {id(one) for one in page.parameters().values()}
        if own:
            with held(page.module, edits=False):
                yield from ((name, one) for name, one in page.parameters().items() if name in own)


def place(model: Any, file: Path, names: list[str]) -> None:
    """Have parameters of a paged model come from a file that has them under their own names; nothing to do for one in memory."""
    if is_paged(model):
        vars(model)["billhook_pager"].place(file, names)


def renumber(model: Any) -> None:
    """Have the pages of a model follow where their modules are now, once some are gone; nothing to do for one in memory."""
    if not is_paged(model):
        return
    pager: Pager = vars(model)["billhook_pager"]
    now = {id(module): path for path, module in model.named_modules()}
    pager.pages = [page for page in pager.pages if id(page.module) in now]
    files, keys = {}, {}
    for page in pager.pages:
        before, page.prefix = list(page.parameters()), now[id(page.module)]
        for old, new in zip(before, page.parameters(), strict=True):
            files[new], keys[new] = pager.files[old], pager.keys[old]
    pager.files, pager.keys = files, keys


@contextmanager
def held(module: nn.Module, *, edits: bool = True) -> Iterator[None]:
    """A decoder layer's weights are in memory while open, and kept if they were edited; nothing to do for a model in memory.

    Args:
        edits: whether they may be, which to find out they are compared with their file.
    """
    page: Page | None = vars(module).get(PAGE)
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
