"""FSDP1, which flattens and shards parameters: checkpoints gather one FSDP unit of the model at a time."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import FSDPStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.optim import Optimizer
from transformers import PreTrainedModel

from milora_lightning.adapters.adapter_state import factors_tell
from milora_lightning.adapters.injection import lora_layers
from milora_lightning.adapters.layer import LoRALinear
from milora_lightning.adapters.packed import LoRAPacked
from milora_lightning.checkpoint.adapter import AdapterCheckpoint
from milora_lightning.checkpoint.io import KEY
from milora_lightning.checkpoint.reading import check_tensors, told_initialized
from milora_lightning.models.pretrained import decoder_layers
from milora_lightning.strategies.loading import load_adapters
from milora_lightning.utils.compat.lightning import whole_optimizer_states
from milora_lightning.utils.compat.torch import fsdp_name
from milora_lightning.utils.errors import InvalidInputError
from milora_lightning.utils.names import unwrapped_name


class MiLoRAFSDPStrategy(FSDPStrategy):
    """Lightning's strategy for FSDP1, ``milora_fsdp1``, whose checkpoints hold adapters and other trained weights.

    It wraps each decoder layer unless another policy is given, and leaves casting to autocast. Modules without adapters
    are handled as by Lightning's strategy.
    """

    @classmethod
    def register_strategies(cls, strategy_registry: Any) -> None:
        """Register the name ``milora_fsdp1``; the Trainer then knows that it needs a GPU."""
        strategy_registry.register("milora_fsdp1", cls, description=cls.__doc__, override=True)
        cls._registered_strategies.append("milora_fsdp1")

    @property
    def mixed_precision_config(self) -> MixedPrecision | None:
        """None: casting by FSDP1 would round away small updates of the factors. Autocast casts the products instead."""
        if self.mixed_precision is None and self._attached is not None:
            return MixedPrecision()
        return super().mixed_precision_config

    @property
    def _attached(self) -> AdapterCheckpoint | None:
        return AdapterCheckpoint.of(self.lightning_module)

    def check(self) -> None:
        """Refuse settings that do not work with adapters.

        Raises:
            ValueError: If there is such a setting.
        """
        precision = self.precision_plugin.precision
        if precision in ("bf16-true", "16-true"):
            raise InvalidInputError(
                f"precision {precision} under FSDPStrategy (FSDP1) would put the adapters in half precision as well: "
                "set precision: bf16-mixed, or use FSDP2 (strategy: milora_fsdp2)."
            )
        if not self.kwargs["use_orig_params"]:
            raise InvalidInputError(
                "FSDPStrategy cannot mix frozen and trained parameters with use_orig_params: false. Leave it out."
            )
        if self._state_dict_type == "sharded":
            raise InvalidInputError(
                "Adapters under FSDPStrategy (FSDP1) are saved as one file: leave out state_dict_type: sharded, or use "
                "FSDP2 (strategy: milora_fsdp2)."
            )

    def check_module(self, module: nn.Module) -> None:
        """Refuse a module whose parameters are not all float32, which FSDP1 cannot shard together.

        Raises:
            ValueError: If a parameter has another dtype, or a projection of ``nn.MultiheadAttention`` an adapter.
        """
        if any(isinstance(child, LoRAPacked) for child in module.modules()):
            raise InvalidInputError(
                "FSDPStrategy (FSDP1) writes what it reads as in_proj_weight of an nn.MultiheadAttention, W + ΔW, in "
                "place of W: use FSDP2 (strategy: milora_fsdp2), or leave it out (exclude_modules: [in_proj])."
            )
        other = {p.dtype for p in module.parameters() if p.is_floating_point()} - {torch.float32}
        if other:
            raise InvalidInputError(
                f"FSDPStrategy (FSDP1) shards parameters of one dtype only, and adapters are float32 while the model "
                f"has {', '.join(map(str, other))}: set dtype: float32 and precision: bf16-mixed, or use FSDP2 "
                "(strategy: milora_fsdp2), which takes a half-precision model."
            )

    def setup(self, trainer: Trainer) -> None:
        """Wrap the model, by default each decoder layer, and set up the optimizers."""
        if self._attached is not None and "auto_wrap_policy" not in self.kwargs:
            assert self.lightning_module is not None
            self.kwargs["auto_wrap_policy"] = decoder_policy(self.lightning_module)
        super().setup(trainer)

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Gather the adapters and other trained weights, without the base; all ranks must call this.

        Returns:
            The state dict of the module on the first rank, an empty one on the others.
        """
        module, attached = self.lightning_module, self._attached
        if module is None or attached is None:
            return super().lightning_module_state_dict()
        state: dict[str, Any] = {}
        for tensors in _kept_tensors(self):
            if self.is_global_zero:
                state |= {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}
        if self.is_global_zero:
            state[KEY] = attached.description(module)
        return state

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Load a checkpoint of adapters by :func:`load_adapters`, any other checkpoint by Lightning's method."""
        module, attached = self.lightning_module, self._attached
        if module is None or attached is None:
            return super().load_checkpoint(checkpoint_path, weights_only)
        load_module, load_optimizer = partial(_load_module, self, attached, module), partial(_load_optimizer, self)
        return load_adapters(self, checkpoint_path, load_module, load_optimizer)


def decoder_policy(module: nn.Module) -> ModuleWrapPolicy:
    """Return the policy that wraps each decoder layer of the first transformers model in a module."""
    models = [child for child in module.modules() if isinstance(child, PreTrainedModel)][:1]
    return ModuleWrapPolicy({type(layer) for model in models for layer in decoder_layers(model)})


def _load_module(strategy: FSDPStrategy, attached: AdapterCheckpoint, module: nn.Module, saved: dict[str, Any]) -> None:
    state = {unwrapped_name(key): value for key, value in saved.items()}
    description = state.pop(KEY, None)
    attached.check_description(module, description)
    shapes = {name: tensor.shape for tensors in _kept_tensors(strategy) for name, tensor in tensors.items()}
    check_tensors(state, shapes)
    with torch.no_grad():
        for tensors in _kept_tensors(strategy, writeback=True):
            for name, tensor in tensors.items():
                tensor.copy_(state[name])
    told = told_initialized(description)
    for name, layer in lora_layers(module).items():
        layer.initialized = told.get(name, False) or factors_tell(state, f"{name}.")


def _kept_tensors(strategy: FSDPStrategy, writeback: bool = False) -> Iterator[dict[str, Tensor]]:
    """Yield, unit by unit, the full tensors for checkpoints; they are sharded again at the next iteration."""
    assert strategy.model is not None
    for name, unit in strategy.model.named_modules():
        if isinstance(unit, FullyShardedDataParallel):
            whole: Any = FullyShardedDataParallel.summon_full_params(unit, recurse=False, writeback=writeback)
            with whole:
                yield dict(_own_tensors(unit, f"{name}." if name else ""))


def _own_tensors(module: nn.Module, prefix: str) -> Iterator[tuple[str, Tensor]]:
    """The trained parameters, buffers and adapter factors of a module, except those in FSDP units inside it."""
    for name, parameter in module.named_parameters(recurse=False):
        if parameter.requires_grad or isinstance(module, LoRALinear):
            yield unwrapped_name(prefix + name), parameter
    for name, buffer in module.named_buffers(recurse=False):
        if name not in module._non_persistent_buffers_set:
            yield unwrapped_name(prefix + name), buffer
    for name, child in module.named_children():
        if not isinstance(child, FullyShardedDataParallel):
            yield from _own_tensors(child, f"{prefix}{name}.")


def _load_optimizer(strategy: FSDPStrategy, optimizer: Optimizer, saved: dict[str, Any]) -> None:
    """Match saved parameters to FSDP1's names by their order, which is the same in all checkpoints."""
    module, model = strategy.lightning_module, strategy.model
    assert module is not None
    assert model is not None
    names = {parameter: fsdp_name(name) for name, parameter in module.named_parameters()}
    keys = [key for group in saved["param_groups"] for key in group["params"]]
    here = [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]
    renamed = dict(zip(keys, here, strict=True))
    state = {
        "state": {renamed[key]: entry for key, entry in saved["state"].items()},
        "param_groups": [{**g, "params": [renamed[key] for key in g["params"]]} for g in saved["param_groups"]],
    }
    with whole_optimizer_states(model, strategy.world_size):
        flat = FullyShardedDataParallel.optim_state_dict_to_load(model, optimizer, state)
    optimizer.load_state_dict(flat)
