"""A second device without a GPU: tensors on "second" compute on the CPU, and what a GPU would refuse is refused.

Operations on tensors of both devices raise, and so do draws there by a generator of the CPU. Counted are the operations
that a GPU would launch a kernel for, and what the host would wait for: values read from the device, results whose size
depends on values, and copies between the devices that block. Each wait is attributed to the code that asked for it.

The device stays registered, and torch takes it for the accelerator of the process. So it belongs into a process of its
own: tests/test_second_device.py starts tests/second_device.py in one.
"""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor
from torch.utils import backend_registration

from milora_lightning.adapters import linear_layers, quantization, targets

NAME = "second"
PACKAGE = str(Path(linear_layers.__file__).parents[1])

# What reads values from the device, so that the host waits until all work before is done.
READS = {"_local_scalar_dense", "equal", "is_nonzero", "nonzero", "masked_select", "_unique2", "unique_consecutive"}
READS |= {"unique_dim", "bincount", "repeat_interleave"}
# What launches nothing although it is no view.
FREE = {"detach", "empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "_unsafe_view"}
FREE |= {"lift_fresh", "alias", "_reshape_alias", "set_"}


@dataclass
class Count:
    """What has happened on the device.

    Attributes:
        launches: Operations that a GPU would launch a kernel for, by name.
        waits: Where the host would have waited, as (file and line, operation).
    """

    launches: Counter[str] = field(default_factory=Counter)
    waits: list[tuple[str, str]] = field(default_factory=list)

    @property
    def own_waits(self) -> list[tuple[str, str]]:
        """Those that code of this package has asked for."""
        return [wait for wait in self.waits if wait[0].startswith(PACKAGE)]


_counts: list[Count] = []


@contextmanager
def counting() -> Iterator[Count]:
    """Count what happens on the device within this context, backward passes included."""
    count = Count()
    _counts.append(count)
    try:
        yield count
    finally:
        _counts.remove(count)


class OnDevice(Tensor):
    """A tensor on the second device, which holds the numbers as a tensor on the CPU."""

    __slots__ = ("held",)  # not in __dict__, which accelerate passes on to parameters that it makes of others
    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor, **_: Any) -> OnDevice:
        if held.is_meta:
            return torch.nn.Parameter(held)  # type: ignore[return-value]
        layout = {"strides": held.stride(), "storage_offset": held.storage_offset()}
        tensor = Tensor._make_wrapper_subclass(cls, held.size(), dtype=held.dtype, device=DEVICE, **layout)
        tensor.held = held
        return tensor

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch.inference_mode(False):  # views of what is no inference tensor are none, either
            return run(function, args, kwargs or {})

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    def tolist(self) -> Any:
        _waits("tolist")
        return self.held.tolist()

    def numpy(self, *_: Any, **__: Any) -> Any:
        raise TypeError(f"can't convert {DEVICE} device type tensor to numpy. Use Tensor.cpu() first.")

    __array__ = numpy

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        copied = OnDevice(self.held.detach().clone()).requires_grad_(self.requires_grad)
        if isinstance(self, torch.nn.Parameter):
            copied = torch.nn.Parameter(copied, self.requires_grad)
        memo[id(self)] = copied
        return copied

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.held.detach().__reduce_ex__(protocol)  # checkpoints are read to the CPU first

    def __repr__(self, *_: Any, **__: Any) -> str:
        return f"OnDevice({self.held!r})"


def run(function: Any, args: Any, kwargs: Any) -> Any:
    """Run an operation as the device would, on the CPU."""
    name = function._schema.name.removeprefix("aten::")
    leaves = [*_leaves(args), *_leaves(kwargs.values())]
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    here = [t for t in tensors if isinstance(t, OnDevice)]
    elsewhere = [t for t in tensors if not isinstance(t, OnDevice)]
    asked = next((leaf for leaf in leaves if isinstance(leaf, torch.device)), None)
    on_device = bool(here) if asked is None else asked.type == NAME
    copies = name in ("copy_", "_to_copy")
    _check(name, here, elsewhere, leaves, on_device, copies)
    if _counts:
        _count(name, function, args, kwargs, here, elsewhere, on_device, copies)
    plain = [_held(value) for value in args]
    if name == "histc" and not plain[0].is_floating_point():  # which GPUs can do
        plain[0] = plain[0].float()
    result = function(*plain, **{key: _held(value) for key, value in kwargs.items()})
    if name == "histc":
        result = result.to(args[0].dtype)
    known: dict[int, Tensor] = {id(t.held): t for t in here} | {id(t): t for t in elsewhere}

    def wrapped(x: Any) -> Any:
        if isinstance(x, (list, tuple)):
            return type(x)(map(wrapped, x))
        if not isinstance(x, Tensor):
            return x
        return known[id(x)] if id(x) in known else OnDevice(x) if on_device else x

    return wrapped(result)


def _leaves(values: Iterable[Any]) -> Iterator[Any]:
    for value in values:
        if isinstance(value, (list, tuple)):
            yield from _leaves(value)
        else:
            yield value


def _held(value: Any) -> Any:
    """Return what an operation on the CPU takes in place of an argument."""
    if isinstance(value, (list, tuple)):
        return type(value)(map(_held, value))
    if isinstance(value, OnDevice):
        return value.held
    return torch.device("cpu") if isinstance(value, torch.device) else value


def _check(name: str, here: Any, elsewhere: Any, leaves: Any, on_device: bool, copies: bool) -> None:
    generator = next((leaf for leaf in leaves if isinstance(leaf, torch.Generator)), None)
    if on_device and generator is not None:
        raise RuntimeError(f"Expected a '{NAME}' device type for generator but found 'cpu' (aten.{name})")
    others = [t for t in elsewhere if t.dim() > 0]  # a scalar on the CPU is passed on as a number
    if name.startswith(("index", "_index", "_unsafe_index")):
        others = [t for t in others if t.is_floating_point()]  # indices may be on the CPU, and are copied
    if here and others and not copies:
        shapes = [tuple(t.shape) for t in (*here, *others)]
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but found at least two devices, {DEVICE} and cpu! "
            f"(aten.{name} {shapes})"
        )


def _count(
    name: str, function: Any, args: Any, kwargs: Any, here: Any, elsewhere: Any, on_device: bool, copies: bool
) -> None:
    if copies and kwargs.get("non_blocking", args[2] if name == "copy_" and len(args) > 2 else False):
        between = False
    elif name == "copy_":
        between = isinstance(args[0], OnDevice) != isinstance(args[1], OnDevice) and args[1].dim() > 0
    else:
        between = name == "_to_copy" and on_device != bool(here)
    flat = list(_leaves(args[1:])) if name.startswith(("index", "_index", "_unsafe_index")) and here else []
    indices = [t for t in flat if isinstance(t, Tensor) and not t.is_floating_point()]
    masks = any(t.dtype in (torch.bool, torch.uint8) for t in indices)
    copied = any(not isinstance(t, OnDevice) and t.dim() > 0 for t in indices)
    sized = name == "repeat_interleave" and kwargs.get("output_size") is not None
    if between or masks or copied or (here and name in READS and not sized):
        _waits(name)
    view = any(r.alias_info is not None and not r.alias_info.is_write for r in function._schema.returns)
    if on_device and not view and name not in FREE:
        for count in _counts:
            count.launches[name] += 1


def _waits(name: str) -> None:
    """Note a wait, and whose it is: that of the innermost code which is neither torch's nor this file's."""
    if not _counts:
        return
    frames = [f for f in traceback.extract_stack() if "/torch/" not in f.filename and f.filename != __file__]
    place = f"{frames[-1].filename}:{frames[-1].lineno} {frames[-1].line}" if frames else "backward"
    for count in _counts:
        count.waits.append((place, name))


class SecondDevice(Accelerator):
    """What Lightning asks of a device."""

    def setup_device(self, device: torch.device) -> None: ...

    def teardown(self) -> None: ...

    def get_device_stats(self, device: Any) -> dict[str, Any]:
        return {}

    @staticmethod
    def parse_devices(devices: Any) -> Any:
        return devices

    @staticmethod
    def get_parallel_devices(devices: Any) -> list[torch.device]:
        return [DEVICE]

    @staticmethod
    def auto_device_count() -> int:
        return 1

    @staticmethod
    def is_available() -> bool:
        return True

    @staticmethod
    def name() -> str:
        return NAME


def strategy() -> SingleDeviceStrategy:
    """A strategy for Lightning's Trainer that runs on the device."""
    return SingleDeviceStrategy(DEVICE, accelerator=SecondDevice())


class _Backend(backend_registration._DummyBackendModule):
    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    def get_rng_state(self, *_: Any) -> Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: Tensor, *_: Any) -> None:
        torch.set_rng_state(state)

    def current_device(self) -> int:
        return 0

    def device_count(self) -> int:
        return 1

    def is_initialized(self) -> bool:
        return True

    def is_available(self) -> bool:
        return True

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None: ...

    class device:  # noqa: N801  (torch's name)
        def __init__(self, *_: Any) -> None: ...

        def __enter__(self) -> None: ...

        def __exit__(self, *_: Any) -> None: ...


def _empty(
    size: Any, *, dtype: Any = None, layout: Any = None, device: Any = None, pin_memory: Any = None, **o: Any
) -> Any:
    return OnDevice(torch.empty(size, dtype=dtype, device="cpu", **{k: v for k, v in o.items() if v is not None}))


def _empty_strided(
    size: Any, stride: Any, *, dtype: Any = None, layout: Any = None, device: Any = None, pin_memory: Any = None
) -> Any:
    return OnDevice(torch.empty_strided(size, stride, dtype=dtype, device="cpu"))


def _copy_from(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
    if not non_blocking and isinstance(source, OnDevice) != isinstance(target, OnDevice):
        _waits("_copy_from")  # where torch leaves Python's dispatch out, as in torch.tensor
    into, values = (t.held if isinstance(t, OnDevice) else t for t in (target, source))
    into.copy_(values)
    return target


backend_registration._setup_privateuseone_for_python_backend(NAME, backend_module=_Backend())
DEVICE = torch.device(NAME, 0)
_autocast = torch.library.Library("_", "IMPL")
_autocast.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
_aten = torch.library.Library("aten", "IMPL")
_aten.impl("empty.memory_format", _empty, "PrivateUse1")
_aten.impl("empty_strided", _empty_strided, "PrivateUse1")
_aten.impl("_copy_from", _copy_from, "PrivateUse1")
# Tensors of the device are plain to the package, as those of CUDA are; only here are they a class of their own.
for _module in (linear_layers, quantization, targets):
    _module.PLAIN_TENSORS = (Tensor, torch.nn.Parameter, OnDevice)  # type: ignore[attr-defined]
