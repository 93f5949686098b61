"""A disk cache of statistics, keyed by a hash of the data, the model's weights and everything else they depend on."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from milora_lightning.adapters.factor_cache import checksum
from milora_lightning.adapters.layer import LoRALinear
from milora_lightning.parallel.dtensor import memory_of
from milora_lightning.starts import Statistics
from milora_lightning.utils.errors import InvalidInputError
from milora_lightning.utils.folders import cache_folder, new_cache_folder
from milora_lightning.utils.messages import inform, warn

_VERSION = 1  # part of the key: increase it when the same data and weights should give other statistics
LARGEST = 8 * 2**30
"""Larger statistics (in bytes) are not cached: a pass over the data is cheaper than such files."""

_PLAIN = (str, int, float, bool)
_CONTENT, _CHECKSUM = "statistics", "xxh3_128"
Group = dict[str, Statistics]


def key_of(batches: Iterable[Any], *others: object) -> str | None:
    """Hash the numbers and texts in batches, and descriptions of everything else that statistics depend on.

    Args:
        batches: The batches.
        *others: Descriptions of everything else, with a stable ``str``.

    Returns:
        The key; None if batches hold objects whose content is unknown.

    >>> import torch
    >>> key_of([{"x": torch.zeros(2)}], "a") == key_of([{"x": torch.ones(2)}], "a")
    False
    >>> key_of([object()]) is None
    True
    """
    digest = xxhash.xxh3_128(repr((_VERSION, *others)).encode())
    for batch in batches:
        for part in _parts(batch):
            if part is None:
                return None
            digest.update(part)
    return digest.hexdigest()


def computes_with(module: nn.Module) -> str:
    """Describe what modules depend on besides parameters and buffers: classes, plain attributes, configurations."""

    def told(name: str, value: Any) -> bool:
        return name[0] != "_" and name != "training" and isinstance(value, (*_PLAIN, type(None)))

    modules = [(name, m) for name, m in module.named_modules() if not isinstance(m, LoRALinear)]  # disabled
    configs: dict[int, Any] = {id(c): c for _, m in modules if hasattr(c := getattr(m, "config", None), "to_dict")}
    return repr(
        [
            *(
                (name, type(m).__qualname__, m.extra_repr(), *((k, v) for k, v in vars(m).items() if told(k, v)))
                for name, m in modules
            ),
            *({k: v for k, v in each.to_dict().items() if k[0] != "_"} for each in configs.values()),
        ]
    )


def _parts(value: Any) -> Iterator[bytes | memoryview | None]:
    if isinstance(value, np.ndarray) and value.dtype != object:
        value = torch.from_numpy(value) if value.dtype.kind in "biuf" else value.tolist()
    if isinstance(value, Tensor):
        yield f"{tuple(value.shape)} {value.dtype} ".encode()
        yield memory_of(value.cpu())
    elif isinstance(value, Mapping):
        for key, each in value.items():
            yield f"{key}: ".encode()
            yield from _parts(each)
    elif isinstance(value, (list, tuple)):
        yield f"{len(value)} of ".encode()
        for each in value:
            yield from _parts(each)
    else:  # for other objects, str may omit numbers or include an address
        yield repr(value).encode() if isinstance(value, (*_PLAIN, bytes, type(None))) else None


def with_cache(
    key: str | None, layers: Collection[str], collect: Callable[[], Iterator[Group]], expected: int, ranks: int = 1
) -> Iterator[Group]:
    """Yield the statistics cached under a key or, if there are none, collect, cache and yield them.

    Args:
        key: The key, the same on all ranks; None for no caching.
        layers: Names of the layers, each of which must have an entry.
        collect: Collects statistics, group by group.
        expected: Their size in bytes. If it exceeds :data:`LARGEST`, they are not cached.
        ranks: Number of ranks, which must all call this; they read the cache only if all of them can.
    """
    if key is None:
        yield from collect()
        return
    folder = cache_folder() / "statistics" / key
    found = _read(folder, layers) if folder.is_dir() else None
    if _all(found is not None, ranks):
        yield from found or ()
        return
    writes = expected <= LARGEST and os.environ.get("LOCAL_RANK", "0") == "0"
    if expected > LARGEST:
        inform(
            f"Statistics of these layers take {expected / 2**30:.0f} GB, which is too much to keep: the next run goes "
            "over the data again."
        )
    if not writes or folder.is_dir():  # a damaged entry stays until the user deletes it, as the warning says
        yield from collect()
        return
    with _Keeping(folder) as keeping:
        for group in collect():
            keeping.add(group)
            yield group
            del group  # free the memory for the next one


class _Keeping:
    """A new entry, which appears once all groups are written. If it cannot be written, there is a warning."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._stack, self._number = folder, ExitStack(), 0
        self._unfinished: Path | None = None

    def __enter__(self) -> _Keeping:
        try:
            self._unfinished = self._stack.enter_context(new_cache_folder(self._folder))
        except OSError as error:
            self._say(error)
        return self

    def add(self, group: Group) -> None:
        """Write a group."""
        if self._unfinished is None:
            return
        try:
            _write(self._unfinished / f"{self._number}.safetensors", group)
            self._number += 1
        except (OSError, SafetensorError) as error:
            self._unfinished = None
            self._stack.__exit__(type(error), error, error.__traceback__)
            self._say(error)

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        try:
            self._stack.__exit__(kind, error, trace)
        except OSError as problem:
            if problem is error:
                raise
            self._say(problem)

    def _say(self, error: Exception) -> None:
        warn(
            f"Statistics cannot be kept in {str(self._folder.parent)!r} ({error}): later runs collect them again. Set "
            "MILORA_CACHE to a folder that can be written.",
            from_any_rank=True,
        )


def _all(flag: bool, ranks: int) -> bool:
    if ranks == 1:
        return flag
    flags: list[Any] = [None] * ranks
    dist.all_gather_object(flags, flag)
    return all(flags)


def _write(path: Path, group: Group) -> None:
    once = {id(each): each for entry in group.values() for each in entry if each is not None}
    numbers = {identity: str(number) for number, identity in enumerate(once)}
    tensors = {numbers[identity]: each.cpu().contiguous() for identity, each in once.items()}
    named = {name: [None if e is None else numbers[id(e)] for e in entry] for name, entry in group.items()}
    save_file(tensors, path, metadata={_CONTENT: json.dumps(named), _CHECKSUM: checksum(tensors.values())})


def _read(folder: Path, layers: Collection[str]) -> list[Group] | None:
    """Read an entry; None if it is damaged or incomplete."""
    try:
        groups = [_read_group(path) for path in sorted(folder.glob("*.safetensors"), key=lambda p: int(p.stem))]
        if missing := set(layers).difference(*groups):  # files that are old may have been cleaned up
            raise InvalidInputError(f"there are none of layer {min(missing)!r}")
        return groups
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        warn(
            f"The cached statistics in {str(folder)!r} are unusable, and collected anew ({error}): delete this folder.",
            from_any_rank=True,
        )
        return None


def _read_group(path: Path) -> Group:
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        tensors = {name: file.get_tensor(name) for name in sorted(file.keys(), key=int)}
    if metadata.get(_CHECKSUM) != checksum(tensors.values()):
        raise InvalidInputError(f"the content of {path.name} is not what was written")
    named = json.loads(metadata[_CONTENT])
    return {name: Statistics(*(e if e is None else tensors[e] for e in entry)) for name, entry in named.items()}
