"""A callback that ends a run by an error, to be named on the command line."""

from __future__ import annotations

from lightning.pytorch import Callback, LightningModule, Trainer


class Fails(Callback):
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        raise ZeroDivisionError
