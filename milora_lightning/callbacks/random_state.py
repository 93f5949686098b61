"""Random states in checkpoints; without them the dropout of a resumed run would differ."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

State = dict[str, torch.Tensor]


class RandomState(Callback):
    """Saves the random states of all ranks in checkpoints, and restores them before the first resumed batch.

    If the batches are determined by the seed, a resumed run then equals the uninterrupted one bit for bit (on CPUs; GPU
    kernels may sum in another order).
    """

    def __init__(self) -> None:
        self._restored: list[State] = []

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add the states of all ranks to the checkpoint."""
        checkpoint["random_state"] = gather(trainer, current_state(pl_module.device))

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keep the saved states until training resumes."""
        self._restored = checkpoint.get("random_state", [])

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Restore the state of this rank, once."""
        states, self._restored = self._restored, []
        if len(states) == trainer.world_size:  # saved states do not fit another number of ranks
            state = states[trainer.global_rank]
            torch.set_rng_state(state["cpu"])
            if "cuda" in state and pl_module.device.type == "cuda":
                torch.cuda.set_rng_state(state["cuda"], pl_module.device)


def current_state(device: torch.device) -> State:
    """Return torch's random states that affect computations on a device."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def gather(trainer: Trainer, state: State) -> list[State]:
    """Return the states of all ranks, on every rank."""
    if trainer.world_size == 1:
        return [state]
    states: list[Any] = [None] * trainer.world_size
    torch.distributed.all_gather_object(states, state)
    return states
