"""Keeping updates orthogonal to the principal singular directions of each weight."""

from __future__ import annotations

from contextlib import closing
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from rich.progress import track
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from milora_lightning.adapters.base_weight import dense_weight
from milora_lightning.adapters.injection import lora_layers
from milora_lightning.adapters.layer import LoRALinear
from milora_lightning.adapters.linear_layers import groups_of
from milora_lightning.linalg.singular import singular_slice
from milora_lightning.parallel.work import raise_on_all_ranks
from milora_lightning.strategies.base import check_whole
from milora_lightning.utils.counting import counted
from milora_lightning.utils.errors import InvalidInputError
from milora_lightning.utils.messages import inform


class PrincipalProjection(Callback):
    """Keeps the updates of MiLoRA out of the principal subspaces throughout training, not only at its start.

    For each weight W = U S Vᵀ, the first p singular directions U_p, V_p are protected: U_pᵀ ΔW = 0 and ΔW V_p = 0 after
    every step. MiLoRA's A₀ and B₀ are orthogonal to these directions, so both equations hold for ΔW = s (B A − B₀A₀) as
    long as A and B stay orthogonal to them too: A V_p = 0 and U_pᵀ B = 0. Gradients are projected when they are
    computed, so the optimizer's state and gradient clipping only see the free directions. An optimizer may still leave
    the subspace (Adam scales each entry by itself), so A and B are projected after each step as well, which takes
    4 r p (in + out) operations for each matrix.

    At most p = k − r directions can be protected, with k = min(out, in): all but those that MiLoRA trains. What is left
    free then is the r × r core between the minor vectors, and the null space of the longer side. ``init="lora"`` works
    too: A is projected once at the start, where B = 0.

    Args:
        p: Number of protected directions per weight; at most k − r are used.

    Raises:
        ValueError: If p is not positive; in ``setup`` under a strategy that shards the factors; when fitting starts if
            the module has no adapters, or their initial factors lie in the protected subspace (``init="pissa"``).
    """

    def __init__(self, p: int = 128) -> None:
        if p < 1:
            raise InvalidInputError(f"p must be at least 1, not {p}; leave PrincipalProjection out to protect nothing.")
        self.p = p
        self._protected: list[ProtectedSubspace] = []
        self._handles: list[RemovableHandle] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse sharded factors before the model is loaded."""
        if stage == "fit":
            check_whole(trainer.strategy, "PrincipalProjection")

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Decompose the weights and register the hooks that project gradients and factors."""
        layers = lora_layers(pl_module)
        if not layers:
            raise InvalidInputError("PrincipalProjection projects adapters, and the module has none: add MiLoRAInit.")
        bases: list[tuple[Tensor, Tensor]] = []
        error = None
        if trainer.is_global_zero:
            shown: Any = track(layers.items(), "Decomposing weights", transient=True)
            try:
                with closing(shown):  # a progress bar closed by the garbage collector may deadlock
                    bases = [_bases(name, layer, self.p) for name, layer in shown]
            except Exception as raised:  # any error, because the other ranks wait for this one
                error = raised
        raise_on_all_ranks(error, trainer.world_size)
        bases = trainer.strategy.broadcast(bases)  # rounding must not make the ranks' factors differ
        self._protected = [
            ProtectedSubspace(layer, U.to(layer.lora_B.device), V.to(layer.lora_A.device))
            for layer, (U, V) in zip(layers.values(), bases, strict=True)
        ]
        for name, protected in zip(layers, self._protected, strict=True):
            protected.check(name)
            protected.project_initial()
            self._handles += protected.project_gradients()
        self._handles += [optimizer.register_step_post_hook(self._after_step) for optimizer in trainer.optimizers]
        size = sum(x.nbytes for basis in bases for x in basis)
        inform(f"Protected: up to {self.p} directions of {counted(len(bases), 'weight')}, {size / 1e6:.0f} MB.")

    def _after_step(self, *_: Any) -> None:
        for protected in self._protected:
            protected.project()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remove the hooks and release the bases."""
        self._release()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Do so after an interruption, too: gradients of a later run without protection would be projected."""
        self._release()

    def _release(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles, self._protected = [], []


class ProtectedSubspace(NamedTuple):
    """An adapter and the directions that its update must be orthogonal to.

    Attributes:
        layer: The adapter.
        U: Protected left singular vectors, shape (out, p), or (experts, out, p) for a stack.
        V: Protected right singular vectors, shape (in, p), or (experts, in, p).
    """

    layer: LoRALinear
    U: Tensor
    V: Tensor

    def check(self, name: str) -> None:
        """Refuse an adapter whose initial or frozen factors are not orthogonal to the protected directions."""
        layer = self.layer
        A = layer.lora_A if layer.frozen == "lora_A" else layer.initial_A
        B = layer.lora_B if layer.frozen == "lora_B" else layer.initial_B
        inside = [(A.detach(), self.V)] if A is not None else []
        inside += [(B.detach().mT, self.U)] if B is not None else []
        if any((rows @ basis).norm() > 1e-3 * rows.norm() for rows, basis in inside):
            raise InvalidInputError(
                f"The initial factors of layer {name!r} (init={layer.init!r}) lie in the subspace that "
                "PrincipalProjection is to protect. Use init milora, mica or lora."
            )

    def project_initial(self) -> None:
        """Project a factor that starts outside the free subspace (A with ``init="lora"``; B is 0, so ΔW stays 0)."""
        if self.layer.initial_A is None and not (self.layer.lora_A.any() and self.layer.lora_B.any()):
            self.project()

    @torch.no_grad()
    def project(self) -> None:
        """Remove the part of both factors' changes that lies in the protected directions."""
        layer = self.layer
        # Project the change rather than the factor, so that unchanged rows stay the same bit for bit.
        A0, B0 = (0 if x is None else x for x in (layer.initial_A, layer.initial_B))
        if layer.lora_A.requires_grad:
            layer.lora_A.copy_(A0 + project_out(layer.lora_A - A0, self.V))
        if layer.lora_B.requires_grad:
            layer.lora_B.copy_(B0 + project_out((layer.lora_B - B0).mT, self.U).mT)

    def project_gradients(self) -> list[RemovableHandle]:
        """Project the gradients of both factors when they are computed."""
        projections = {
            self.layer.lora_A: lambda gradient: project_out(gradient, self.V),
            self.layer.lora_B: lambda gradient: project_out(gradient.mT, self.U).mT,
        }
        return [factor.register_hook(f) for factor, f in projections.items() if factor.requires_grad]  # type: ignore[no-untyped-call]


def project_out(rows: Tensor, basis: Tensor) -> Tensor:
    """Remove from each row its component in the span of orthonormal columns.

    Args:
        rows: Shape (n, d).
        basis: Shape (d, p).

    Returns:
        rows − rows basis basisᵀ, shape (n, d).

    >>> project_out(torch.ones(1, 3), torch.eye(3)[:, :2])
    tensor([[0., 0., 1.]])
    """
    return rows - (rows @ basis) @ basis.mT


def _bases(name: str, layer: LoRALinear, p: int) -> tuple[Tensor, Tensor]:
    if groups_of(layer.base_layer) > 1:
        raise InvalidInputError(
            f"PrincipalProjection cannot protect {name!r}, a convolution of several groups: leave it out of "
            "target_modules, by exclude_modules for example."
        )
    if layer.parts:
        raise InvalidInputError(
            f"PrincipalProjection cannot protect {name!r}, whose parts have factors of their own: leave its key out of "
            "fused_parts."
        )
    weight = dense_weight(layer)
    free = min(weight.shape[-2:]) - layer.r
    if free < 1:
        raise InvalidInputError(
            f"Layer {name!r} has no direction besides the r={layer.r} that are trained: use a smaller r."
        )
    matrices = weight.reshape(-1, *weight.shape[-2:])  # several for experts
    slices = [singular_slice(matrix, min(p, free), "principal") for matrix in matrices]
    # On the CPU, because each rank has a different device.
    U = torch.stack([each.U.to("cpu", layer.lora_B.dtype) for each in slices])
    V = torch.stack([each.Vh.mT.to("cpu", layer.lora_A.dtype) for each in slices])
    return U.view(*weight.shape[:-2], *U.shape[1:]), V.view(*weight.shape[:-2], *V.shape[1:])
