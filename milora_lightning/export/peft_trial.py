"""Testing with PEFT, on a copy of a model without weights, whether it opens an export correctly."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from milora_lightning.adapters.experts import LoRAExperts, stacked_weights
from milora_lightning.adapters.injection import lora_layers
from milora_lightning.adapters.linear_layers import is_adaptable
from milora_lightning.export.models import registrations
from milora_lightning.export.peft_attention import own_names, with_partners
from milora_lightning.export.peft_format import BASE, PEFT_PREFIX, lora_config
from milora_lightning.export.peft_layers import objection_to_layers
from milora_lightning.export.skeleton import skeleton
from milora_lightning.utils.counting import counted

EXPERTS_BEFORE = {"gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"}
"""Names of the layers of experts and routers in transformers 4."""


def objection(model: PreTrainedModel) -> str | None:
    """Return the reason why PEFT cannot inject adapters into the same layers; None if it can."""
    return tried(model)[0]


def tried(model: PreTrainedModel) -> tuple[str | None, frozenset[str]]:
    """Inject adapters with PEFT into a copy of the model without weights.

    In models with stacked experts, PEFT may mistake other layers (``shared_expert.down_proj``) for experts of
    transformers 4 with the same names. It still finds these layers as parameters, by the names of their weights.

    Returns:
        The reason why PEFT cannot inject adapters into the same layers, None if it can; and the layers that must be
        named by their weights.
    """
    said = _objection(model, frozenset())
    if said is None or not _has_stacks(model):
        return said, frozenset()
    layers = lora_layers(model).items()
    named = frozenset(n for n, m in layers if n.rpartition(".")[2] in EXPERTS_BEFORE and not isinstance(m, LoRAExperts))
    return (_objection(model, named), named) if named else (said, named)


def _objection(model: PreTrainedModel, by_weight: frozenset[str]) -> str | None:
    layers = lora_layers(model)
    if len({id(m) for m in layers.values()}) < len(registrations(model)):
        return "a layer with an adapter is used in several places of the model, which PEFT does not support"
    if said := objection_to_layers(model):
        return said
    from peft import inject_adapter_in_model

    ranks = {name: layer.r for name, layer in layers.items()}
    config = lora_config(model, ranks, ranks, [], by_weight)
    base = skeleton(model)
    try:
        with _quiet():
            opened = inject_adapter_in_model(config, base, low_cpu_mem_usage=True)
    except Exception as error:  # whatever PEFT raises is its objection
        return _said(error)
    return _other_layers(opened, with_partners(model, layers))


def opens_otherwise(
    folder: Path, model: PreTrainedModel, tensors: Mapping[str, Tensor], scales: Mapping[str, float]
) -> str | None:
    """Load a folder with PEFT into a copy of the model without weights, and return how the result differs.

    Args:
        folder: The complete folder.
        model: The model, with or without adapters.
        tensors: The tensors in the file: factors, and those of modules stored in full.
        scales: The scale of each adapter by name.

    Returns:
        The difference (PEFT refuses the folder, or finds other layers, tensors or scales), or None.
    """
    from peft import PeftModel

    try:
        with _quiet():
            wrapped = PeftModel.from_pretrained(
                skeleton(model), str(folder), low_cpu_mem_usage=True, torch_device="cpu"
            )
        opened = wrapped.get_base_model()
        return _other_layers(opened, scales) or _other_tensors(opened, tensors) or _other_scales(opened, scales)
    except Exception as error:  # whatever PEFT raises is its objection
        return _said(error)


def _other_layers(opened: nn.Module, names: Iterable[str]) -> str | None:
    wanted, found = set(names), set(_peft_layers(opened))
    if missing := sorted(wanted - found):
        return f"it leaves out the adapters of {counted(len(missing), 'layer')}, such as {missing[0]!r}"
    if extra := sorted(found - wanted):
        return f"it adapts {counted(len(extra), 'more layer')}, such as {extra[0]!r}"
    return None


def _other_tensors(opened: nn.Module, tensors: Mapping[str, Tensor]) -> str | None:
    from peft.utils import ModulesToSaveWrapper

    found = {}
    for name, layer in _modules_of_peft(opened).items():
        for factor in ("lora_A", "lora_B"):
            of_embedding = getattr(layer, factor.replace("lora_", "lora_embedding_"), {})
            key = f"{PEFT_PREFIX}{name}.{factor}.weight"
            found[key] = of_embedding["default"] if of_embedding else getattr(layer, factor)["default"].weight
    for name, module in opened.named_modules():
        if isinstance(module, ModulesToSaveWrapper):
            state = module.modules_to_save["default"].state_dict()
            found |= {f"{PEFT_PREFIX}{name}.{key}": value for key, value in state.items()}
    if odd := sorted(found.keys() ^ tensors.keys()):
        return f"it {'does not read' if odd[0] in tensors else 'misses'} the tensor {odd[0]!r}"
    if unread := [key for key, value in found.items() if value.is_meta]:  # under another name, for example
        return f"it does not read the tensor {unread[0]!r}"
    different = [key for key, value in found.items() if not _alike(value, tensors[key])]
    return f"it reads {different[0]!r} as another tensor" if different else None


def _other_scales(opened: nn.Module, scales: Mapping[str, float]) -> str | None:
    for name, layer in _peft_layers(opened).items():
        if not math.isclose(layer.scaling["default"], scales[name], rel_tol=1e-6):
            return f"it scales {name!r} by {layer.scaling['default']:g}, not {scales[name]:g}"
    return None


def _peft_layers(opened: nn.Module) -> dict[str, Any]:
    """Return PEFT's layers by the names that their adapters have here."""
    layers = {}
    for name, module in _modules_of_peft(opened).items():
        parameter = getattr(module, "parameter_name", None)  # of a ParamWrapper, which may be nested
        by_weight = parameter == "weight" and is_adaptable(module.get_base_layer())
        layers[name if parameter is None or by_weight else f"{_without_wrappers(name)}.{parameter}"] = module
    return {name: layers[place] for place, name in own_names(layers).items()}


def _modules_of_peft(opened: nn.Module) -> dict[str, Any]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {name: module for name, module in opened.named_modules() if isinstance(module, BaseTunerLayer)}


def _has_stacks(model: nn.Module) -> bool:
    return bool(stacked_weights(model)) or any(isinstance(child, LoRAExperts) for child in model.modules())


def _without_wrappers(name: str) -> str:
    return name.replace(f".{BASE}", "")


def _alike(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one.detach().float(), other.detach().float().cpu())


@contextmanager
def _quiet() -> Iterator[None]:
    """Within this context, PEFT's layers are created without warnings and without changing the random state."""
    with warnings.catch_warnings(), torch.random.fork_rng(devices=()):
        warnings.simplefilter("ignore")
        yield


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}".rstrip(".")
