"""What a GPU would be asked for: operations launched, bytes moved, bytes kept for backward, and waits of the host.

Counted on tensors of the meta device, which compute nothing: so it takes no GPU, and is the same on every machine.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AttentionInterface

ATTENTION = "counted"
"""Name of an implementation of attention whose own operations do not count."""

ALLOCATIONS = ("empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided")
NOT_LAUNCHED = {*ALLOCATIONS, "detach", "lift_fresh", "_unsafe_view", "set_", "device", "view", "alias"}
"""Operations that no kernel belongs to, besides views."""

WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "unique_dim", "_unique2"}
"""Operations whose result, or its shape, the host has to know before it goes on."""


class Cost(TorchDispatchMode):
    """Counts operations that a GPU would be asked for within a context.

    Attributes:
        operations: How often each was launched.
        bytes: What all of them read and write.
        waits: How often each would make the host wait.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operations: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()
        self.bytes = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, and count it."""
        result = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        if name in WAITS or (name.startswith(("index", "_index")) and _has_mask(args)):
            self.waits[name] += 1
        if is_launched(function):
            self.operations[name] += 1
            self.bytes += traffic(function, args, kwargs, result)
        return result

    @property
    def launches(self) -> int:
        """How many operations were launched."""
        return self.operations.total()


def is_launched(function: Any) -> bool:
    """Whether an operation computes something."""
    return function.overloadpacket.__name__ not in NOT_LAUNCHED and not _is_view(function)


def traffic(function: Any, args: Any, kwargs: Any, result: Any) -> int:
    """Return the bytes that an operation reads and writes."""
    inputs, outputs = ([t for t in tree_leaves(x) if isinstance(t, Tensor)] for x in ((args, kwargs), result))
    written = {id(t) for t in outputs}
    reads_result = not _overwrites(function.overloadpacket.__name__, kwargs)
    read = {id(t): _size(t) for t in inputs if id(t) not in written or reads_result}
    return sum(read.values()) + sum({id(t): _size(t) for t in outputs}.values())


def _is_view(function: Any) -> bool:
    aliases = [result.alias_info for result in function._schema.returns]
    return any(alias is not None and not alias.is_write for alias in aliases)


def _overwrites(name: str, kwargs: Any) -> bool:
    """Whether what is written to is not read before."""
    return name in ("copy_", "fill_", "zero_") or "out" in (kwargs or {}) or (kwargs or {}).get("beta") == 0


def _has_mask(args: Any) -> bool:
    return any(isinstance(t, Tensor) and t.dtype in (torch.bool, torch.uint8) for t in tree_leaves(args[1:]))


def _size(tensor: Tensor) -> int:
    """Bytes of a tensor; entries that are the same in memory count once."""
    entries = 1
    for length, stride in zip(tensor.shape, tensor.stride(), strict=True):
        entries *= length if stride else 1
    return entries * tensor.element_size()


class _Allocations(TorchDispatchMode):
    """Notes every tensor's memory without keeping it."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, and note its results."""
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                self.storages[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        return result


def kept_for_backward(run: Callable[[], Tensor], besides: Iterable[Tensor] = ()) -> int:
    """Return the bytes that are kept after something has run, for the backward of its result; given tensors aside."""
    known = {t.untyped_storage()._cdata for t in besides}
    with _Allocations() as allocations:
        result = run()
    known.add(result.untyped_storage()._cdata)
    return sum(
        size for key, (storage, size) in allocations.storages.items() if key not in known and not storage.expired()
    )


class _Attention(torch.autograd.Function):
    """Attention that computes nothing, and keeps what FlashAttention does."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        output = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, output, q.new_empty(q.shape[:-1], dtype=torch.float32))
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        return tuple(map(torch.empty_like, ctx.saved_tensors[:3]))


def _attend(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, **options: Any) -> tuple[Tensor, None]:
    return _Attention.apply(q, k, v).transpose(1, 2).contiguous(), None  # type: ignore[no-untyped-call]


AttentionInterface.register(ATTENTION, _attend)
