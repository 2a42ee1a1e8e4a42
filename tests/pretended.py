"""A pretended accelerator: tensors say that they are on it, their data is in main memory.

    with pretended.device() as waits:               # as an Apple GPU: float64 is refused
    with pretended.device(float64=True) as waits:   # as an NVIDIA GPU
        model = tiny.model("llama").to(pretended.DEVICE)

What is asked of PyTorch with such a tensor is computed by the CPU, once it is seen that all tensors are on one device.
As on real ones, numbers of no dimension and indices may come from the CPU, and copies may cross.

`waits` counts where the CPU waits for the device, by the function of billhook that asks: values that come to the CPU
(`.item()`, `.tolist()`, `.cpu()`, a tensor as a truth value) and results whose size depends on values (`nonzero`, an
index of truth values).
"""

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.backend_registration import (
    _DummyBackendModule,
    _DummyDeviceGuard,
    _DummyPrivateUse1Hook,
    _setup_privateuseone_for_python_backend,
)

aten: Any = torch.ops.aten
NAME = "applelike"
_open = [False]
_float64 = [False]
_waits: Counter[str] = Counter()


class _Module(_DummyBackendModule):
    def is_available(self) -> bool:
        return _open[0]

    def device_count(self) -> int:
        return int(_open[0])

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.float16, torch.bfloat16]

    def synchronize(self, device: object = None) -> None: ...


class _Hook(_DummyPrivateUse1Hook):
    def is_available(self) -> bool:
        return _open[0]


# not MPS by name: PyTorch would ask its driver
_setup_privateuseone_for_python_backend(NAME, _Module(), _Hook(), _DummyDeviceGuard())
DEVICE = torch.device(NAME, 0)
CROSSING = (aten._to_copy, aten.copy_, aten.copy)
TAKE_ANY_INDEX = (aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_, aten._unsafe_index)
INSTEAD = {aten._scaled_dot_product_attention_math_for_mps: aten._scaled_dot_product_attention_math}
WAITED_FOR = (
    *(aten._local_scalar_dense, aten.item, aten.is_nonzero, aten.equal, aten.nonzero, aten.masked_select),
    *(aten._unique2, aten.unique_dim, aten.unique_consecutive, aten.bincount),
)
DOUBLES = (torch.float64, torch.complex128)
REFUSAL = "Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64. Please use float32 instead."


class Pretended(Tensor):
    """A tensor on the device; `inner` has its data."""

    inner: Tensor

    @staticmethod
    def __new__(cls, real: Tensor) -> "Pretended":
        if _refused(real.dtype):
            raise TypeError(REFUSAL)
        with torch.inference_mode(False):  # or a parameter cannot be given it
            made = Tensor._make_wrapper_subclass(
                cls,
                real.shape,
                strides=real.stride(),
                storage_offset=real.storage_offset(),
                dtype=real.dtype,
                device=DEVICE,
                requires_grad=False,
            )
        made.inner = real
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _compute(func, args, kwargs or {})

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def tolist(self) -> Any:
        _wait()
        return self.inner.tolist()

    def numpy(self, *, force: bool = False) -> Any:
        raise TypeError(
            "can't convert mps:0 device type tensor to numpy. Use Tensor.cpu() to copy the tensor to host memory first."
        )

    def __getitem__(self, index: Any) -> Tensor:  # or a list becomes a tensor past all that sees it
        return super().__getitem__(torch.tensor(index) if isinstance(index, list) else index)

    def __matmul__(self, other: Tensor) -> Tensor:  # or the product is squeezed in place, which no wrapper follows
        return torch.mv(other.mT, self) if self.ndim == 1 and other.ndim == 2 else super().__matmul__(other)

    def __tensor_flatten__(self) -> tuple[list[str], None]:  # or modules cannot be moved
        return ["inner"], None

    @staticmethod
    def __tensor_unflatten__(parts: dict[str, Tensor], *_: Any) -> "Pretended":
        return Pretended(parts["inner"])

    def _set_data(self, value: "Pretended") -> None:
        assert isinstance(value, Pretended)
        Tensor.data.__set__(self, value)  # type: ignore[attr-defined]
        self.inner = value.inner

    data = property(lambda self: self.detach(), _set_data)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        if id(self) in memo:
            return memo[id(self)]
        copied: Tensor = Pretended(self.inner.detach().clone())
        if isinstance(self, torch.nn.Parameter):
            copied = torch.nn.Parameter(copied, self.requires_grad)
        memo[id(self)] = copied
        return copied


class _Mode(TorchDispatchMode):
    """Sees what is made on the device, too, where no tensor on it takes part."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._can_decompose():  # what inference mode leaves whole: its parts come back here
            with self:
                return func.decompose(*args, **(kwargs or {}))
        if not types and not (kwargs and "device" in kwargs):  # most of what is asked, and Python is slow
            return func(*args, **(kwargs or {}))
        return _compute(func, args, kwargs or {})


def _compute(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    given = list(_tensors((args, kwargs)))
    there = any(isinstance(one, Pretended) for one in given)
    asked = kwargs.get("device")
    to_it = asked is not None and torch.device(asked).type == DEVICE.type
    if not there and not to_it:
        return func(*args, **kwargs)
    packet = func.overloadpacket
    if there and packet not in CROSSING:
        _check_one_device(func, packet, args, kwargs)
    if _refused(kwargs.get("dtype")) or (
        packet is aten.copy_ and isinstance(given[1], Pretended) and _refused(given[0].dtype)
    ):
        raise TypeError(REFUSAL)  # on the way to the CPU, too: the real one may convert before it copies
    on_it = to_it if asked is not None else isinstance(given[0], Pretended) or packet not in CROSSING
    if there and _waited_for(packet, args, kwargs, on_it):
        _wait()
    wrapped = {id(one.inner): one for one in given if isinstance(one, Pretended)}
    real_args, real_kwargs = _map(_real, (args, kwargs))
    if asked is not None:
        real_kwargs["device"] = torch.device("cpu")
    found = INSTEAD.get(packet, func)(*real_args, **real_kwargs)
    return _map(lambda one: _wrap(one, wrapped) if isinstance(one, Tensor) else one, found) if on_it else found


def _refused(dtype: torch.dtype | None) -> bool:
    return dtype in DOUBLES and not _float64[0]


def _waited_for(packet: Any, args: Any, kwargs: dict[str, Any], on_it: bool) -> bool:
    """Whether the CPU waits for a result: its values, or its size."""
    if packet in TAKE_ANY_INDEX:
        return any(isinstance(one, Pretended) and one.dtype in (torch.bool, torch.uint8) for one in args[1])
    if packet in CROSSING:
        return not on_it and isinstance(args[0 if packet is aten._to_copy else 1], Pretended)
    return packet in WAITED_FOR


def _wait() -> None:
    """Count for the line of billhook that is nearest."""
    frame: Any = sys._getframe(1)
    while frame is not None and "/billhook/" not in frame.f_code.co_filename:
        frame = frame.f_back
    name = frame.f_code.co_filename.rpartition("/billhook/")[2] if frame else "elsewhere"
    _waits[f"{name} {frame.f_code.co_name}" if frame else name] += 1


def _map(change: Callable[[Any], Any], one: Any) -> Any:
    """What PyTorch's own walk does, which takes longer than all the arithmetic of a tiny model."""
    if isinstance(one, (list, tuple)):
        return type(one)([_map(change, part) for part in one])
    return {key: _map(change, part) for key, part in one.items()} if isinstance(one, dict) else change(one)


def _tensors(one: Any) -> Iterator[Tensor]:
    if isinstance(one, Tensor):
        yield one
    elif isinstance(one, (list, tuple, dict)):
        for part in one.values() if isinstance(one, dict) else one:
            yield from _tensors(part)


def _real(one: Any) -> Any:
    return one.inner if isinstance(one, Pretended) else one


def _wrap(one: Tensor, wrapped: dict[int, Pretended]) -> Tensor:
    return wrapped[id(one)] if id(one) in wrapped else Pretended(one)


def _check_one_device(func: Any, packet: Any, args: Any, kwargs: Any) -> None:
    looked_at = args[:1] + args[2:] if packet in TAKE_ANY_INDEX else args
    for one in _tensors((looked_at, kwargs)):
        if not isinstance(one, Pretended) and one.ndim:
            raise RuntimeError(
                f"Expected all tensors to be on the same device, but found at least two devices, mps:0 and cpu! ({func})"
            )


@contextmanager
def device(float64: bool = False) -> Iterator[Counter[str]]:
    """While open, `DEVICE` can be used; what it gives counts where the CPU waited for it."""
    _open[0], _float64[0] = True, float64
    _waits.clear()
    torch._C._set_only_lift_cpu_tensors(True)  # or what `torch.tensor` makes is moved past all that sees it
    try:
        with (
            _Mode(),
            mock.patch.object(torch.accelerator, "synchronize", lambda *_: None),  # all is done at once
            mock.patch.object(Tensor, "pin_memory", lambda self, *_: self),
        ):
            yield _waits
    finally:
        _open[0] = _float64[0] = False
        torch._C._set_only_lift_cpu_tensors(False)
