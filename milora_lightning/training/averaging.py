"""Making Lightning's weight-averaging callbacks average only the adapters, not the base model.

``WeightAveraging``, its subclasses and ``StochasticWeightAveraging`` copy the whole module in their ``setup``, before
all adapters are injected. They average every parameter, which would take the memory of a second base model and change
frozen weights by rounding. Here they copy the module again after injection, and share its frozen parameters.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, StochasticWeightAveraging, WeightAveraging
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from milora_lightning.adapters.frozen_statistics import unfrozen_modules
from milora_lightning.adapters.injection import lora_layers
from milora_lightning.strategies.base import check_whole
from milora_lightning.utils.compat.lightning import averaged_model, change_average

Averaging = WeightAveraging | StochasticWeightAveraging
Average = Callable[[Tensor, Tensor, Any], Tensor]


def check_averaging(trainer: Trainer) -> None:
    """Refuse callbacks for weight averaging if weights are sharded, because they would copy whole weights.

    Raises:
        ValueError: If the Trainer has such a callback and a strategy that shards weights.
    """
    for callback in _averaging(trainer):
        check_whole(trainer.strategy, type(callback).__name__)


def copy_adapted(trainer: Trainer, module: LightningModule, stage: str) -> None:
    """Run the ``setup`` of the callbacks for weight averaging again, now that the module has its adapters.

    The averages share the module's frozen parameters. Copies from an earlier ``setup`` are discarded.

    Args:
        trainer: The Trainer that has these callbacks, before it restores a checkpoint.
        module: The module with its adapters.
        stage: The Trainer's stage.
    """
    for callback in _averaging(trainer):
        with _shared_when_copied(module):
            callback.setup(trainer, module, stage)
        average = averaged_model(callback)
        if isinstance(average, AveragedModel):
            average.update_parameters = partial(_update, average)  # type: ignore[method-assign]
        elif isinstance(callback, StochasticWeightAveraging):
            change_average(callback, _exact)
            _spare_frozen_statistics(callback)


def _spare_frozen_statistics(callback: StochasticWeightAveraging) -> None:
    """Make the final epoch that recomputes BatchNorm statistics skip layers whose statistics are frozen."""

    def measured(module: LightningModule) -> Any:
        return SimpleNamespace(modules=lambda: unfrozen_modules(module), device=module.device)

    cls: Any = type(callback)
    patched: Any = callback
    patched.pl_module_contains_batch_norm = lambda module: cls.pl_module_contains_batch_norm(measured(module))
    patched.reset_batch_norm_and_save_state = lambda module: cls.reset_batch_norm_and_save_state(
        callback, measured(module)
    )


def behind_others(callbacks: Sequence[Callback]) -> list[Callback]:
    """Move WeightAveraging after all other callbacks except checkpoints.

    At the end of a validation, it gives the module its training weights back. Monitors after it would then measure
    those weights, although the logged loss is that of the average.
    """
    averaging = [c for c in callbacks if isinstance(c, WeightAveraging)]
    saving = [c for c in callbacks if isinstance(c, Checkpoint)]
    return [*(c for c in callbacks if c not in averaging and c not in saving), *averaging, *saving]


def start_averages(trainer: Trainer, module: nn.Module) -> None:
    """Copy the factors to averages created before the factors were computed.

    Args:
        trainer: The Trainer with the callbacks.
        module: The module whose factors have been computed.
    """
    layers = lora_layers(module)
    for callback in _averaging(trainer):
        average = averaged_model(callback)
        if average is None:
            continue
        held = cast(nn.Module, getattr(average, "module", average))
        for name, layer in lora_layers(held).items():
            if layers[name].initialized and not layer.initialized:
                with torch.no_grad():
                    layer.lora_A.copy_(layers[name].lora_A)
                    layer.lora_B.copy_(layers[name].lora_B)
                layer.initialized = True


def _averaging(trainer: Trainer) -> list[Averaging]:
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    return [c for c in callbacks if isinstance(c, (WeightAveraging, StochasticWeightAveraging))]


@contextmanager
def _shared_when_copied(module: nn.Module) -> Iterator[None]:
    """Within this context, a deep copy of the module shares the module's frozen parameters.

    Moving such a copy to another device leaves the shared parameters where they are; moving the module moves them.
    """
    frozen = [parameter for parameter in module.parameters() if not parameter.requires_grad]

    def copied(memo: dict[int, Any]) -> nn.Module:
        vars(module).pop("__deepcopy__", None)
        memo.update({id(parameter): parameter for parameter in frozen})
        double = copy.deepcopy(module, memo)
        vars(module)["__deepcopy__"] = copied
        vars(double)["_apply"] = partial(_apply_to_others, double, set(frozen))
        return double

    vars(module)["__deepcopy__"] = copied
    try:
        yield
    finally:
        vars(module).pop("__deepcopy__", None)


def _apply_to_others(module: nn.Module, shared: set[nn.Parameter], fn: Callable[[Tensor], Tensor], *more: Any) -> Any:
    return type(module)._apply(module, lambda tensor: tensor if tensor in shared else fn(tensor), *more)  # type: ignore[no-untyped-call]


class _Unshared:
    """A view of a module without the parameters that it shares with another one."""

    def __init__(self, module: nn.Module, other: nn.Module) -> None:
        self.module = module
        self.shared = set(module.parameters()) & set(other.parameters())

    def parameters(self) -> Iterator[nn.Parameter]:
        return (parameter for parameter in self.module.parameters() if parameter not in self.shared)

    def buffers(self) -> Iterator[Tensor]:
        return self.module.buffers()


def _update(average: AveragedModel, model: nn.Module) -> None:
    """Update an average as its class does, except for the parameters that it shares with the model."""
    ours = _Unshared(average.module, model)
    seen = SimpleNamespace(
        module=ours,
        parameters=ours.parameters,
        n_averaged=average.n_averaged,
        use_buffers=average.use_buffers,
        avg_fn=average.avg_fn and _exact(average.avg_fn),
        multi_avg_fn=average.multi_avg_fn,
    )
    type(average).update_parameters(cast(AveragedModel, seen), cast(nn.Module, _Unshared(model, average.module)))


def _exact(average: Average) -> Average:
    """Make the average of equal numbers exact, so that constants such as rotary frequencies do not change.

    >>> ema = lambda averaged, now, number: 0.9 * averaged + (1 - 0.9) * now
    >>> tenth = torch.tensor(0.1)
    >>> bool(ema(tenth, tenth, 1) == tenth), bool(_exact(ema)(tenth, tenth, 1) == tenth)
    (False, True)
    """

    def exact(averaged: Tensor, now: Tensor, number: Any) -> Tensor:
        return torch.where(averaged == now, averaged, average(averaged, now, number).to(averaged.dtype))

    return exact
