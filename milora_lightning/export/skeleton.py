"""Copies of models without their weights, for testing PEFT without using memory."""

from __future__ import annotations

import copy
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from milora_lightning.adapters.candidates import base_of
from milora_lightning.adapters.experts import AdaptedExperts
from milora_lightning.adapters.layer import LoRALinear
from milora_lightning.adapters.linear_layers import is_conv1d, is_linear, linear_shape
from milora_lightning.adapters.packed import LoRAPacked
from milora_lightning.adapters.quantization import is_quantized_linear
from milora_lightning.utils.derived_class import Derived
from milora_lightning.utils.names import WRAPPERS


def skeleton(module: nn.Module) -> Any:
    """Copy a module without its adapters, with weights of zeros that take no memory.

    The copy shares nothing with the module that PEFT could change. It must not be called.
    """
    copied = _skeleton(module, {})
    if isinstance(module, PreTrainedModel):
        copied.config = copy.deepcopy(module.config)
    return copied


def _skeleton(module: nn.Module, copies: dict[int, Any]) -> Any:
    if id(module) in copies:
        return copies[id(module)]
    for wrapped in WRAPPERS & module._modules.keys():
        return _skeleton(module.get_submodule(wrapped), copies)
    if isinstance(module, AdaptedExperts):
        return _skeleton(module.base_layer, copies)
    if isinstance(module, LoRALinear) and not is_linear(module.base_layer):
        return _skeleton(module.base_layer, copies)
    base = base_of(module)
    if isinstance(module, LoRALinear) or _holds_codes(base):  # whose state PEFT would read
        out_features, in_features = linear_shape(base)
        with torch.device("meta"):
            plain = Conv1D(out_features, in_features) if is_conv1d(base) else nn.Linear(in_features, out_features)
        plain.weight = nn.Parameter(_weightless(plain.weight), requires_grad=False)
        plain.bias = None if base.bias is None else nn.Parameter(_weightless(plain.bias), requires_grad=False)
        copies[id(module)] = plain
        return plain
    # fully_shard and adapters change a module's class to a subclass; take the original class
    cls = next(each for each in type(module).__mro__ if not issubclass(each, (FSDPModule, Derived)))
    shell = cast(nn.Module, object.__new__(cls))
    copies[id(module)] = shell
    vars(shell).update({**vars(module), **vars(nn.Module())})  # resets hooks and registered members
    vars(shell).pop("hf_device_map", None)  # PEFT would move weights to these devices
    for key, parameter in module._parameters.items():
        if parameter is not None and id(parameter) not in copies:
            copies[id(parameter)] = nn.Parameter(_weightless(parameter), requires_grad=False)
        shell._parameters[key] = copies.get(id(parameter))
    shell._buffers = {key: None if b is None else _weightless(b) for key, b in module._buffers.items()}
    shell._non_persistent_buffers_set = set(module._non_persistent_buffers_set)
    for key, child in module._modules.items():
        if isinstance(child, LoRAPacked):
            continue
        shell._modules[key] = None if child is None else _skeleton(child, copies)
    return shell


def _holds_codes(module: nn.Module) -> bool:
    return is_quantized_linear(module) or (isinstance(module, nn.Linear) and not module.weight.is_floating_point())


def _weightless(tensor: Tensor) -> Tensor:
    return torch.zeros(()).expand(tensor.shape)
