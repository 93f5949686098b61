"""A disk cache of decompositions, keyed by a hash of the weight, so that no weight is decomposed twice."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from milora_lightning.adapters.factors import as_factors, initial_factors
from milora_lightning.linalg.singular import SingularSlice
from milora_lightning.parallel.dtensor import memory_of
from milora_lightning.starts import Start, Statistics, find_start
from milora_lightning.starts.evaluation import evaluate, part_shapes
from milora_lightning.starts.methods import Pair
from milora_lightning.utils.folders import cache_folder, replaced_file
from milora_lightning.utils.messages import warn

_VERSION = 1  # part of the key: increase it when the same weight should give other triplets
_CHECKSUM = "xxh3_128"
_SMALLEST = 128  # decomposing smaller weights takes no longer than opening a file


def cached_factors(
    weight: Tensor,
    r: int,
    scaling: float = 1.0,
    init: str = "milora",
    generator: torch.Generator | None = None,
    statistics: Statistics | None = None,
) -> Pair:
    """Compute the same as :func:`milora_lightning.adapters.factors.initial_factors`, decomposing large weights once.

    Triplets or factors are stored in safetensors files, in the folder ``factors`` of the user's cache, which may be
    deleted at any time. Entries are keyed by a hash of the weight's bits and of everything else they depend on. A
    damaged entry is computed again, and a folder that cannot be written is not used, both with a warning.

    Args:
        weight: Weight of shape (out, in).
        r: Rank of the factors.
        scaling: The scale s = lora_alpha / r, positive.
        init: Name of the start. Starts that need no decomposition, such as ``"lora"``, are not cached.
        generator: CPU generator for the random choices; it advances only if something is computed.
        statistics: The layer's statistics, for starts that depend on data.

    Returns:
        ``lora_A`` (r, in) and ``lora_B`` (out, r), float32 on the weight's device, bit for bit the same whether they
        were computed or read.

    Raises:
        ValueError: If the weight is not a finite matrix, or r is out of range.
    """
    start = find_start(init)
    if start.key is None or weight.is_meta or min(weight.shape) < _SMALLEST:
        return initial_factors(weight, r, scaling, init, generator, statistics)
    path = cache_folder() / "factors" / f"{_key(weight, r, start, generator, statistics)}.safetensors"
    found = _read(path, weight.shape, r)
    if found is None:
        found = evaluate(start, weight, r, generator, statistics)
        _write(path, found)
    A, B = as_factors(found, scaling)
    return A.to(weight.device), B.to(weight.device)


def _key(weight: Tensor, r: int, start: Start, generator: torch.Generator | None, statistics: Statistics | None) -> str:
    digest = xxhash.xxh3_128(f"{_VERSION} {tuple(weight.shape)} {weight.dtype} {start.key} {r} ".encode())
    digest.update(memory_of(weight))
    if start.random:
        digest.update(memory_of(torch.get_rng_state() if generator is None else generator.get_state()))
    uses = start.registered or start.needs
    for name, tensor in statistics._asdict().items() if uses and statistics is not None else ():
        digest.update(name.encode())
        digest.update(b"" if tensor is None else memory_of(tensor))
    return digest.hexdigest()


def _named(found: SingularSlice | Pair) -> dict[str, Tensor]:
    return dict(zip(SingularSlice._fields if len(found) == 3 else ("lora_A", "lora_B"), found, strict=True))


def checksum(tensors: Iterable[Tensor]) -> str:
    """Hash the values of tensors, in order."""
    digest = xxhash.xxh3_128()
    for x in tensors:
        digest.update(memory_of(x))
    return digest.hexdigest()


def _read(path: Path, shape: torch.Size, r: int) -> SingularSlice | Pair | None:
    """Read an entry; None if there is none or it is damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            pair = "lora_A" in file.keys()  # noqa: SIM118 (a file of safetensors is no container)
            names = ("lora_A", "lora_B") if pair else SingularSlice._fields
            parts = [file.get_tensor(name) for name in names]
            found = (parts[0], parts[1]) if pair else SingularSlice(*parts)
            written = (file.metadata() or {}).get(_CHECKSUM)
        if [tuple(x.shape) for x in found] == part_shapes(len(found), shape, r) and written == checksum(found):
            return found
        problem = "its content is not what was written"
    except FileNotFoundError:
        return None
    except (SafetensorError, OSError) as error:
        problem = str(error)
    warn(f"The cached decomposition {str(path)!r} is unusable and computed anew: {problem}.", from_any_rank=True)
    return None


def _write(path: Path, found: SingularSlice | Pair) -> None:
    """Write an entry atomically."""
    try:
        with replaced_file(path) as unfinished:
            on_cpu = {name: x.cpu() for name, x in _named(found).items()}
            save_file(on_cpu, unfinished, metadata={_CHECKSUM: checksum(found)})
    except (OSError, SafetensorError) as error:
        warn(
            f"Decompositions cannot be kept in {str(path.parent)!r} ({error}): later runs compute them again. Set "
            "MILORA_CACHE to a folder that can be written.",
            from_any_rank=True,
        )
