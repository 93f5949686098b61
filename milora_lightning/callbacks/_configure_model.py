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
    """Whether a module's class overrides ``configure_model``."""
    vars(pl_module).pop("configure_model", None)
    return is_overridden("configure_model", pl_module)


def after_configure_model(
    pl_module: LightningModule, action: Callable[[], object], after_setup: Callable[[], object]
) -> None:
    """Run ``action`` right after each call of the module's ``configure_model`` or, if it has none, after its ``setup``.

    There is no callback hook between these and the strategy's wrapping of the model. Other callbacks may call
    ``configure_model`` in their ``setup``; the last call is the Trainer's, and ``after_setup`` runs only after that
    one. A module without ``configure_model`` does not get one: Lightning would call it within contexts for building a
    model, which some of its plugins refuse.

    Args:
        pl_module: The module, whose ``configure_model`` or ``setup`` is replaced until the Trainer has called it.
        action: Called each time; before the Trainer's call it may fail because targets do not exist yet.
        after_setup: Called once, after the Trainer's call.
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
