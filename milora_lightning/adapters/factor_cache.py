"""A disk cache of decompositions, by a hash of the weight, so that no weight is decomposed twice."""

from __future__ import annotations

from pathlib import Path

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from milora_lightning.adapters.factors import initial_factors, initial_triplets, scaled_factors
from milora_lightning.config import Init
from milora_lightning.linalg.singular import SingularSlice
from milora_lightning.parallel.dtensor import memory_of
from milora_lightning.utils.folders import cache_folder, replaced_file
from milora_lightning.utils.messages import warn

_VERSION = 1  # part of the key: increase it when the same weight should give other triplets
_CHECKSUM = "xxh3_128"
_SMALLEST = 128  # smaller weights are decomposed in the time it takes to open a file


def cached_factors(
    weight: Tensor,
    r: int,
    scaling: float = 1.0,
    init: Init = "milora",
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute the same as :func:`milora_lightning.adapters.factors.initial_factors`, decomposing large weights once.

    The triplets are kept in safetensors files, in the folder ``factors`` of the user's cache, which may be deleted at
    any time. An entry is found by a hash of the weight's bits and of everything else that the triplets depend on.
    A damaged entry is computed again, and a folder that cannot be written is not used, both with a warning.

    Args:
        weight: Weight of shape (out, in).
        r: Number of triplets.
        scaling: The scale s = lora_alpha / r, positive.
        init: Which triplets; ``"lora"`` has none, and nothing is kept.
        generator: CPU generator for the random choices; it advances only if something is computed.

    Returns:
        ``lora_A`` (r, in) and ``lora_B`` (out, r), float32 on the weight's device, bit for bit the same whether they
        were computed or read.

    Raises:
        ValueError: If the weight is not a finite matrix, or r is out of range.
    """
    if init == "lora" or weight.is_meta or min(weight.shape) < _SMALLEST:
        return initial_factors(weight, r, scaling, init, generator)
    path = cache_folder() / "factors" / f"{_key(weight, r, init, generator)}.safetensors"
    triplets = _read(path, weight.shape, r)
    if triplets is None:
        triplets = initial_triplets(weight, r, init, generator)
        _write(path, triplets)
    return scaled_factors(SingularSlice(*(x.to(weight.device) for x in triplets)), scaling)


def _key(weight: Tensor, r: int, init: Init, generator: torch.Generator | None) -> str:
    digest = xxhash.xxh3_128(f"{_VERSION} {tuple(weight.shape)} {weight.dtype} {init} {r} ".encode())
    digest.update(memory_of(weight))
    if init == "random":
        digest.update(memory_of(torch.get_rng_state() if generator is None else generator.get_state()))
    return digest.hexdigest()


def _checksum(triplets: SingularSlice) -> str:
    digest = xxhash.xxh3_128()
    for x in triplets:
        digest.update(memory_of(x))
    return digest.hexdigest()


def _read(path: Path, shape: torch.Size, r: int) -> SingularSlice | None:
    """Read an entry; None if there is none or it is damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            triplets = SingularSlice(*(file.get_tensor(name) for name in SingularSlice._fields))
            checksum = (file.metadata() or {}).get(_CHECKSUM)
        shapes = [tuple(x.shape) for x in triplets]
        if shapes == [(shape[0], r), (r,), (r, shape[1])] and checksum == _checksum(triplets):
            return triplets
        problem = "its content is not what was written"
    except FileNotFoundError:
        return None
    except (SafetensorError, OSError) as error:
        problem = str(error)
    warn(f"The cached decomposition {str(path)!r} is unusable and computed anew: {problem}.", from_any_rank=True)
    return None


def _write(path: Path, triplets: SingularSlice) -> None:
    """Write an entry, whole or not at all."""
    try:
        with replaced_file(path) as unfinished:
            on_cpu = {name: x.cpu() for name, x in triplets._asdict().items()}
            save_file(on_cpu, unfinished, metadata={_CHECKSUM: _checksum(triplets)})
    except (OSError, SafetensorError) as error:
        warn(
            f"Decompositions cannot be kept in {str(path.parent)!r} ({error}): later runs compute them again. Set "
            "MILORA_CACHE to a folder that can be written.",
            from_any_rank=True,
        )
