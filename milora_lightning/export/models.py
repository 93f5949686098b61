"""Finding exportable models in a module, and their adapters under all of their names."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

from milora_lightning.adapters.injection import lora_layers
from milora_lightning.adapters.layer import LoRALinear
from milora_lightning.utils.errors import InvalidInputError
from milora_lightning.utils.names import unwrapped_name


def outermost_models(module: nn.Module) -> dict[str, PreTrainedModel]:
    """Return the Hugging Face models in a module by name, except those inside other models."""
    models: dict[str, PreTrainedModel] = {}
    for name, child in module.named_modules():
        if isinstance(child, PreTrainedModel) and not any(is_in(name, outer) for outer in models):
            models[name] = child
    return models


def registrations(model: nn.Module) -> dict[str, LoRALinear]:
    """Return adapters under all of their names; an adapter that is registered in several places has several names."""
    modules = model.named_modules(remove_duplicate=False)
    return {unwrapped_name(name): layer for name, layer in modules if isinstance(layer, LoRALinear)}


def find_model(
    module: nn.Module, only: str = "only those can be exported", choice: str = "pass the one to export"
) -> PreTrainedModel:
    """Return the Hugging Face model in a module, or the module itself; of several models, the one with adapters.

    Args:
        module: The module.
        only: What is said where there is none.
        choice: How to choose one of several.

    Raises:
        ValueError: If there is none, or several and no unique choice.
    """
    models = outermost_models(module)
    if not models:
        raise InvalidInputError(f"{type(module).__name__} contains no Hugging Face model, and {only}.")
    if len(models) == 1:
        return next(iter(models.values()))
    chosen = {name: m for name, m in models.items() if lora_layers(m)}
    chosen = chosen or {name: m for name, m in models.items() if any(p.requires_grad for p in m.parameters())}
    if len(chosen) != 1:
        names = ", ".join(map(repr, chosen or models))
        raise InvalidInputError(
            f"{type(module).__name__} contains several Hugging Face models that could be meant, {names}: "
            f"{choice}, as in module.{next(iter(chosen or models))}."
        )
    return next(iter(chosen.values()))


def is_in(name: str, outer: str) -> bool:
    """Whether a name is inside the module with another name; everything is inside ``""``."""
    return not outer or name.startswith(f"{outer}.")
