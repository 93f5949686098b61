"""Freezing running statistics: BatchNorm and the like must not change the function of a frozen model."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import nn
from torch.nn.utils.spectral_norm import SpectralNorm

from milora_lightning.utils.compat.torch import NormBase, SpectralNormParametrization
from milora_lightning.utils.derived_class import Derived, derive


class FrozenStatistics(Derived):
    """Mixin of a module that stays in eval mode when ``train()`` is called on it or on a module around it."""

    def train(self, mode: bool = True) -> Any:
        """Set the mode of submodules; this module stays in eval mode."""
        super().train(mode)  # type: ignore[misc]
        self.training = False
        return self

    def reset_running_stats(self) -> None:
        """Do nothing: ``torch.optim.swa_utils.update_bn`` would reset statistics that are never measured again."""


def unfrozen_modules(module: nn.Module) -> list[nn.Module]:
    """Return a module and the modules inside it, except those whose statistics are frozen."""
    return [child for child in module.modules() if not isinstance(child, FrozenStatistics)]


def freeze_statistics(module: nn.Module, kept: Collection[nn.Module]) -> None:
    """Make the layers of a frozen module use their running statistics in training, too, without updating them.

    This concerns BatchNorm and InstanceNorm with ``track_running_stats``, and spectral norm with its vectors.

    Args:
        module: The module; changed in place, once.
        kept: Modules inside it that train, and are left alone.

    >>> model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Dropout())
    >>> freeze_statistics(model, ())
    >>> [layer.training for layer in model.train()]
    [True, False, True]
    """
    for child in module.modules():
        if child is not module and child not in kept and _has_statistics(child):
            derive(child, FrozenStatistics)
            child.training = False


def _has_statistics(module: nn.Module) -> bool:
    if isinstance(module, NormBase):
        return module.track_running_stats
    hooks = module._forward_pre_hooks.values()
    return isinstance(module, SpectralNormParametrization) or any(isinstance(hook, SpectralNorm) for hook in hooks)
