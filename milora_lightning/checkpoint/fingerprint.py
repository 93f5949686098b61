"""The fingerprint that identifies a base model: a hash of each of its weights."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
import xxhash
from torch import Tensor, nn

from milora_lightning.adapters.base_weight import STORED, Stored
from milora_lightning.adapters.freezing import base_keys
from milora_lightning.adapters.linear_layers import is_plain
from milora_lightning.adapters.quantization import pieces
from milora_lightning.checkpoint.io import CheckpointError
from milora_lightning.parallel.dtensor import gather_to_rank, is_sharded, memory_of
from milora_lightning.utils.names import pristine_name

QUANTIZED = " as "
"""Separates the description of a weight from the kind of its quantization."""


def fingerprint(module: nn.Module, frozen_only: bool = True, like: Mapping[str, str] | None = None) -> dict[str, str]:
    """Hash every frozen weight except those of adapters: its shape, its dtype and all of its bits.

    For a weight that was quantized while it was loaded, the original weight is hashed and the kind of quantization is
    noted, because quantized codes may differ from one device to another.

    Args:
        module: Any module; weights on the meta device are skipped. If weights are sharded, all ranks must call this.
            They share the work, gathering one weight at a time, and the hashes are those of the full weights.
        frozen_only: Whether to leave out weights that train; otherwise only the adapters are left out.
        like: Another fingerprint. A weight that has another floating-point dtype there is hashed in that dtype, if this
            represents all of its values exactly: a bfloat16 weight is still the same when stored in float32.

    Returns:
        ``"(shape) dtype hash"`` by parameter name, followed by the quantization, such as ``" as nf4"``, if there is
        one. The names are those before injection.

    >>> fingerprint(nn.Linear(2, 1).requires_grad_(False)).keys()
    dict_keys(['bias', 'weight'])
    """
    hashes: dict[str, str] = {}
    ranks = dist.get_world_size() if is_sharded(module) else 1
    parameters = dict(module.named_parameters(remove_duplicate=False))
    for index, key in enumerate(sorted(base_keys(module, frozen_only))):
        parameter = parameters[key].detach()
        name = pristine_name(key)
        wanted = _dtype_in((like or {}).get(name, ""))
        stored = _stored(module, key)
        if stored is not None:
            hashes[name] = f"{_described(_as(stored.read(), wanted))}{QUANTIZED}{stored.quantization}"
            continue
        weight = None if parameter.is_meta else gather_to_rank(parameter, index % ranks)
        if weight is not None:
            hashes[name] = _described(_as(weight, wanted))
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


def _dtype_in(description: str) -> torch.dtype | None:
    """Return the floating-point dtype in the description of a weight; None if it has none."""
    found = re.match(r"\([\d, ]*\) torch\.(\w+) ", description)
    dtype = getattr(torch, found[1], None) if found else None
    return dtype if isinstance(dtype, torch.dtype) and dtype.is_floating_point else None


def _as(weight: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Convert a plain floating-point weight to a dtype if that changes no value; otherwise return it unchanged.

    >>> _as(torch.tensor([0.5]), torch.bfloat16).dtype, _as(torch.tensor([0.1]), torch.bfloat16).dtype
    (torch.bfloat16, torch.float32)
    """
    if dtype is None or dtype == weight.dtype or not is_plain(weight) or not weight.is_floating_point():
        return weight
    converted = weight.to(dtype)
    return converted if torch.equal(converted.to(weight.dtype), weight) else weight


def in_other_dtypes(saved: Mapping[str, str], here: Mapping[str, str]) -> bool:
    """Return whether any weight has different floating-point dtypes in two fingerprints.

    >>> in_other_dtypes({"w": "(2,) torch.float32 1f"}, {"w": "(2,) torch.bfloat16 2e"})
    True
    """
    return any(_dtype_in(saved[name]) != _dtype_in(here[name]) for name in saved.keys() & here.keys())


def _stored(module: nn.Module, key: str) -> Stored | None:
    layer, _, name = key.rpartition(".")
    return getattr(module.get_submodule(layer), STORED, None) if name == "weight" else None


def unquantized(base: Mapping[str, str]) -> dict[str, str]:
    """Return the fingerprint of the unquantized model, given that of the quantized one.

    >>> unquantized({"0.weight": "(2, 2) torch.float32 1f as nf4", "0.bias": "(2,) torch.float32 2e"})
    {'0.weight': '(2, 2) torch.float32 1f', '0.bias': '(2,) torch.float32 2e'}
    """
    return {name: value.partition(QUANTIZED)[0] for name, value in base.items()}


def only_codes(base: Mapping[str, str]) -> str | None:
    """Return the name of a weight for which a fingerprint has only quantized codes; None if there is none."""
    return next((name for name, value in base.items() if " torch.uint8 " in value or " torch.int8 " in value), None)


def quantization_of(base: Mapping[str, str]) -> str | None:
    """Return the kind of quantization in a fingerprint; None if the model is not quantized.

    >>> quantization_of({"0.weight": "(2, 2) torch.float32 1f as nf4"})
    'nf4'
    """
    return next((value.partition(QUANTIZED)[2] for value in base.values() if QUANTIZED in value), None)


def check_base(saved: dict[str, str], here: dict[str, str], held: Mapping[str, str] | None = None) -> None:
    """Compare the fingerprint of the base that adapters were trained on with this model's.

    Args:
        saved: Fingerprint of the base they were trained on.
        here: Fingerprint of this model, in the dtypes of ``saved`` where these represent its values.
        held: Fingerprint of this model in its actual dtypes, for the message.

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
        name, held = different[0], held or here
        raise CheckpointError(
            f"The adapters were trained on another base model: {len(different)} of {len(saved)} frozen weights differ, "
            f"for example {name!r} ({saved.get(name, 'absent')} there, {held.get(name, 'absent')} here). Use the same "
            "model, files and dtype as in training."
        )
