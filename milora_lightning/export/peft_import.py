"""Loading adapters exported by PEFT or this package."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from milora_lightning.adapters.candidates import adaptable_layers, base_of
from milora_lightning.adapters.injection import lora_layers
from milora_lightning.adapters.layer import LoRALinear
from milora_lightning.adapters.parts import ends_with
from milora_lightning.adapters.surgery import inject
from milora_lightning.adapters.targets import find_targets
from milora_lightning.checkpoint.fingerprint import check_base, fingerprint, unquantized
from milora_lightning.checkpoint.io import CheckpointError
from milora_lightning.config import LoRAConfig
from milora_lightning.export.models import find_model
from milora_lightning.export.peft_attention import INSIDE, TWICE, counts_twice, own_names
from milora_lightning.export.peft_folder import FACTORS, as_ours, factor_key, in_full, layer_names, read_folder
from milora_lightning.export.peft_format import BASE_KEY, PEFT_PREFIX, peft_module_names
from milora_lightning.export.peft_layers import from_peft, peft_shapes
from milora_lightning.export.peft_trial import opens_otherwise
from milora_lightning.parallel.dtensor import copy_into, full_tensor
from milora_lightning.utils.errors import InvalidInputError
from milora_lightning.utils.names import unwrapped_name


def peft_config(folder: str | Path) -> LoRAConfig:
    """Read the configuration of a PEFT LoRA folder.

    Args:
        folder: Folder with ``adapter_config.json`` and ``adapter_model.safetensors``, or the older ``.bin``.

    Returns:
        The configuration, with ``init="lora"`` (or ``"mica"``, where B is frozen), because the product of the folder's
        factors is the update itself. It names the layers for which the folder has factors, each with its rank and
        scale; an rsLoRA scale is converted to LoRA's.

    Raises:
        CheckpointError: If it is not such a folder, or plain LoRA layers cannot represent its adapter.
    """
    config, tensors, _ = read_folder(folder)
    return as_ours(config, tensors)


def load_peft(module: nn.Module, folder: str | Path) -> LoRAConfig:
    """Load the adapters of a PEFT LoRA folder into a model, to evaluate, export or continue training.

    Modules that the folder stores in full (``modules_to_save``) are loaded too, and remain trainable.

    Args:
        module: A Hugging Face model, or a module with one inside, without adapters or with adapters of this
            configuration; changed in place.
        folder: Folder with ``adapter_config.json`` and ``adapter_model.safetensors``, or the older ``.bin``.

    Returns:
        The configuration of the adapters.

    Raises:
        CheckpointError: If the folder cannot be read, its tensors do not fit the model, or PEFT itself would load it
            differently.
    """
    peft, tensors, metadata = read_folder(folder)
    config = as_ours(peft, tensors)
    model = find_model(module)
    if BASE_KEY in metadata:
        saved = json.loads(metadata[BASE_KEY])
        _check_base(saved, unquantized(fingerprint(model, frozen_only=False, like=saved)))
    tensors = _without_base(model, tensors, folder)
    inside = [key for key in tensors if key.endswith(f"{INSIDE}.lora_B.weight") and bool(tensors[key].any())]
    if inside and counts_twice():
        raise CheckpointError(f"{str(folder)!r} cannot be loaded: {TWICE}, so that what it has trained is not clear.")
    stored, tensors = tensors, _by_adapter(model, config, tensors)
    _check_tensors(model, config, tensors, folder)
    names = layer_names(tensors)
    if said := opens_otherwise(Path(folder), model, stored, {name: config.scale(name) for name in names}):
        raise CheckpointError(f"PEFT itself cannot load {str(folder)!r} into this model: {said}.")
    inject(model, config, names)
    for name, layer in lora_layers(model).items():
        layer.set_initial_factors(*_ours(layer, name, tensors, folder))
    places = _places(model)
    with torch.no_grad():
        for name, value in in_full(tensors).items():
            copy_into(places[name], value)
    return config


def _by_adapter(model: nn.Module, config: LoRAConfig, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename the factors of experts from PEFT's wrappers to the parameters that they adapt."""
    renamed = {}
    for place, name in own_names(layer_names(tensors)).items():
        renamed.update({factor_key(place, factor): factor_key(name, factor) for factor in ("lora_A", "lora_B")})
    tensors = {renamed.get(key, key): value for key, value in tensors.items()}
    if not config.target_parameters:
        return tensors
    stacks = [name for name in adaptable_layers(model) if any(ends_with(name, e) for e in config.target_parameters)]
    renamed = {}
    for name, place in peft_module_names(model, stacks).items():
        renamed.update({factor_key(place, factor): factor_key(name, factor) for factor in ("lora_A", "lora_B")})
    return {renamed.get(key, key): value for key, value in tensors.items()}


def _check_tensors(model: PreTrainedModel, config: LoRAConfig, tensors: dict[str, Tensor], folder: str | Path) -> None:
    """Refuse tensors that do not fit the layers of this model, before anything is changed."""
    layers = {**adaptable_layers(model), **lora_layers(model)}
    names = layer_names(tensors)
    wanted: dict[str, tuple[int, ...]] = {}
    for name in names:
        if name in layers:
            wanted |= _factor_shapes(name, layers[name], config.rank(name))
    whole = in_full(tensors)
    places = _places(model)
    wanted |= {PEFT_PREFIX + name: tuple(places[name].shape) for name in whole if name in places}
    if odd := sorted(tensors.keys() ^ wanted.keys()):
        raise CheckpointError(
            f"The tensors in {str(folder)!r} are for other layers than this model's, such as {odd[0]!r}."
        )
    for key, shape in wanted.items():
        if tuple(tensors[key].shape) != shape:
            raise CheckpointError(f"{key!r} in {str(folder)!r} has shape {tuple(tensors[key].shape)}, not {shape}.")
    if more := sorted({*(find_targets(model, names) if names else ()), *lora_layers(model)} - set(names)):
        raise CheckpointError(
            f"{str(folder)!r} has no factors for {more[0]!r}, which its target_modules match as well."
        )
    for name in whole:
        others = [n for n, p in places.items() if p is places[name] and n not in whole]
        if others:
            raise CheckpointError(
                f"{str(folder)!r} holds {name!r} in full, which is tied to {others[0]!r} in this model: training would "
                "change both. Untie them (tie_word_embeddings=False), or merge the adapter with PEFT and start there."
            )


def _check_base(saved: dict[str, str], here: dict[str, str]) -> None:
    """Compare weights of equal shape and dtype only: the same base may be used in another precision."""
    alike = [name for name, value in saved.items() if here.get(name, "").rpartition(" ")[0] == value.rpartition(" ")[0]]
    check_base({name: saved[name] for name in alike}, {name: here[name] for name in alike})


def _without_base(model: PreTrainedModel, tensors: dict[str, Tensor], folder: str | Path) -> dict[str, Tensor]:
    """Remove copies of base weights, which PEFT adds when embeddings or the head have adapters."""
    kept = {}
    for key, value in tensors.items():
        name = key.removeprefix(PEFT_PREFIX)
        if ".base_layer." not in name or name.endswith(FACTORS):
            kept[key] = value
            continue
        plain = _places(model)
        weight = plain.get(name, plain.get(name.replace(".base_layer.", ".")))
        own_value = None if weight is None else full_tensor(weight.detach()).cpu()
        if own_value is None or own_value.shape != value.shape or not torch.equal(value.to(own_value.dtype), own_value):
            raise CheckpointError(
                f"{str(folder)!r} holds another {name!r} than this model, as after resizing its embeddings: merge "
                "the adapter into its base with PEFT (merge_and_unload), and start from that model."
            )
    return kept


def _places(model: nn.Module) -> dict[str, Tensor]:
    """Return all parameters and buffers by their names without adapters; tied ones under each of their names."""
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]
    return {unwrapped_name(name): tensor for name, tensor in named}


def _factor_shapes(name: str, layer: nn.Module, r: int) -> dict[str, tuple[int, ...]]:
    of_A, of_B = peft_shapes(base_of(layer), r)
    return {factor_key(name, "lora_A"): of_A, factor_key(name, "lora_B"): of_B}


def _ours(layer: LoRALinear, name: str, tensors: dict[str, Tensor], folder: str | Path) -> tuple[Tensor, Tensor]:
    try:
        return from_peft(layer, *(tensors[factor_key(name, factor)] for factor in ("lora_A", "lora_B")))
    except InvalidInputError as error:
        raise CheckpointError(f"{str(folder)!r} cannot be loaded: of {name!r}, {error}.") from error
