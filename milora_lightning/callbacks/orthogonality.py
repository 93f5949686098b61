"""Keeping updates out of what a model knows best."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from rich.progress import track
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from milora_lightning.adapters.base_weight import dense_weight
from milora_lightning.adapters.injection import lora_layers
from milora_lightning.adapters.layer import LoRALinear
from milora_lightning.linalg.singular import singular_slice
from milora_lightning.parallel.work import raise_together
from milora_lightning.strategies.base import check_whole
from milora_lightning.utils.errors import InvalidInputError
from milora_lightning.utils.messages import inform


class PrincipalProjection(Callback):
    """Keeps the updates of MiLoRA out of the principal subspaces throughout training, not at the start alone.

    Of each weight W = U S Vᵀ the first p singular directions U_p, V_p are protected: U_pᵀ ΔW = 0 and ΔW V_p = 0 after
    every step. MiLoRA's A₀ and B₀ are orthogonal to them, so that both hold for ΔW = s (B A − B₀A₀) if A and B stay
    orthogonal to them too: A V_p = 0 and U_pᵀ B = 0. Gradients are projected onto that subspace as they arise, so
    that what an optimizer keeps of them and what clipping measures is of the directions that are free; and because
    an optimizer may leave the subspace all the same (Adam scales entry by entry), A and B are projected after each of
    its steps, at the cost of 4 r p (in + out) operations for each matrix.

    At most p = k − r directions can be protected, all but those that MiLoRA trains, k = min(out, in); what is free
    then is the r × r core between the minor vectors and the null space of the longer side. ``init="lora"`` works too:
    A is projected once at the start, where B = 0.

    Args:
        p: Number of protected directions of each weight; what exceeds k − r is cut off.

    Raises:
        ValueError: If p is not positive; in ``setup`` under a strategy that shards factors; when fitting starts if the
            module has no adapters, or their initial factors lie in the protected subspace (``init="pissa"``).
    """

    def __init__(self, p: int = 128) -> None:
        if p < 1:
            raise InvalidInputError(f"p must be at least 1, not {p}; leave PrincipalProjection out to protect nothing.")
        self.p = p
        self._protected: list[Protected] = []
        self._handles: list[RemovableHandle] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse factors that are not whole, before a model is loaded."""
        if stage == "fit":
            check_whole(trainer.strategy, "PrincipalProjection")

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Decompose the weights, and see to it that gradients and steps are projected."""
        layers = lora_layers(pl_module)
        if not layers:
            raise InvalidInputError("PrincipalProjection restrains adapters, and the module has none: add MiLoRAInit.")
        bases: list[tuple[Tensor, Tensor]] = []
        error = None
        if trainer.is_global_zero:
            try:
                bases = [_bases(*item, self.p) for item in track(layers.items(), "Decomposing weights", transient=True)]
            except Exception as raised:  # all of them, because the other ranks wait for this one
                error = raised
        raise_together(error, trainer.world_size)
        bases = trainer.strategy.broadcast(bases)  # one for all, so that rounding cannot drive the ranks' factors apart
        self._protected = [
            Protected(layer, U.to(layer.lora_B.device), V.to(layer.lora_A.device))
            for layer, (U, V) in zip(layers.values(), bases, strict=True)
        ]
        for name, protected in zip(layers, self._protected, strict=True):
            protected.check(name)
            protected.start()
            self._handles += protected.project_gradients()
        self._handles += [optimizer.register_step_post_hook(self._after_step) for optimizer in trainer.optimizers]
        size = sum(x.nbytes for basis in bases for x in basis)
        inform(f"Protected: up to {self.p} directions of {len(bases)} weights, {size / 1e6:.0f} MB.")

    def _after_step(self, *_: Any) -> None:
        for protected in self._protected:
            protected.project()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let go of everything."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._protected = [], []


class Protected(NamedTuple):
    """An adapter with the directions that its update is to keep out of.

    Attributes:
        layer: The adapter.
        U: Protected left singular vectors, shape (out, p).
        V: Protected right singular vectors, shape (in, p).
    """

    layer: LoRALinear
    U: Tensor
    V: Tensor

    def check(self, name: str) -> None:
        """Refuse an adapter whose initial factors are not orthogonal to the protected directions."""
        layer = self.layer
        if layer.initial_A is not None and (layer.initial_A @ self.V).norm() > 1e-3 * layer.initial_A.norm():
            raise InvalidInputError(
                f"The initial factors of layer {name!r} (init={layer.init!r}) lie in the subspace that "
                "PrincipalProjection is to protect. Use init milora or lora."
            )

    def start(self) -> None:
        """Project A where it starts outside, as LoRA's own does; B is zero there, so nothing changes."""
        if self.layer.initial_A is None and not self.layer.lora_B.any():
            self.project()

    @torch.no_grad()
    def project(self) -> None:
        """Take out of both factors' changes what lies in the protected directions."""
        layer = self.layer
        # The change and not the factor, so that what has not moved stays the same bit for bit.
        A0, B0 = (0 if x is None else x for x in (layer.initial_A, layer.initial_B))
        layer.lora_A.copy_(A0 + without(layer.lora_A - A0, self.V))
        layer.lora_B.copy_(B0 + without((layer.lora_B - B0).mT, self.U).mT)

    def project_gradients(self) -> list[RemovableHandle]:
        """Have both factors' gradients projected as they arise."""
        A, B = self.layer.lora_A, self.layer.lora_B
        return [
            A.register_hook(lambda gradient: without(gradient, self.V)),  # type: ignore[no-untyped-call]
            B.register_hook(lambda gradient: without(gradient.mT, self.U).mT),  # type: ignore[no-untyped-call]
        ]


def without(rows: Tensor, basis: Tensor) -> Tensor:
    """Take out of each row its part in the span of orthonormal columns.

    Args:
        rows: Shape (n, d).
        basis: Shape (d, p).

    Returns:
        rows − rows basis basisᵀ, shape (n, d).

    >>> without(torch.ones(1, 3), torch.eye(3)[:, :2])
    tensor([[0., 0., 1.]])
    """
    return rows - (rows @ basis) @ basis.mT


def _bases(name: str, layer: LoRALinear, p: int) -> tuple[Tensor, Tensor]:
    weight = dense_weight(layer)
    free = min(weight.shape) - layer.r
    if free < 1:
        raise InvalidInputError(
            f"Layer {name!r} has no direction beside the r={layer.r} that are trained: use a smaller r."
        )
    U, _, Vh = singular_slice(weight, min(p, free), "principal")
    # On the CPU, because another rank's device is not this one's.
    return U.to("cpu", layer.lora_B.dtype), Vh.mT.to("cpu", layer.lora_A.dtype).contiguous()
