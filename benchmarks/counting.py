"""Counts what a decoder layer computes and moves, operation by operation, on the package's code without values."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch
from cost import ATTENTION, is_launched, traffic
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from transformers import PretrainedConfig

from milora_lightning import LoRAConfig, lora_layers
from milora_lightning.models.memory import planned_model


class Operation(NamedTuple):
    """One launch: floating-point operations of a matrix product (or none), and bytes read and written."""

    name: str
    flops: float
    bytes: float


class Operations(TorchDispatchMode):
    """Record what would be launched within a context."""

    def __init__(self) -> None:
        super().__init__()
        self.all: list[Operation] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, and record it."""
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        if is_launched(function):
            count = flop_registry.get(function.overloadpacket)
            flops = count(*args, **kwargs, out_val=result) if count else 0
            moved = traffic(function, args, kwargs, result)
            self.all.append(Operation(function.overloadpacket.__name__, flops, moved))
        return result


class Layer(NamedTuple):
    """What one decoder layer does in a step."""

    forward: list[Operation]
    backward: list[Operation]


def decoder_layer(config: PretrainedConfig, adapters: LoRAConfig, batch_size: int, length: int) -> Layer:
    """Count one decoder layer with its adapters, attention itself aside: what two layers do and one does not.

    Args:
        config: A dense model's configuration.
        adapters: The adapters.
        batch_size: Rows.
        length: Tokens in each.
    """
    one, two = (_run(config, adapters, batch_size, length, layers) for layers in (1, 2))
    return Layer(_difference(one.forward, two.forward), _difference(one.backward, two.backward))


def _run(config: PretrainedConfig, adapters: LoRAConfig, batch_size: int, length: int, layers: int) -> Layer:
    config = copy.deepcopy(config)
    config.num_hidden_layers, config._attn_implementation = layers, ATTENTION
    model: Any = planned_model(config, torch.bfloat16, adapters)
    for adapter in lora_layers(model).values():
        adapter.initialized = True
    model.train()
    model.get_input_embeddings().register_forward_hook(lambda *call: call[2].requires_grad_())
    ids = torch.zeros(batch_size, length, dtype=torch.int64, device="meta")
    with Operations() as forward:
        output = model.base_model(input_ids=ids, use_cache=False)[0]
    with Operations() as backward:
        output.backward(torch.empty_like(output))
    return Layer(forward.all, backward.all)


def _difference(one: list[Operation], two: list[Operation]) -> list[Operation]:
    left = list(two)
    for operation in one:
        left.remove(operation)
    return left


def seconds(operations: list[Operation], rate: float, bandwidth: float) -> float:
    """Return how long operations take one after the other, each limited by arithmetic or by memory."""
    return sum(max(operation.flops / rate, operation.bytes / bandwidth) for operation in operations)
