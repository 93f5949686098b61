"""Logging where updates lie in the spectra of their weights."""

from __future__ import annotations

from collections import defaultdict
from statistics import mean
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from rich.progress import track

from milora_lightning.adapters.injection import lora_layers
from milora_lightning.analysis.intruders import Intruders
from milora_lightning.analysis.spectra import (
    PRINCIPAL,
    Reference,
    module_type,
    number_of_intruders,
    reference_vectors,
    updates_of,
    weights_of,
)
from milora_lightning.linalg.singular import singular_slice
from milora_lightning.strategies.base import check_whole
from milora_lightning.utils.compat.lightning import logged_step
from milora_lightning.utils.errors import InvalidInputError


class SubspaceMonitor(Callback):
    """Logs how similar the updates are to parts of their weights' spectra, averaged over the layers of a module type.

    For each module type, such as ``q_proj``: ``subspace/q_proj/top``, ``/bottom`` and ``/random`` are the similarities
    φ between the update's top r left singular vectors and those of the weight (r / out for random subspaces), and
    ``subspace/q_proj/amplification`` is ‖UᵀΔWV‖_F / ‖UᵀWV‖_F (MiLoRA, arXiv 2406.09044, 5.3 and A.1), and
    ``subspace/q_proj/interference`` the share ρ_k of the update within the first k singular directions (OPLoRA, arXiv
    2510.13003). Each weight is decomposed once, when training starts, and 3 r + 2 k of its singular vectors are kept on
    the CPU. Only the first rank does this work.

    Args:
        every_n_steps: Number of optimizer steps between two measurements.
        k: Number of principal directions for ρ_k; at most all but r.
        intruders: Whether to log the number of intruder dimensions of W + ΔW as well, ``subspace/q_proj/intruders``
            (arXiv 2410.21228). Every measurement then decomposes each weight again.

    Raises:
        ValueError: If a number is not positive; in ``setup`` under a strategy that shards weights.
    """

    def __init__(self, every_n_steps: int = 100, k: int = PRINCIPAL, intruders: bool = False) -> None:
        for name, value in (("every_n_steps", every_n_steps), ("k", k)):
            if value < 1:
                raise InvalidInputError(f"{name} must be at least 1, not {value}.")
        self.every_n_steps, self.k, self.intruders = every_n_steps, k, intruders
        self._vectors: dict[str, Reference] = {}
        self._last_step = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse sharded weights before the model is loaded."""
        if stage == "fit":
            check_whole(trainer.strategy, "SubspaceMonitor")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Decompose the weights."""
        self._last_step = trainer.global_step
        if trainer.is_global_zero:
            for name, layer in track(lora_layers(pl_module).items(), "Decomposing weights", transient=True):
                for matrix, weight in weights_of(name, layer):
                    vectors = reference_vectors(matrix, weight, layer.r, self.k)
                    self._vectors[matrix] = vectors.to(torch.device("cpu"))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Measure and log every ``every_n_steps`` steps."""
        step = trainer.global_step
        if step != self._last_step and step % self.every_n_steps == 0 and trainer.is_global_zero:
            found = self.measure(pl_module)
            pl_module.log_dict(found, logger=False, rank_zero_only=True)
            for logger in trainer.loggers:  # Lightning would log it at its own steps, and at each until the next
                logger.log_metrics(found, step=logged_step(trainer))
        self._last_step = step

    @torch.no_grad()
    def measure(self, pl_module: LightningModule) -> dict[str, float]:
        """Compute the averages over all nonzero updates."""
        values = defaultdict(list)
        for name, layer in lora_layers(pl_module).items():
            for (matrix, weight), update in zip(weights_of(name, layer), updates_of(layer), strict=True):
                r = min(layer.r, len(update.S))
                if r == 0:
                    continue
                subspaces, left, right = self._vectors[matrix].to(update.U.device)
                found = {
                    **update.similarities(subspaces, r),
                    "amplification": update.amplification(weight, r),
                    "interference": update.interference(left, right),
                }
                if self.intruders:
                    vectors = singular_slice(weight, min(weight.shape), "principal").U
                    found["intruders"] = number_of_intruders(weight, update, vectors, Intruders())
                for key, value in found.items():
                    values[f"subspace/{module_type(name)}/{key}"].append(value)
        return {key: mean(each) for key, each in values.items()}
