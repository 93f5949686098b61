"""What a base model is known by: a hash of each of its weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.distributed as dist
import xxhash
from torch import Tensor, nn

from milora_lightning.adapters.base_weight import STORED, Stored
from milora_lightning.adapters.injection import base_keys
from milora_lightning.adapters.quantization import pieces
from milora_lightning.checkpoint.io import CheckpointError
from milora_lightning.parallel.dtensor import gather_to, is_sharded, memory_of
from milora_lightning.utils.names import pristine_name

QUANTIZED = " as "
"""Separates what a weight is known by from what it was quantized to."""


def fingerprint(module: nn.Module, frozen_only: bool = True) -> dict[str, str]:
    """Hash every frozen weight that is not an adapter's: its shape, its dtype and all of its bits.

    A weight that was quantized as it was loaded is known by what it was before, and the kind of quantization: codes
    may differ from one device to another.

    Args:
        module: Any module; weights on the meta device are skipped. All ranks that hold shards of its weights must call
            this; they share the work, collecting one weight at a time, and the hashes are those of the whole weights.
        frozen_only: Whether to leave out what trains; otherwise only the adapters are left out.

    Returns:
        ``"(shape) dtype hash"`` by parameter name, and ``" as nf4"`` after it where that was done. Names are those from
        before surgery.

    >>> fingerprint(nn.Linear(2, 1).requires_grad_(False)).keys()
    dict_keys(['bias', 'weight'])
    """
    hashes: dict[str, str] = {}
    ranks = dist.get_world_size() if is_sharded(module) else 1
    parameters = dict(module.named_parameters(remove_duplicate=False))
    for index, key in enumerate(sorted(base_keys(module, frozen_only))):
        parameter = parameters[key].detach()
        stored = _stored(module, key)
        if stored is not None:
            hashes[pristine_name(key)] = f"{_described(stored.read())}{QUANTIZED}{stored.quantization}"
            continue
        weight = None if parameter.is_meta else gather_to(parameter, index % ranks)
        if weight is not None:
            hashes[pristine_name(key)] = _described(weight)
    if ranks > 1:
        parts: list[Any] = [None] * ranks
        dist.all_gather_object(parts, hashes)
        hashes = {name: value for part in parts for name, value in part.items()}
    return dict(sorted(hashes.items()))


def _described(weight: Tensor) -> str:
    digest = xxhash.xxh3_128()
    for piece in pieces(weight):
        digest.update(memory_of(piece))
    return f"{tuple(weight.shape)} {weight.dtype} {digest.hexdigest()}"


def _stored(module: nn.Module, key: str) -> Stored | None:
    layer, _, name = key.rpartition(".")
    return getattr(module.get_submodule(layer), STORED, None) if name == "weight" else None


def unquantized(base: Mapping[str, str]) -> dict[str, str]:
    """Return the fingerprint of the model that one with this fingerprint was quantized from.

    >>> unquantized({"0.weight": "(2, 2) torch.float32 1f as nf4", "0.bias": "(2,) torch.float32 2e"})
    {'0.weight': '(2, 2) torch.float32 1f', '0.bias': '(2,) torch.float32 2e'}
    """
    return {name: value.partition(QUANTIZED)[0] for name, value in base.items()}


def only_codes(base: Mapping[str, str]) -> str | None:
    """Name a weight that a fingerprint knows by codes alone, so that nothing tells what it was before quantization."""
    return next((name for name, value in base.items() if " torch.uint8 " in value or " torch.int8 " in value), None)


def quantization_of(base: Mapping[str, str]) -> str | None:
    """Return what a model with this fingerprint was quantized to as it was loaded; None if it was not.

    >>> quantization_of({"0.weight": "(2, 2) torch.float32 1f as nf4"})
    'nf4'
    """
    return next((value.partition(QUANTIZED)[2] for value in base.values() if QUANTIZED in value), None)


def check_base(saved: dict[str, str], here: dict[str, str]) -> None:
    """Compare the fingerprint of the base that adapters were trained on with this model's.

    Raises:
        CheckpointError: If they differ.
    """
    different = sorted(name for name in saved.keys() | here.keys() if saved.get(name) != here.get(name))
    if different:
        there, now = quantization_of(saved), quantization_of(here)
        if there != now and unquantized(saved) == unquantized(here):
            raise CheckpointError(
                f"The adapters were trained on a base with quantization: {there or 'null'}, and this one has "
                f"{now or 'null'}: set model.quantization as in training."
            )
        name = different[0]
        raise CheckpointError(
            f"The adapters were trained on another base model: {len(different)} of {len(saved)} frozen weights differ, "
            f"for example {name!r} ({saved.get(name, 'absent')} there, {here.get(name, 'absent')} here). Use the same "
            "model, files and dtype as in training."
        )
