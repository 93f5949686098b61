"""Acting right after a LightningModule's ``configure_model``, where Lightning has no hook for callbacks."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.model_helpers import is_overridden

from milora_lightning.adapters.parts import TargetNotFoundError
from milora_lightning.utils.compat.lightning import current_hook


def builds_itself(pl_module: LightningModule) -> bool:
    """Whether a module's class has a ``configure_model`` of its own."""
    vars(pl_module).pop("configure_model", None)
    return is_overridden("configure_model", pl_module)


def after_configure_model(
    pl_module: LightningModule, action: Callable[[], object], after_setup: Callable[[], object]
) -> None:
    """Run ``action`` right after each call of the module's ``configure_model`` or, if it has none, after its ``setup``.

    No callback hook lies between these and the strategy's wrapping of the model. Other callbacks may call
    ``configure_model`` in their ``setup``. The last call is the Trainer's; ``after_setup`` runs after that one only.
    A module without ``configure_model`` is not given one: Lightning would call it within contexts that are meant for
    building a model, and some of its plugins refuse those.

    Args:
        pl_module: The module, whose ``configure_model`` or ``setup`` is replaced until the Trainer has called it.
        action: What to do; until the Trainer's call it may fail because targets do not exist yet.
        after_setup: What to do at the end.
    """
    name = "configure_model" if builds_itself(pl_module) else "setup"
    vars(pl_module).pop(name, None)
    original = getattr(pl_module, name)

    def replacement(*args: Any, **kwargs: Any) -> None:
        by_trainer = current_hook(pl_module) == name
        if by_trainer:
            vars(pl_module).pop(name, None)
        original(*args, **kwargs)
        if not by_trainer:
            with suppress(TargetNotFoundError):
                action()
            return
        action()
        after_setup()

    setattr(pl_module, name, replacement)
