"""What a base model is known by: a hash of each of its weights."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
import xxhash
from torch import nn

from milora_lightning.checkpoint_io import CheckpointError
from milora_lightning.lora import LoRALinear
from milora_lightning.names import pristine_name
from milora_lightning.quantization import pieces
from milora_lightning.sharding import as_bytes, gather_to, is_sharded


def fingerprint(module: nn.Module, frozen_only: bool = True) -> dict[str, str]:
    """Hash every frozen weight that is not an adapter's: its shape, its dtype and all of its bits.

    Args:
        module: Any module; weights on the meta device are skipped. All ranks that hold shards of its weights must call
            this; they share the work, collecting one weight at a time, and the hashes are those of the whole weights.
        frozen_only: Whether to leave out what trains; otherwise only the adapters are left out.

    Returns:
        ``"(shape) dtype hash"`` by parameter name. Names are those from before surgery.

    >>> fingerprint(nn.Linear(2, 1).requires_grad_(False)).keys()
    dict_keys(['bias', 'weight'])
    """
    hashes: dict[str, str] = {}
    ranks = dist.get_world_size() if is_sharded(module) else 1
    parameters = dict(module.named_parameters(remove_duplicate=False))
    for index, key in enumerate(sorted(base_keys(module, frozen_only))):
        parameter = parameters[key].detach()
        weight = None if parameter.is_meta else gather_to(parameter, index % ranks)
        if weight is not None:
            digest = xxhash.xxh3_128()
            for piece in pieces(weight):
                digest.update(as_bytes(piece.cpu().contiguous()).numpy().data)
            hashes[pristine_name(key)] = f"{tuple(weight.shape)} {weight.dtype} {digest.hexdigest()}"
    if ranks > 1:
        parts: list[Any] = [None] * ranks
        dist.all_gather_object(parts, hashes)
        hashes = {name: value for part in parts for name, value in part.items()}
    return dict(sorted(hashes.items()))


def base_keys(module: nn.Module, frozen_only: bool = True) -> set[str]:
    """Return the names of all frozen parameters, or simply all, but those of adapters; as the module has them now."""
    factors = {
        f"{prefix}.{name}"
        for prefix, layer in module.named_modules()
        if isinstance(layer, LoRALinear)
        for name, _ in layer.named_parameters(recurse=False)
    }
    parameters = module.named_parameters(remove_duplicate=False)
    return {name for name, p in parameters if not (frozen_only and p.requires_grad)} - factors


def check_base(saved: dict[str, str], here: dict[str, str]) -> None:
    """Compare the fingerprint of the base that adapters were trained on with this model's.

    Raises:
        CheckpointError: If they differ.
    """
    different = sorted(name for name in saved.keys() | here.keys() if saved.get(name) != here.get(name))
    if different:
        name = different[0]
        raise CheckpointError(
            f"The adapters were trained on another base model: {len(different)} of {len(saved)} frozen weights differ, "
            f"for example {name!r} ({saved.get(name, 'absent')} there, {here.get(name, 'absent')} here). Use the same "
            "model, files and dtype as in training."
        )
