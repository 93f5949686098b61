"""Acting right after a LightningModule's ``configure_model``, where Lightning has no hook for callbacks."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

from lightning.pytorch import LightningModule

from milora_lightning.adapters.parts import TargetNotFoundError
from milora_lightning.utils.compat import current_hook


def after_configure_model(
    pl_module: LightningModule, action: Callable[[], object], after_setup: Callable[[], object]
) -> None:
    """Run ``action`` right after each call of the module's ``configure_model``, whether or not it is overridden.

    No callback hook lies between ``configure_model`` and the strategy's wrapping of the model. Other callbacks may call
    it in their ``setup``. The last call is the Trainer's; ``after_setup`` runs after that one only.

    Args:
        pl_module: The module, whose ``configure_model`` is replaced until the Trainer has called it.
        action: What to do; until the Trainer's call it may fail because targets do not exist yet.
        after_setup: What to do at the end.
    """
    vars(pl_module).pop("configure_model", None)
    original = pl_module.configure_model

    def configure_model() -> None:
        by_trainer = current_hook(pl_module) == "configure_model"
        if by_trainer:
            vars(pl_module).pop("configure_model", None)
        original()
        if not by_trainer:
            with suppress(TargetNotFoundError):
                action()
            return
        action()
        after_setup()

    pl_module.configure_model = configure_model  # type: ignore[method-assign]
