"""Checks of a run with adapters: that all its parts support them, and that everything that should train does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelPruning
from lightning.pytorch.plugins.precision import BitsandbytesPrecision
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from milora_lightning.adapters.injection import lora_layers
from milora_lightning.adapters.new_layers import saved_modules
from milora_lightning.adapters.parts import find_part, first_few
from milora_lightning.callbacks._configure_model import builds_itself
from milora_lightning.config import LoRAConfig
from milora_lightning.export.models import outermost_models
from milora_lightning.export.peft_trial import objection
from milora_lightning.parallel.gathering import free_gathered
from milora_lightning.statistics.collecting import layers_with_needs
from milora_lightning.strategies.base import finish, prepare
from milora_lightning.training.averaging import check_averaging
from milora_lightning.training.loss_scaling import check_loss_scaling, is_float16
from milora_lightning.utils.compat.lightning import is_placeholder
from milora_lightning.utils.errors import InvalidInputError
from milora_lightning.utils.messages import warn, warn_once
from milora_lightning.utils.names import unwrapped_name


def check_run(trainer: Trainer, module: LightningModule) -> None:
    """Refuse callbacks, plugins and strategies that do not support adapters, and prepare the others for them.

    Raises:
        ValueError: If there is one.
    """
    check_callbacks(trainer)
    check_quantizing(trainer, module)
    prepare(trainer)
    check_averaging(trainer)


def check_model(trainer: Trainer, module: LightningModule, config: LoRAConfig, stage: str) -> None:
    """Check a module with its adapters before the strategy's setup, and warn if its export will fail.

    Args:
        trainer: The Trainer.
        module: The module with its adapters.
        config: Their configuration.
        stage: The stage of the run, such as ``"fit"``.

    Raises:
        ValueError: If gradients would vanish in float16, the strategy does not support the module's parameters, or a
            start needs statistics of a layer that has none.
    """
    if stage == "fit":
        check_loss_scaling(trainer, module, is_float16(find_part(module, config.module)))
    finish(trainer, module)
    if stage == "fit":
        layers_with_needs(module)  # raises if a layer has no statistics, before any work
    if stage == "fit" and trainer.is_global_zero:
        warn_of_export(module)


def check_callbacks(trainer: Trainer) -> None:
    """Refuse callbacks that change the adapters' base weights.

    Raises:
        ValueError: If there is one.
    """
    if any(isinstance(callback, ModelPruning) for callback in trainer.callbacks):  # type: ignore[attr-defined]
        raise InvalidInputError(
            "ModelPruning does not work with MiLoRAInit: it prunes the weights that adapters keep frozen, and whose "
            "singular vectors they start from. Remove one of the two, or prune the model before or after training."
        )


def check_quantizing(trainer: Trainer, module: LightningModule) -> None:
    """Refuse Lightning's quantization plugin if it would quantize while the model is being built.

    Raises:
        ValueError: If the plugin is used, and the module has a ``configure_model``.
    """
    if isinstance(trainer.precision_plugin, BitsandbytesPrecision) and builds_itself(module):
        raise InvalidInputError(
            "BitsandbytesPrecision quantizes what configure_model builds before factors can be computed from it: "
            "build the model in __init__ or setup instead, or load it quantized, by transformers' BitsAndBytesConfig "
            "or, in CausalLMModule, quantization='nf4'."
        )


def check_optimizers(trainer: Trainer, module: LightningModule, config: LoRAConfig) -> None:
    """Refuse optimizers that lack a trainable parameter, unless it was frozen after surgery.

    Args:
        trainer: The Trainer, with its optimizers.
        module: The module with its adapters.
        config: Their configuration.

    Raises:
        ValueError: If adapters, or parameters in ``modules_to_save``, are in no optimizer.
    """
    optimizers = [optimizer for optimizer in trainer.optimizers if not is_placeholder(optimizer)]
    if not optimizers and not module.automatic_optimization:
        return  # the module has optimizers that Lightning does not know
    free_gathered(module)  # which validation leaves behind
    held = {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    factors = [p for layer in lora_layers(module).values() for p in (layer.lora_A, layer.lora_B)]
    saved = saved_modules(find_part(module, config.module), config)
    wanted = {id(p) for p in [*factors, *(p for each in saved for p in each.parameters())] if p.requires_grad}
    missing = [unwrapped_name(name) for name, p in module.named_parameters() if id(p) in wanted - held]
    if missing:
        raise InvalidInputError(
            f"{len(missing)} of {len(wanted)} parameters that MiLoRAInit is to train are in no optimizer, such as "
            f"{missing[0]!r}, and would stay as they are. Adapters are made after __init__: make the optimizer in "
            "configure_optimizers, from [p for p in self.parameters() if p.requires_grad]."
        )


def say_without_gradient(module: LightningModule, optimizer: Optimizer) -> None:
    """Warn of an optimizer's adapters that have no gradient at its first step."""
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    layers = {n: [p for p in (m.lora_A, m.lora_B) if id(p) in held] for n, m in lora_layers(module).items()}
    layers = {name: factors for name, factors in layers.items() if factors}
    names = [name for name, reached in zip(layers, _reached([*layers.values()]), strict=True) if not reached]
    if names:
        parts = sorted({name.split(".")[0] for name in names})
        warn_once(
            module,
            f"No gradient has reached the adapters of {first_few(names)} in the first step: what is used under "
            "no_grad, or not at all, does not train. "
            f"Leave it out (exclude_modules={parts}), or name the part to adapt (module).",
        )


def _reached(layers: Sequence[Sequence[Tensor]]) -> list[bool]:
    """Return whether each layer's factors have received a gradient; with shards, all ranks must call this.

    In a sharded model, a rank has zero gradients for layers it has not used, and its own shard may be all zero.
    """
    gradients = [[p.grad for p in factors if p.grad is not None] for factors in layers]
    if not any(isinstance(p, DTensor) for factors in layers for p in factors):
        return [bool(found) for found in gradients]
    mine = [any(bool((g.to_local() if isinstance(g, DTensor) else g).any()) for g in found) for found in gradients]
    everybody: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everybody, mine)
    return [any(flags) for flags in zip(*everybody, strict=True)]


def warn_of_export(module: LightningModule) -> None:
    """Warn before training rather than after it of adapters that cannot be exported for PEFT."""
    for model in outermost_models(module).values():
        if lora_layers(model) and (said := objection(model)):
            warn(
                f"An export for PEFT will be refused at the end, as PEFT cannot hold these adapters: {said}. A merged "
                "export works; for PEFT, leave these layers out of target_modules.",
            )
