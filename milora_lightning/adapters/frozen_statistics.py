"""Statistics of frozen layers stand still: what a module measures while it trains is part of its function."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import nn
from torch.nn.utils.spectral_norm import SpectralNorm

from milora_lightning.utils.compat import NormBase, SpectralNormParametrization
from milora_lightning.utils.derived_class import Derived, derive


class FrozenStatistics(Derived):
    """Mixin of a module that stays in eval mode by itself, whatever ``train()`` is called on a module around it."""

    def train(self, mode: bool = True) -> Any:
        """Set the mode of the modules inside, and of this one eval."""
        super().train(mode)  # type: ignore[misc]
        self.training = False
        return self

    def reset_running_stats(self) -> None:
        """Keep them: ``torch.optim.swa_utils.update_bn`` would begin anew, and they are not measured again."""


def unfrozen_modules(module: nn.Module) -> list[nn.Module]:
    """Return the modules inside a module, and itself, but for those whose statistics are frozen."""
    return [child for child in module.modules() if not isinstance(child, FrozenStatistics)]


def freeze_statistics(module: nn.Module, kept: Collection[nn.Module]) -> None:
    """Have the layers of a frozen module compute with their running statistics in training, too, and not change them.

    These are BatchNorm and InstanceNorm with ``track_running_stats``, and spectral norm with its vectors.

    Args:
        module: The module; changed in place, once.
        kept: Modules in it that train, and keep the behaviour of their own.

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
