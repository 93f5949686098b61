"""Sharding a language model with FSDP2: units, gathering and freeing, dtypes, and devices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from transformers import PreTrainedModel

from milora_lightning.models.checkpointing import Recomputation
from milora_lightning.models.pretrained import decoder_layers
from milora_lightning.utils.errors import InvalidInputError

DType = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class Sharding:
    """Settings of FSDP2; the names are those of torch's ``fully_shard`` and its policies.

    Args:
        reshard_after_forward: Whether a decoder layer's gathered weights are freed after its forward and gathered again
            for its backward. By default this applies to all layers but the last, whose backward comes next. ``True``
            includes the last layer, ``False`` keeps all weights (faster, but each device needs memory for the whole
            model), and a number reshards to groups of that many ranks, such as those of a node.
        param_dtype: Dtype in which weights are gathered and computed with; not with adapters.
        reduce_dtype: Dtype in which gradients are summed over ranks.
        cpu_offload: Whether shards, gradients and optimizer state are kept on the CPU, where the optimizer then runs.
        activation_checkpointing: Which activations are recomputed in backward: ``"full"`` for those of every decoder
            layer, ``"selective"`` for the same without attention, a number n for those of every n-th layer.

    Raises:
        ValueError: If a number is out of range.
    """

    reshard_after_forward: bool | int | None = None
    param_dtype: DType | None = None
    reduce_dtype: DType | None = None
    cpu_offload: bool = False
    activation_checkpointing: Recomputation | None = None

    def __post_init__(self) -> None:
        again, recomputed = self.reshard_after_forward, self.activation_checkpointing
        if isinstance(again, int) and not isinstance(again, bool) and again < 2:
            raise InvalidInputError(f"reshard_after_forward is {again}: false keeps the weights.")
        if isinstance(recomputed, int) and recomputed < 1:
            raise InvalidInputError(f"activation_checkpointing is {recomputed}: leave it out for none.")

    def policies(self, mesh: DeviceMesh) -> dict[str, Any]:
        """Return the policies for ``fully_shard``."""
        dtypes = {name: getattr(self, name) for name in ("param_dtype", "reduce_dtype")}
        casting = MixedPrecisionPolicy(**{name: value and getattr(torch, value) for name, value in dtypes.items()})
        # Pinned memory lets an accelerator copy while it computes.
        offloading = CPUOffloadPolicy(pin_memory=mesh.device_type != "cpu") if self.cpu_offload else OffloadPolicy()
        return {"mp_policy": casting, "offload_policy": offloading}


def shard(model: PreTrainedModel, mesh: DeviceMesh, sharding: Sharding | None = None) -> None:
    """Shard a model's parameters with FSDP2: each decoder layer by itself, then the rest.

    While a layer computes, the next one is gathered, forward and backward.

    Args:
        model: The model with its adapters injected; parameters cannot be added afterwards.
        mesh: The ranks to shard across; with two dimensions, those to replicate across and those to shard across.
        sharding: The settings.

    Raises:
        ValueError: If the model does not name its decoder layers.
    """
    sharding = sharding or Sharding()
    policies, keep = sharding.policies(mesh), sharding.reshard_after_forward
    layers = outermost(decoder_layers(model))
    for layer in layers:
        frees = layer is not layers[-1] if keep is None else keep
        fully_shard(layer, mesh=mesh, reshard_after_forward=frees, **policies)
    # Torch keeps the rest gathered from the forward to the backward, which begins with it.
    rest: dict[str, Any] = {"reshard_after_forward": False} if keep is False else {}
    fully_shard(model, mesh=mesh, **policies, **rest)
    stacks = [
        [layer for layer in stack if layer in layers] for stack in model.modules() if isinstance(stack, nn.ModuleList)
    ]
    stacks = [stack for stack in stacks if stack]
    for stack in stacks:  # layers that run one after the other, in this order
        _prefetch([model, *stack] if len(stacks) == 1 else stack)


def reduce_unused(module: nn.Module) -> None:
    """Make ranks sum gradients correctly if some have not used a part of the model (an expert, the vision part).

    Otherwise FSDP2 would sum the gradients that each rank has, in order, even if they belong to different parameters.
    With this, a parameter that no rank has used gets a zero gradient instead of None. Needs torch 2.13 or later.
    """
    for child in module.modules():
        if isinstance(child, FSDPModule) and hasattr(child, "set_reduce_scatter_unused_params"):
            child.set_reduce_scatter_unused_params(True, recurse=False)


def _prefetch(units: Sequence[nn.Module]) -> None:
    """Make each unit prefetch the weights of the next one before it computes, in both directions."""
    for unit, following in pairwise(units):
        assert isinstance(unit, FSDPModule)
        assert isinstance(following, FSDPModule)
        unit.set_modules_to_forward_prefetch([following])
        if isinstance(unit, PreTrainedModel):  # the root is already gathered when backward begins
            continue
        following.set_modules_to_backward_prefetch([unit])


def outermost(modules: Sequence[nn.Module]) -> list[nn.Module]:
    """Return the modules that are inside none of the others."""
    inside = {child for module in modules for child in module.modules() if child is not module}
    return [module for module in modules if module not in inside]
